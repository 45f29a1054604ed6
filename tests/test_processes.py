"""Child processes: logged, told when they fail, gone when their parent is."""

import subprocess
import sys
import time

import psutil
import pytest

from caprl_utils import paths, processes
from caprl_utils.errors import UserError

SLEEP = [sys.executable, "-c", "import time; time.sleep(100)"]


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
    parent = f"import subprocess, sys; p = subprocess.Popen({SLEEP!r}); print(p.pid, flush=True); p.wait()"
    process = processes.popen([sys.executable, "-c", parent], tmp_path / "out.log")
    while not (tmp_path / "out.log").read_text().endswith("\n"):
        time.sleep(0.05)
    processes.stop(process)
    assert process.returncode is not None and gone(int((tmp_path / "out.log").read_text()))


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
    command = f"import subprocess, sys; p = subprocess.Popen({SLEEP!r}); print(p.pid, flush=True); p.wait()"
    code = (
        "import sys, time; from pathlib import Path; from caprl_utils.processes import popen;"
        f"popen([sys.executable, '-c', {command!r}], Path({str(tmp_path / 'out.log')!r}), guarded=True);"
        "time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=paths.ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.log").exists() or not (tmp_path / "out.log").read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert gone(int((tmp_path / "out.log").read_text()))


def test_a_guard_passes_on_status_and_stop(tmp_path):
    process = processes.popen(
        [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "out.log", guarded=True
    )
    assert process.wait() == 3
    command = f"import subprocess, sys; p = subprocess.Popen({SLEEP!r}); print(p.pid, flush=True); p.wait()"
    process = processes.popen([sys.executable, "-c", command], tmp_path / "two.log", guarded=True)
    while not (tmp_path / "two.log").read_text().endswith("\n"):
        time.sleep(0.05)
    processes.stop(process)
    assert gone(int((tmp_path / "two.log").read_text()))
