"""The picture of the pipeline that README shows.

python -m caprl_utils.reports.pipeline_picture        writes reports/pipeline.png and .svg
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caprl_utils import paths
from caprl_utils.reports import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "pipeline"
_HEIGHT = 2.7  # inches
_FILL, _EDGE, _ARROW = "#eef3f8", "#0b3c6f", "#e07b2f"


@dataclass(frozen=True)
class Box:
    """A step: centre and size in a field of 100 x 45."""

    x: float
    y: float
    width: float
    title: str
    text: str
    height: float = 12.0


BOXES = {
    "questions": Box(15, 36, 28, "01  Questions",
                     "a large VLM writes them, a small\none filters: image needed, no leaks"),
    "caption": Box(50, 36, 24, "03  Caption", "the policy describes\nthe image, G times"),
    "reader": Box(85, 36, 28, "03  Reward", "a reader that sees only the caption\nanswers: share right = reward"),
    "prism": Box(85, 11, 28, "05  Prism", "how well can a reader answer\nfrom the captions? Tables 3 to 6"),
    "pretrain": Box(15, 11, 28, "02, 04  Pretraining",
                    "new VLMs learn from the captions,\nthen answer. Tables 1, 2, Figure 4"),
    "captions": Box(50, 11, 24, "Captions", "of the trained policy, and\nof those it is compared with"),
}  # fmt: skip
ARROWS = (  # from, to, label
    ("questions", "caption", ""), ("caption", "reader", ""), ("caption", "captions", "after training"),
    ("captions", "prism", ""), ("captions", "pretrain", ""),
)  # fmt: skip


def draw(stem: Path) -> list[Path]:
    """Write <stem>.png and .svg; returns them."""
    with style.styled():
        figure, (axes,) = style.new_figure(height_inches=_HEIGHT)
        axes.set(xlim=(0, 100), ylim=(0, 45))
        axes.axis("off")
        for box in BOXES.values():
            _box(axes, box)
        for start, end, label in ARROWS:
            _arrow(axes, BOXES[start], BOXES[end], label)
        _feedback(axes)
        return style.save(figure, stem)


def _box(axes: Axes, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (box.x - box.width / 2, box.y - box.height / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner, box.width, box.height, boxstyle="round,pad=0.4,rounding_size=1", fc=_FILL, ec=_EDGE
        )
    )
    axes.text(box.x, box.y + 3.2, box.title, ha="center", va="center", weight="bold", fontsize=8)
    axes.text(box.x, box.y - 1.9, box.text, ha="center", va="center", fontsize=6.2, linespacing=1.4)


def _arrow(axes: Axes, start: Box, end: Box, label: str) -> None:
    """From side to side where they stand beside each other, else straight down."""
    if start.y == end.y:
        right = 1 if end.x > start.x else -1
        points = (
            (start.x + right * (start.width / 2 + 0.8), start.y),
            (end.x - right * (end.width / 2 + 0.8), end.y),
        )
    else:
        points = (start.x, start.y - start.height / 2 - 0.8), (end.x, end.y + end.height / 2 + 0.8)
    axes.annotate(
        "", points[1], points[0], arrowprops={"arrowstyle": "-|>", "color": _EDGE, "linewidth": 1.2}
    )
    if label:
        axes.text(
            start.x - 1, (points[0][1] + points[1][1]) / 2, label, ha="right", va="center", fontsize=6.2
        )


def _feedback(axes: Axes) -> None:
    """The reward goes back to the policy (GRPO)."""
    caption, reader = BOXES["caption"], BOXES["reader"]
    bottom = caption.y - caption.height / 2 - 0.8
    axes.annotate(
        "", (caption.x + 8, bottom), (reader.x, bottom),
        arrowprops={"arrowstyle": "-|>", "color": _ARROW, "linewidth": 1.2,
                    "connectionstyle": "bar,fraction=-0.12"},
    )  # fmt: skip
    axes.text((caption.x + 8 + reader.x) / 2, bottom - 5.6, "GRPO: captions above the group's mean become likelier",
              ha="center", va="center", fontsize=6.2)  # fmt: skip


if __name__ == "__main__":
    for written in draw(paths.REPORTS / NAME):
        print(paths.shown(written))
    sys.exit(0)
