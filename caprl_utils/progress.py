"""Progress that can be seen everywhere: a bar in a terminal or JupyterLab, and a small file for the runner (`run`).

The runner sets CAPRL_PROGRESS to the file, also for subprocesses, and prints its state.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from caprl_utils.files import write_json

Item = TypeVar("Item")
PROGRESS_ENV = "CAPRL_PROGRESS"
_WRITE_EVERY_SEC = 1.0


class Progress(AbstractContextManager):
    """A counter of work done: `with Progress("train", total=100) as bar: bar.update(1, note="reward 0.53")`."""

    def __init__(self, label: str, total: int | None = None):
        from tqdm.auto import tqdm

        self.label, self.total, self.done, self.note = label, total, 0, ""
        self._start, self._last_write = time.time(), 0.0
        self._file = os.environ.get(PROGRESS_ENV)
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        seen = hasattr(shell, "kernel") or sys.stderr.isatty()  # JupyterLab, papermill, a terminal
        self._bar = tqdm(total=total, desc=label, disable=bool(self._file) or not seen)
        self._write()

    def update(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more items; `note` is shown behind the numbers."""
        self.done += count
        self._bar.update(count)
        if note:
            self.note = note
            self._bar.set_postfix_str(note)
        if time.time() - self._last_write >= _WRITE_EVERY_SEC:
            self._write()

    def _write(self) -> None:
        self._last_write = now = time.time()
        if self._file:
            state = {"label": self.label, "done": self.done, "total": self.total, "note": self.note}
            write_json(Path(self._file), {**state, "sec": round(now - self._start, 1), "time": now})

    def __exit__(self, *_: object) -> None:
        self._write()
        self._bar.close()


class SharedProgress(Progress):
    """One line for works that run side by side, each of which tells how far it is. totals: work -> its steps."""

    def __init__(self, label: str, totals: Mapping[str, int]):
        super().__init__(label, sum(totals.values()))
        self._steps, self._lock = dict.fromkeys(totals, 0), Lock()

    def at(self, name: str, step: int, note: str = "") -> None:
        """A work is at a step; an earlier one than before does not count."""
        with self._lock:
            ahead, self._steps[name] = step - self._steps[name], max(step, self._steps[name])
            if ahead >= 0:
                self.update(ahead, note=f"{name} {note}".strip())


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and show how far we are; `total` is len(items) where that is known."""
    with Progress(label, len(items) if total is None and hasattr(items, "__len__") else total) as progress:
        for item in items:
            yield item
            progress.update()


def read_state(file: Path) -> dict[str, Any]:
    """The JSON in a file; empty where it is missing or was cut off by a full disk."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
