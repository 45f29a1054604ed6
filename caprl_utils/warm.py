"""Trainings as forks of one process that has imported everything, so that a start costs no 12 seconds of a core.

    process = popen(python, imports, "caprl_utils.rl.train:run", ["--seed", "0"], log, env)

For CPUs, where trainings take a minute and two tables need a hundred: a process that has spoken to a GPU must not fork.
``python -m caprl_utils.warm IMPORT...`` is the server. It reads a request a line and answers with the process id of the
fork, and with its status when it ends. It ends with whoever started it, and the forks with it.
"""

import json
import os
import pkgutil
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_utils.files import full_disk_as_user_error
from caprl_utils.processes import die_with_parent

_POLL_SEC = 0.05
_servers: dict[tuple, "_Server"] = {}
_starting = threading.Lock()


class Forked:
    """A fork, to be watched and stopped like a `subprocess.Popen`."""

    def __init__(self, server: "_Server", pid: int):
        self._server, self.pid, self.returncode = server, pid, None

    def poll(self) -> int | None:
        """Its exit status once it has ended."""
        if self.returncode is None:
            self.returncode = self._server.status(self.pid)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(_POLL_SEC)
        return self.returncode


def popen(
    python: str, imports: Sequence[str], run: str, words: Sequence[str], log: Path, env: Mapping[str, str],
    own: Mapping[str, str] | None = None,
) -> Forked:  # fmt: skip
    """Start a fork of a server of `python` that calls `run` ("module:function") with `words` as its command line, in a
    process group of its own, with stdout and stderr in `log`. imports: what the server imports first, or calls. env:
    variables on top of ours, of server and fork; own: of the fork alone, too late for what is read by an import.
    """
    variables = {**os.environ, **env}
    key = (python, *imports, *sorted(variables.items()))
    with full_disk_as_user_error(log), _starting:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        if key not in _servers or not _servers[key].alive():
            _servers.clear()  # one of another environment ends with its last fork
            _servers[key] = _Server([python, "-m", __name__, *imports], variables, log)
        server = _servers[key]
    request = {"run": run, "words": [*words], "log": str(log.absolute()), "env": {**variables, **(own or {})}}
    return server.fork(request)


class _Server:
    """What this process knows of a server. log: where it says why it cannot import."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        with open(log, "ab") as output:
            self._process = subprocess.Popen(command, env=env, stderr=output, start_new_session=True, **pipes)
        self._lock, self._statuses, self.ended = threading.Lock(), {}, False

    def alive(self) -> bool:
        return not self.ended and self._process.poll() is None

    def fork(self, request: dict[str, Any]) -> Forked:
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
            except BrokenPipeError:
                self.ended = True
            while not self.ended:
                if (pid := self._read().get("started")) is not None:
                    return Forked(self, pid)
        failed = Forked(self, self._process.pid)
        failed.returncode = self._process.wait() or 1
        return failed

    def status(self, pid: int) -> int | None:
        """The exit status of a fork, None while it runs; SIGKILL's where the server was killed, and it with it."""
        with self._lock:
            while not self.ended and select.select([self._process.stdout], [], [], 0)[0]:
                self._read()
            return self._statuses.pop(pid, -signal.SIGKILL if self.ended else None)

    def _read(self) -> dict[str, int]:
        line = self._process.stdout.readline()
        self.ended = not line
        answer = json.loads(line or b"{}")
        if "ended" in answer:
            self._statuses[answer["ended"]] = answer["status"]
        return answer


def _serve(imports: Sequence[str]) -> dict[str, Any] | None:
    """In each fork its request; in the server None, once nobody can ask any more."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what imports print
    for name in imports:
        if callable(found := pkgutil.resolve_name(name)):
            found()
    server, forks = os.getpid(), {}

    def answer(**values: int) -> None:
        answers.write(json.dumps(values).encode() + b"\n")

    while True:
        for ready in select.select([0, *forks], [], [])[0]:
            if ready in forks:
                status = os.waitstatus_to_exitcode(os.waitpid(forks[ready], 0)[1])
                answer(ended=forks.pop(ready), status=status)
                os.close(ready)
            elif not (line := sys.stdin.buffer.readline()):
                return None
            elif pid := os.fork():
                forks[os.pidfd_open(pid)] = pid
                answer(started=pid)
            else:
                answers.close()
                for other in forks:
                    os.close(other)
                return _begin(json.loads(line), server)


def _begin(request: dict[str, Any], server: int) -> dict[str, Any]:
    """In a fork: its own group, variables, input and output."""
    die_with_parent(server)
    os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(number, place)
    return request


if __name__ == "__main__" and (asked := _serve(sys.argv[1:])):
    sys.argv[1:] = asked["words"]
    pkgutil.resolve_name(asked["run"])()
