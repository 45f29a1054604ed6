"""Child processes that are watched, logged to a file, and never outlive their parent."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.paths import shown

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # looked up here: a forked child must not import
_GRACE_SEC = 10.0
_TAIL_LINES = 15


def die_with_parent(parent: int | None = None) -> None:
    """Have Linux kill this process when its parent dies, also by `kill -9`. Elsewhere it does nothing.

    Call it in the child, first thing. parent: the parent's process id, to notice that it is gone already.
    """
    if _PRCTL is None:
        return
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def popen(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start a command in its own process group with stdout and stderr in `log`; it dies with this process.

    env: variables on top of ours.
    """
    parent = os.getpid()
    with full_disk_as_user_error(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            return subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )


def run(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run a command to its end. Raises UserError with the last lines of its log when it fails.

    When this process is interrupted the whole process group is stopped.
    """
    process = popen(command, log, env)
    try:
        status = process.wait()
    finally:
        stop(process)
    if status:
        how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        raise UserError(f"{' '.join(command[:4])} ... failed ({how}); the end of {shown(log)}:\n{tail(log)}")


def stop(process: subprocess.Popen) -> None:
    """End a process started by `popen` and its whole group: SIGTERM, ten seconds of grace, SIGKILL."""
    for signal_number, patience in ((signal.SIGTERM, _GRACE_SEC), (signal.SIGKILL, _GRACE_SEC)):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and _group_alive(process):
            time.sleep(0.05)
    process.wait()


def _group_alive(process: subprocess.Popen) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def tail(log: Path, lines: int = _TAIL_LINES) -> str:
    """The last lines of a log file."""
    if not log.exists():
        return "(no log)"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
