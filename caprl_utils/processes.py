"""Child processes that are watched, logged to a file, and never outlive their parent.

``python -m caprl_utils.processes COMMAND`` is the guard of `popen(..., guarded=True)`: Linux tells only the direct
child that its parent died, so a server's own children would stay behind after `kill -9`. The guard ends them all.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.paths import ROOT

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # looked up here: a forked child must not import
_GRACE_SEC = 10.0
_TAIL_LINES = 15


def die_with_parent(parent: int | None = None, by: signal.Signals = signal.SIGKILL) -> None:
    """Have Linux send this process (a child, first thing) a signal when its parent dies, also by `kill -9`. parent: the
    parent's process id, to notice that it is gone already.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, by, 0, 0, 0)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), by)


def popen(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, guarded: bool = False
) -> subprocess.Popen:
    """Start a command in its own process group with stdout and stderr in `log`; it dies with this process. env:
    variables on top of ours. guarded: its children die, too; the process returned is the guard's.
    """
    parent = os.getpid()
    if guarded:
        command = [sys.executable, "-m", __name__, str(parent), *command]
    with full_disk_as_user_error(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **(env or {})}, preexec_fn=lambda: die_with_parent(parent),
            )  # fmt: skip


def require_slurm(nodes: int, asked: str, script: str) -> None:
    """Raise UserError unless this runs in a Slurm job of that many nodes. asked: by what. script: starts such a job."""
    found = os.environ.get("SLURM_JOB_NUM_NODES", "none")
    if found != str(nodes) or "MASTER_ADDR" not in os.environ:
        job = f"a Slurm job of {nodes} nodes (here: {found}) with MASTER_ADDR and MASTER_PORT set; {script} does so"
        raise UserError(f"{asked}: srun starts the training on each, so this has to run in {job}")


def visible_gpus() -> list[int]:
    """The NVIDIA GPUs that this process may use, of those in CUDA_VISIBLE_DEVICES where it is set."""
    import torch

    return list(range(torch.cuda.device_count()))


def python_path() -> str:
    """PYTHONPATH with which a child process finds this package wherever it starts."""
    return os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))


def stop(process: subprocess.Popen, grace_sec: float = _GRACE_SEC) -> None:
    """End a process started by `popen` and its whole group: SIGTERM, some seconds of grace, SIGKILL."""
    for signal_number, patience in ((signal.SIGTERM, grace_sec), (signal.SIGKILL, _GRACE_SEC)):
        deadline = time.monotonic() + patience
        with suppress(ProcessLookupError, PermissionError):  # the group is gone
            os.killpg(process.pid, signal_number)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    process.wait()


def tail(log: Path) -> str:
    """The last lines of a log file."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ["(no log)"]
    return "\n".join(lines[-_TAIL_LINES:])


def _guard(parent: int, command: Sequence[str]) -> int:
    """Run a command in a group of its own; SIGTERM or the parent's death ends the whole group."""

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    die_with_parent(parent, by=signal.SIGTERM)
    here = os.getpid()
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: die_with_parent(here))
    try:
        status = process.wait()
        return status if status >= 0 else 128 - status
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop(process, grace_sec=_GRACE_SEC / 2)  # sooner than whoever stops us runs out of patience


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), sys.argv[2:]))
