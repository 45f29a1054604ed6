"""Progress reaches the runner's file, at most once a second."""

import json

import pytest

from caprl_utils import progress
from caprl_utils.progress import PROGRESS_ENV, Progress, Times, duration, line, track


@pytest.fixture
def state_file(tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS_ENV, str(tmp_path / "progress"))
    return tmp_path / "progress"


def test_track_yields_all_and_leaves_the_last_state(state_file):
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    state = json.loads(state_file.read_text())
    assert (state["label"], state["done"], state["total"]) == ("counting", 3, 3)
    list(track((i for i in range(2)), "stream"))
    assert line(json.loads(state_file.read_text())) == "stream 2"
    state = {"label": "train", "done": 40, "total": 100, "note": "reward 0.53", "sec": 20.0}
    assert line(state) == "train 40/100, reward 0.53, about 30 s left"


def test_many_updates_are_few_writes(state_file, monkeypatch):
    writes = []
    monkeypatch.setattr(progress, "write_json", lambda path, state: writes.append(state))
    with Progress("train", total=1000) as bar:
        for _ in range(1000):
            bar.update(note="reward 0.5")
    assert len(writes) <= 4 and writes[-1]["done"] == 1000 and writes[-1]["note"] == "reward 0.5"


def test_without_a_runner_and_a_terminal_it_is_silent(monkeypatch, capsys):
    monkeypatch.delenv(PROGRESS_ENV, raising=False)
    list(track(range(3), "quiet"))
    assert capsys.readouterr().err == ""


CHAIN = ["01", "03", "04", "05", "06"]
REPORTED = {"01": 49.5, "03": 1044.1, "04": 719.6, "05": 40.1, "06": 7.1}  # 31 minutes


def stage(left):
    """A stage that says that it takes so many seconds more."""
    return {"done": 1, "total": 2, "sec": left}


def test_the_time_left_is_that_of_the_stage_and_of_this_machine():
    fresh = Times(REPORTED, {})
    assert fresh.left(CHAIN, "01", 0.0) == pytest.approx(1860.4)
    early = {"done": 1, "total": 320, "sec": 9.0}  # the first item says little
    assert fresh.left(CHAIN, "01", 13.0, early) == pytest.approx(1860.4 - 13.0)
    # 65 s of the first for 49.5; 18.5 minutes into the second its stage says 1,085 s more: 2.1 times as reported
    slow = Times(REPORTED, {"01": 65.0})
    left = slow.left(CHAIN, "03", 1111.0, stage(1085.0))
    pace = (65.0 + 1111.0 + 1085.0) / (49.5 + 1044.1)
    assert left == pytest.approx(1085.0 + pace * (719.6 + 40.1 + 7.1)) and left / 60 > 40
    # both done in 2.6 times the time: the rest takes as much
    slow = Times(REPORTED, {"01": 65.0, "03": 2730.0})
    pace = 2795.0 / (49.5 + 1044.1)
    assert slow.left(CHAIN, "04", 100.0) == pytest.approx(pace * (719.6 + 40.1 + 7.1) - 100.0)
    late = slow.left(CHAIN, "04", 2500.0, stage(340.0))
    assert late > 340.0 + pace * (40.1 + 7.1)
    assert Times(REPORTED, {"04": 2000.0}).left(CHAIN, "04", 500.0) > 1500.0  # measured here: no scale
    assert fresh.left(["new", "01"], "new", 1.0) is None


def test_the_longest_time_of_a_notebook_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "REPORTED", tmp_path / "times.json")
    (tmp_path / "times.json").write_text('{"smoke": {"a": 10.0, "b": 5.0}}')
    progress.note_time("smoke", "a", 60.04)
    progress.note_time("smoke", "a", 2.0)  # found its results made
    assert Times.of("smoke").known == {"a": 60.0, "b": 5.0}
    assert [duration(s) for s in (5, 65, 605, 3605)] == ["0:05", "1:05", "10:05", "1:00:05"]
