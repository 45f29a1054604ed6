"""One style for all figures: readable in grey, the same bytes for the same numbers.

A model has one colour, line and marker in all figures; CapRL's line is the strongest. A series is told apart by line
style and marker as well as by shade. SVG keeps its text as text, carries
no date, and its ids come from a fixed salt.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from caprl_utils.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_INCHES = 6.4
DPI = 160


@dataclass(frozen=True)
class Look:
    """How one series is drawn. strong: the series that the figure is about."""

    colour: str
    line: str | tuple
    marker: str
    strong: bool = False

    @property
    def width(self) -> float:
        """Of its line, in points."""
        return 2.2 if self.strong else 1.4

    @property
    def layer(self) -> float:
        """matplotlib's zorder: the strong one lies above the others."""
        return 3.0 if self.strong else 2.0


# Part of a label, in any case -> its look, the first that fits. A judge's label names the model that it trained too.
MODELS = (
    ("unified", Look("#e0a030", "--", "s")),
    ("vlm as judge", Look("#6b2f85", (0, (5, 1)), "v")),
    ("vl-as-judge", Look("#6b2f85", (0, (5, 1)), "v")),
    ("judge_vlm", Look("#6b2f85", (0, (5, 1)), "v")),
    ("caprl", Look("#b5121b", "-", "o", strong=True)),
    ("densefusion", Look("#22663a", "--", "^")),
    ("sharegpt4v", Look("#b07d12", "-.", "P")),
    ("vanilla", Look("#808080", ":", "D")),
    ("72b", Look("#0b3c6f", "-.", "X")),
    ("7b", Look("#7fb0d8", (0, (3, 1, 1, 1)), "^")),
    ("3b", Look("#808080", ":", "D")),
)
# For series that are no model of the paper. Dark and light take turns: neighbours differ in grey as well.
OTHERS = (
    Look("#1d6a7d", "--", "s"),
    Look("#9aa83a", "-.", "v"),
    Look("#5a4a3f", (0, (1, 1)), "P"),
    Look("#d9738a", (0, (7, 2)), "*"),
)
_AGAIN = ("--", ":", "-.")  # lines of a model's second, third and fourth series in one figure


def looks(labels: Sequence[str]) -> list[Look]:
    """A look for each series: that of its model, the same in every figure; further series of a model differ in line."""
    found: list[Look] = []
    spare = cycle(OTHERS)
    for label in labels:
        look = next((look for part, look in MODELS if part in label.lower()), None) or next(spare)
        seen = sum(earlier.colour == look.colour for earlier in found)
        found.append(replace(look, line=_AGAIN[(seen - 1) % len(_AGAIN)]) if seen else look)
    return found


_SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "caprl",
    "savefig.dpi": DPI,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw figures inside this block: the style holds here and leaves the caller's settings alone."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def save(figure: "Figure", stem: Path) -> list[Path]:
    """Write <stem>.png and <stem>.svg, atomically and without dates. Call inside `styled`."""
    written = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        target = stem.with_name(f"{stem.name}.{kind}")
        write_atomic(target, buffer.getvalue())
        written.append(target)
    return written


def note(figure: "Figure", text: str) -> None:
    """One small line below the figure: which profile, and how many questions, images or captions."""
    if text:
        figure.supxlabel(text, x=0.995, ha="right", fontsize=7, color="#555555")


def new_figure(num_columns: int = 1, height_inches: float = 2.6, **grid: object) -> tuple["Figure", list]:
    """A figure of the common width with axes side by side; not tied to pyplot, so nothing stays open."""
    return new_grid(num_columns, num_columns, height_inches, **grid)


def new_grid(
    num_panels: int, num_columns: int, row_height_inches: float = 2.2, **grid: object
) -> tuple["Figure", list]:
    """A figure of the common width with its panels in rows; places that stay empty are not drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows = -(-num_panels // num_columns)
    figure = Figure(figsize=(WIDTH_INCHES, row_height_inches * num_rows))
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False, **grid).flat)
    for empty in axes[num_panels:]:
        empty.set_axis_off()
    return figure, axes[:num_panels]
