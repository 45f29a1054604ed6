"""Progress that can be seen everywhere: a bar in a terminal or JupyterLab, and a small file for the runner.

The runner sets CAPRL_PROGRESS to a file; `track` and `Progress` then write their state to it at most once a
second, also from subprocesses, and the runner prints it.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from caprl_utils.files import write_json

Item = TypeVar("Item")
PROGRESS_ENV = "CAPRL_PROGRESS"
_WRITE_EVERY_SEC = 1.0


class Progress(AbstractContextManager):
    """A counter of work done, for loops that another library drives (a training callback).

    with Progress("train", total=100) as bar:
        bar.update(1, note="reward 0.53")
    """

    def __init__(self, label: str, total: int | None = None):
        self.label, self.total, self.done, self.note = label, total, 0, ""
        self._start = time.time()
        self._last_write = 0.0
        target = os.environ.get(PROGRESS_ENV)
        self._file = Path(target) if target else None
        self._bar = None if self._file else self._shown_bar()
        self._write(force=True)

    def update(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more items; `note` is shown behind the numbers."""
        self.done += count
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(count)
            if note:
                self._bar.set_postfix_str(note)
        self._write()

    def _shown_bar(self) -> Any:
        from tqdm.auto import tqdm

        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        seen = hasattr(shell, "kernel") or sys.stderr.isatty()  # JupyterLab, papermill, a terminal
        return tqdm(total=self.total, desc=self.label, disable=not seen)

    def _write(self, force: bool = False) -> None:
        now = time.time()
        if self._file is None or not (force or now - self._last_write >= _WRITE_EVERY_SEC):
            return
        self._last_write = now
        state = {"label": self.label, "done": self.done, "total": self.total, "note": self.note}
        write_json(self._file, {**state, "sec": round(now - self._start, 1), "time": now})

    def close(self) -> None:
        """Write the last state and end the bar."""
        self._write(force=True)
        if self._bar is not None:
            self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and show how far we are; `total` is len(items) where that is known."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Progress(label, total) as progress:
        for item in items:
            yield item
            progress.update()


def line(state: dict[str, Any]) -> str:
    """One line for a state that `Progress` wrote: "train 40/100, reward 0.53, about 35 s left"."""
    done, total = state["done"], state["total"]
    parts = [f"{state['label']} {done}/{total}" if total else f"{state['label']} {done}"]
    if state["note"]:
        parts.append(state["note"])
    if total and 0 < done < total:
        parts.append(f"about {state['sec'] / done * (total - done):.0f} s left")
    return ", ".join(parts)
