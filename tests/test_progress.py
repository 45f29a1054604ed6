"""Progress reaches the runner's file, at most once a second; without a runner and a terminal it is silent."""

from caprl_utils import progress
from caprl_utils.progress import PROGRESS_ENV, Progress, read_state, track


def test_progress_leaves_its_last_state_in_few_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(PROGRESS_ENV, raising=False)
    assert list(track(range(3), "quiet")) == [0, 1, 2] and capsys.readouterr().err == ""
    monkeypatch.setenv(PROGRESS_ENV, str(tmp_path / "progress"))
    for items, total in (([1, 2, 3], 3), (iter([1, 2, 3]), None)):
        assert list(track(items, "counting")) == [1, 2, 3]
        state = read_state(tmp_path / "progress")
        assert (state["label"], state["done"], state["total"]) == ("counting", 3, total)
    writes = []
    monkeypatch.setattr(progress, "write_json", lambda path, state: writes.append(state))
    with Progress("train", total=1000) as bar:
        for _ in range(1000):
            bar.update(note="reward 0.5")
    assert len(writes) <= 4 and writes[-1]["done"] == 1000 and writes[-1]["note"] == "reward 0.5"
