"""Child processes: logged, told when they fail, gone when their parent is."""

import subprocess
import sys
import time

import psutil
import pytest

from caprl_utils import paths, processes
from caprl_utils.errors import UserError

SLEEP = [sys.executable, "-c", "import time; time.sleep(100)"]
PARENT = f"import subprocess, sys; p = subprocess.Popen({SLEEP!r}); print(p.pid, flush=True); p.wait()"


def told_pid(log):
    """The process id that PARENT wrote for its child."""
    deadline = time.monotonic() + 60
    while not log.exists() or not log.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(log.read_text())


def gone(pid):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_output_goes_to_the_log_and_a_failure_shows_its_end(tmp_path):
    command = [sys.executable, "-c", "import os, sys; print(os.environ['X']); print('err', file=sys.stderr)"]
    processes.run(command, tmp_path / "logs" / "out.log", env={"X": "told"})
    assert set((tmp_path / "logs" / "out.log").read_text().split()) == {"told", "err"}
    command = [sys.executable, "-c", "print('\\n'.join(map(str, range(99)))); raise SystemExit(3)"]
    with pytest.raises(UserError, match=r"failed \(exit status 3\); the end of .*out\.log:\n84\n") as error:
        processes.run(command, tmp_path / "out.log")
    assert str(error.value).endswith("98")


def test_a_signal_is_named(tmp_path):
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    with pytest.raises(UserError, match="killed by SIGKILL"):
        processes.run(command, tmp_path / "out.log")


def test_stop_ends_the_whole_group(tmp_path):
    process = processes.popen([sys.executable, "-c", PARENT], tmp_path / "out.log")
    child = told_pid(tmp_path / "out.log")
    processes.stop(process)
    assert process.returncode is not None and gone(child)


def test_a_child_dies_with_its_killed_parent(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from caprl_utils.processes import popen;"
        f"print(popen({SLEEP!r}, Path({str(tmp_path / 'out.log')!r})).pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=paths.ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.wait()
    assert gone(child)


def test_a_guarded_command_takes_its_children_along_when_the_parent_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from caprl_utils.processes import popen;"
        f"popen([sys.executable, '-c', {PARENT!r}], Path({str(tmp_path / 'out.log')!r}), guarded=True);"
        "time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=paths.ROOT)
    child = told_pid(tmp_path / "out.log")
    parent.kill()
    parent.wait()
    assert gone(child)


def test_a_guard_passes_on_status_and_stop(tmp_path):
    process = processes.popen(
        [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "out.log", guarded=True
    )
    assert process.wait() == 3
    process = processes.popen([sys.executable, "-c", PARENT], tmp_path / "two.log", guarded=True)
    child = told_pid(tmp_path / "two.log")
    processes.stop(process)
    assert gone(child)
