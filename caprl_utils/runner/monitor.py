"""What the runner prints while a notebook runs: one line per cell, and a sign of life every ten seconds."""

import json
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from caprl_utils import progress

_BEAT_SEC = 10.0
_TERMINAL_BEAT_SEC = 1.0
_SOURCE_WIDTH = 60


def first_line(source: str) -> str:
    """The first telling line of a cell, shortened."""
    lines = [line.strip() for line in source.splitlines()]
    telling = [line for line in lines if line and not line.startswith("#")] or [
        line for line in lines if line
    ]
    text = telling[0] if telling else "(empty)"
    return text if len(text) <= _SOURCE_WIDTH else text[: _SOURCE_WIDTH - 3] + "..."


def duration(sec: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(sec), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Monitor:
    """Prints to stderr: each code cell as it starts, and how far the stage in it is.

    In a terminal the running line is renewed in place each second; elsewhere (a log file, CI) a plain line
    comes at least every ten seconds.
    """

    def __init__(self, name: str, num_cells: int, progress_file: Path):
        self._name, self._num_cells, self._progress_file = name, num_cells, progress_file
        self._start = time.monotonic()
        self._last_print = 0.0
        self._cell = "starting the kernel"
        self._cell_start = time.time()
        self._terminal = sys.stderr.isatty()
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Monitor":
        self._print(self._cell)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def cell_start(self, number: int, source: str) -> None:
        """Code cell `number` (from 1) is about to run."""
        with self._lock:
            self._cell = f"cell {number}/{self._num_cells} {first_line(source)}"
            self._cell_start = time.time()
        self._print(self._cell)

    def _beat(self) -> None:
        every = _TERMINAL_BEAT_SEC if self._terminal else _BEAT_SEC
        while not self._end.wait(0.5):
            if time.monotonic() - self._last_print >= every:
                self._print(self._running(), renew=True)

    def _running(self) -> str:
        """The running cell, with the state of the stage in it instead of its source when there is one."""
        with self._lock:
            cell, since = self._cell, self._cell_start
        state = self._state()
        if state is None or state["time"] < since:
            return cell
        return f"{' '.join(cell.split()[:2])} {progress.line(state)}"

    def _state(self) -> dict | None:
        try:
            return json.loads(self._progress_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # no stage has written yet

    def _print(self, text: str, renew: bool = False) -> None:
        self._last_print = time.monotonic()
        line = f"{self._name} {duration(self._last_print - self._start):>5}  {text}"
        if self._terminal:
            print(f"\r\033[K{line}", end="" if renew else "\n", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
