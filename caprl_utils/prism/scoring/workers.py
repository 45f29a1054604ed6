"""Many math-verify comparisons in worker processes, each of which can be killed.

math-verify stops itself with signals, which need a main thread (Q26), and a signal cannot interrupt a
single long operation on big integers. So the comparisons run in a few processes of their own, one
comparison at a time; one that does not answer in time is killed, its comparison gets no verdict and the
process is replaced. Plain subprocesses with lines of JSON instead of `multiprocessing`: a user's script
or notebook needs no `__main__` guard, and nothing is forked from a process that runs torch threads.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from caprl_utils.prism.scoring.caprl import Verdict, reference_verdict
from caprl_utils.processes import python_path

MAX_WORKERS = 4
MIN_PAIRS_FOR_POOL = 1500  # below, starting processes (about 4 s of imports each) costs more than it saves
HARD_LIMIT_SEC = 60.0  # far above math-verify's own limit of 5 s a parse or comparison

Pair = tuple[str, str]


def verdicts(pairs: Sequence[Pair], workers: int | None = None) -> list[Verdict | None]:
    """Verdicts of (answer, gold) pairs in their order; None where a comparison never ended.

    In this process when there are few pairs and this is the main thread, else in worker processes.

    Args:
        workers: number of processes; by default the CPUs this process may use, at most 4. 0 keeps
            everything in this process, which must then be called from the main thread.
    """
    if workers is None:
        few = len(pairs) < MIN_PAIRS_FOR_POOL
        workers = 0 if few and threading.current_thread() is threading.main_thread() else _default_workers()
    if not pairs:
        return []
    if workers == 0:
        return [reference_verdict(*pair) for pair in pairs]
    return _in_processes(pairs, min(workers, MAX_WORKERS, len(pairs)))


def _default_workers() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, MAX_WORKERS))


def _in_processes(pairs: Sequence[Pair], workers: int) -> list[Verdict | None]:
    results: list[Verdict | None] = [None] * len(pairs)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(pairs)):
        waiting.put(index)
    stop = threading.Event()

    def drain() -> None:
        worker: _Worker | None = None
        try:
            while not stop.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                worker = worker or _Worker()
                results[index] = worker.ask(pairs[index])
                if worker.dead:
                    worker = None
        except BaseException:
            stop.set()
            raise
        finally:
            if worker is not None:
                worker.close()

    with ThreadPoolExecutor(workers) as threads:
        for future in [threads.submit(drain) for _ in range(workers)]:
            future.result()
    return results


class _Worker:
    """One process that answers one pair at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": python_path()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "caprl_utils.prism.scoring.worker_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        self._buffer = b""
        self.dead = False

    def ask(self, pair: Pair) -> Verdict | None:
        """The verdict; None if the process had to be killed or died over this pair."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(pair) + "\n").encode())
            line = self._line()
        except BrokenPipeError:
            line = b""
        if not line:
            self._kill()
            return None
        symbolic, text, gold_parsed = json.loads(line)
        return Verdict(symbolic, text, gold_parsed)

    def _line(self) -> bytes:
        output = self._process.stdout
        assert output is not None
        while b"\n" not in self._buffer:
            if not select.select([output], [], [], HARD_LIMIT_SEC)[0]:
                return b""
            if not (chunk := os.read(output.fileno(), 65536)):
                return b""
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _kill(self) -> None:
        self.dead = True
        self._process.kill()
        self.close()

    def close(self) -> None:
        """End of input, which ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
