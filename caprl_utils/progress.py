"""Progress that can be seen everywhere: a bar in a terminal or JupyterLab, and a small file for the runner.

The runner sets CAPRL_PROGRESS to a file, also for subprocesses, and prints its state with the time left (`Times`).
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from caprl_utils import paths
from caprl_utils.files import write_json

Item = TypeVar("Item")
PROGRESS_ENV = "CAPRL_PROGRESS"
REPORTED = paths.REPORTS / "bench" / "times.json"  # seconds of each notebook behind the published reports
_WRITE_EVERY_SEC = 1.0
_STEADY_SEC = 15.0  # ours: the first items of a stage take longer; what is left is told after these seconds


class Progress(AbstractContextManager):
    """A counter of work done, for loops that another library drives (a training callback).

    with Progress("train", total=100) as bar:
        bar.update(1, note="reward 0.53")
    """

    def __init__(self, label: str, total: int | None = None):
        self.label, self.total, self.done, self.note = label, total, 0, ""
        self._start, self._last_write = time.time(), 0.0
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
    total = len(items) if total is None and hasattr(items, "__len__") else total
    with Progress(label, total) as progress:
        for item in items:
            yield item
            progress.update()


def stage_left(state: Mapping[str, Any]) -> float | None:
    """Seconds that a stage will still take by its own pace; None while nothing can be said."""
    done, total = state["done"], state["total"]
    return state["sec"] / done * (total - done) if total and 0 < done < total else None


def line(state: Mapping[str, Any]) -> str:
    """One line for a state that `Progress` wrote: "train 40/100, reward 0.53, about 35 s left"."""
    parts = [f"{state['label']} {state['done']}" + (f"/{state['total']}" if state["total"] else "")]
    if state["note"]:
        parts.append(state["note"])
    if (left := stage_left(state)) is not None:
        parts.append(f"about {left:.0f} s left")
    return ", ".join(parts)


def duration(sec: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    return str(timedelta(seconds=int(sec))).removeprefix("0:").removeprefix("0")


def read_state(file: Path, default: Any) -> Any:
    """The JSON in a file, or `default` where it is missing or was cut off by a full disk."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


@dataclass(frozen=True)
class Times:
    """Executed notebook -> seconds from nothing: as published, and as measured on this machine."""

    reported: Mapping[str, float]
    measured: Mapping[str, float]

    @classmethod
    def of(cls, profile: str) -> "Times":
        """Those of a profile."""
        return cls(read_state(REPORTED, {}).get(profile, {}), read_state(_times_file(profile), {}))

    @property
    def known(self) -> dict[str, float]:
        """What is known of each notebook, best what was measured here."""
        return {**self.reported, **self.measured}

    def left(self, chain: Sequence[str], name: str, sec: float, state: Mapping[str, Any] | None = None) -> float | None:
        """Seconds left of a chain after `sec` of the notebook `name`, whose stage has that state; None: not known.

        The running notebook takes at least as long as its stage still says; times from elsewhere are scaled by how
        much slower this machine was so far.
        """
        later = chain[chain.index(name) + 1 :] if name in chain else []
        if any(other not in self.known for other in (name, *later)):
            return None
        both = (self.measured.keys() & self.reported.keys()) - {name}
        pairs = [(self.measured[other], self.reported[other]) for other in both]
        of_stage = stage_left(state) if state and state["sec"] >= _STEADY_SEC else None
        rest = max(of_stage or 0.0, self._expected(name, pairs) - sec, 0.0)
        if name in self.reported and sec + rest > self._expected(name, pairs):
            pairs.append((sec + rest, self.reported[name]))
        return rest + sum(self._expected(other, pairs) for other in later)

    def _expected(self, name: str, pairs: Sequence[tuple[float, float]]) -> float:
        here, there = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (1.0, 1.0)
        return self.measured[name] if name in self.measured else self.reported[name] * here / there


def note_time(profile: str, name: str, sec: float) -> None:
    """Keep the longest time of a notebook on this machine: a shorter one found some of its results made."""
    known = read_state(_times_file(profile), {})
    write_json(_times_file(profile), known | {name: max(round(sec, 1), known.get(name, 0.0))})


def _times_file(profile: str) -> Path:
    return paths.RUNS / profile / "notebooks" / "times.json"
