"""Progress reaches the runner's file, at most once a second."""

import pytest

from caprl_utils import progress
from caprl_utils.progress import PROGRESS_ENV, Progress, read_state, track


@pytest.fixture
def state_file(tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS_ENV, str(tmp_path / "progress"))
    return tmp_path / "progress"


def test_track_yields_all_and_leaves_the_last_state(state_file):
    for items, total in (([1, 2, 3], 3), (iter([1, 2, 3]), None)):
        assert list(track(items, "counting")) == [1, 2, 3]
        state = read_state(state_file)
        assert (state["label"], state["done"], state["total"]) == ("counting", 3, total)


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
