"""What the runner prints while a notebook runs: one line per cell, and a sign of life every ten seconds."""

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Place:
    """A notebook's place among those of one command. times: executed notebook -> seconds; later: those after it."""

    number: int = 1
    count: int = 1
    times: Mapping[str, float] = field(default_factory=dict)
    later: Sequence[str] = ()

    def head(self) -> str:
        """ "[2/5] ", or nothing for a notebook alone."""
        return f"[{self.number}/{self.count}] " if self.count > 1 else ""

    def left(self, name: str, sec: float) -> str:
        """What is left of all notebooks after `sec` of this one; empty where some time is not known."""
        if self.count == 1 or any(other not in self.times for other in (name, *self.later)):
            return ""
        rest = max(0.0, self.times[name] - sec) + sum(self.times[other] for other in self.later)
        return f" [all: about {max(1, round(rest / 60))} min left]"


@dataclass(frozen=True)
class View:
    """What the monitor shows of a notebook, and the file where its stages tell how far they are."""

    name: str
    place: Place
    progress_file: Path


class Monitor:
    """Prints to stderr: each code cell as it starts, and how far the stage in it is.

    In a terminal the running line is renewed in place each second; elsewhere (a log file, CI) a plain line
    comes at least every ten seconds.
    """

    def __init__(self, view: View, num_cells: int):
        self._view, self._num_cells = view, num_cells
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
            return json.loads(self._view.progress_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # no stage has written yet

    def _print(self, text: str, renew: bool = False) -> None:
        self._last_print = time.monotonic()
        sec = self._last_print - self._start
        view, place = self._view, self._view.place
        line = f"{place.head()}{view.name} {duration(sec):>5}  {text}{place.left(view.name, sec) if renew else ''}"
        if self._terminal:
            print(f"\r\033[K{line}", end="" if renew else "\n", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
