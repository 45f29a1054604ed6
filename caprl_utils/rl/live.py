"""A small figure of a running training in a notebook, drawn anew every few seconds from the files that it writes."""

from __future__ import annotations

import base64
import html
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.progress import in_kernel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVERY_SEC = 10.0  # ours: drawing takes 0.3 s of the same cores
SHOWN = 3  # captions of the newest step
PANELS = {  # title -> columns of curve.jsonl
    "reward": ("reward",),
    "caption length (tokens)": ("completion_tokens",),
    "KL (nats a token)": ("kl",),
    "share": ("clipped_share", "zero_variance_share", "repetition"),
}
LABELS = {
    "clipped_share": "cut captions",
    "zero_variance_share": "images of one reward",
    "repetition": "repeated",
}
_STYLES = ("-", "--", ":")


class LiveFigure:
    """Reward, length, KL and signs of trouble so far, and the newest captions; nothing outside of notebooks."""

    def __init__(self, folder: Path, every_sec: float = EVERY_SEC):
        """folder: of the training's run."""
        self.folder, self.every_sec = folder, every_sec
        self._steps, self._last, self._handle = 0, -every_sec, None

    def update(self, now: bool = False) -> None:
        """Draw it when there is something new and enough time has passed. now: do not wait."""
        if not in_kernel() or not (now or time.monotonic() - self._last >= self.every_sec):
            return
        curve = read_rows(self.folder / "curve.jsonl")
        if len(curve) == self._steps:
            return
        self._steps, self._last = len(curve), time.monotonic()
        self._show(page(curve, read_rows(self.folder / "samples.jsonl")))

    def _show(self, text: str) -> None:
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(text), display_id=True)
        else:
            self._handle.update(HTML(text))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a file that is being written; half a line at its end is left out."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError:  # no step yet
        return []
    return [json.loads(line) for line in lines[:-1]]


def draw(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel for each of `PANELS` over the steps so far; what is missing leaves a gap."""
    from matplotlib.figure import Figure

    steps = [row["step"] for row in curve]
    figure = Figure(figsize=(11, 2.1), layout="constrained")
    for axis, (title, columns) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for column, style in zip(columns, _STYLES, strict=False):
            values = [float("nan") if row[column] is None else row[column] for row in curve]
            axis.plot(steps, values, style, color="#0b3c6f", label=LABELS.get(column, column))
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylim(
            bottom=0, top=1.5 * axis.get_ylim()[1] if len(columns) > 1 else None
        )  # room for the legend
        axis.tick_params(labelsize=8)
        if len(columns) > 1:
            axis.legend(frameon=False, fontsize=7, loc="upper left")
    return figure


def page(curve: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> str:
    """The figure and the newest captions with their rewards as HTML."""
    buffer = io.BytesIO()
    draw(curve).savefig(buffer, format="png", dpi=90)
    image = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="the training so far" src="data:image/png;base64,{image}">{captions_table(samples)}'


def captions_table(samples: Sequence[Mapping[str, Any]]) -> str:
    """Some captions of the newest step."""
    newest = [row for row in samples if row["step"] == samples[-1]["step"]][:SHOWN]
    rows = [
        f"<tr><td>{row['step']}</td><td>{html.escape(row['image_id'])}</td><td>{number(row['reward'])}</td>"
        f"<td style='text-align:left'>{html.escape(row['caption'])}</td></tr>"
        for row in newest
    ]
    return (
        f"<table><tr><th>step</th><th>image</th><th>reward</th><th>caption</th></tr>{''.join(rows)}</table>"
    )


def number(reward: float | None) -> str:
    """A reward as printed: a missing one is none, not 0."""
    return "none" if reward is None else f"{reward:.2f}"
