"""Child processes: logged, gone when their parent is; progress that they tell."""

import subprocess
import sys
import time

import psutil
import pytest

from caprl_utils import paths, processes, progress
from caprl_utils.progress import PROGRESS_ENV, Progress, read_state, track

pytestmark = pytest.mark.timeout(90)
SLEEP = [sys.executable, "-c", "import time; time.sleep(100)"]
PARENT = f"import subprocess, sys; p = subprocess.Popen({SLEEP!r}); print(p.pid, flush=True); p.wait()"


def told_pid(log):
    """The process id that PARENT, or a process that `popen` started, wrote for its child."""
    while not log.exists() or not log.read_text().endswith("\n"):
        time.sleep(0.05)
    return int(log.read_text())


def wait_until_gone(pid):
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)


@pytest.mark.parametrize("guarded", [False, True])
def test_output_and_status_are_passed_on_and_stop_ends_the_whole_group(tmp_path, guarded):
    code = "import os, sys; print(os.environ['X']); print('err', file=sys.stderr); sys.exit(3)"
    log = tmp_path / "logs" / "out.log"
    assert processes.popen([sys.executable, "-c", code], log, {"X": "told"}, guarded).wait() == 3
    assert set(log.read_text().split()) == {"told", "err"}
    process = processes.popen([sys.executable, "-c", PARENT], tmp_path / "two.log", guarded=guarded)
    child = told_pid(tmp_path / "two.log")
    processes.stop(process)
    assert process.returncode is not None
    wait_until_gone(child)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_child_dies_with_its_killed_parent_and_a_guarded_one_takes_its_own_along(tmp_path, guarded):
    log = tmp_path / "out.log"
    command = PARENT if guarded else "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    code = (
        "import sys, time; from pathlib import Path; from caprl_utils.processes import popen;"
        f"popen([sys.executable, '-c', {command!r}], Path({str(log)!r}), guarded={guarded}); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=paths.ROOT)
    child = told_pid(log)
    parent.kill()
    parent.wait()
    wait_until_gone(child)


def test_the_end_of_a_log(tmp_path):
    (tmp_path / "out.log").write_text("\n".join(map(str, range(99))))
    assert processes.tail(tmp_path / "out.log").split() == [str(n) for n in range(84, 99)]
    assert processes.tail(tmp_path / "none.log") == "(no log)"


def test_progress_leaves_its_last_state_in_few_writes_and_is_silent_where_nobody_looks(tmp_path, monkeypatch, capsys):
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
