"""One style for all figures: readable in grey, the same bytes for the same numbers.

A series is told apart by line style and marker as well as by shade. SVG keeps its text as text, carries
no date, and its ids come from a fixed salt.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caprl_utils.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_INCHES = 6.4
DPI = 160


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    colour: str
    line: str
    marker: str


# Dark and light take turns: neighbours differ in grey as well, beside marker and line.
LOOKS = (
    Look("#0b3c6f", "-", "o"),
    Look("#e07b2f", "--", "s"),
    Look("#22663a", "-.", "^"),
    Look("#9a9a9a", ":", "D"),
    Look("#6b2f85", (0, (5, 1)), "v"),
    Look("#c99410", (0, (1, 1)), "P"),
    Look("#1d6a7d", (0, (3, 1, 1, 1)), "X"),
    Look("#d9738a", (0, (7, 2)), "*"),
)

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


def new_figure(num_columns: int = 1, height_inches: float = 2.6, **grid: object) -> tuple["Figure", list]:
    """A figure of the common width with axes side by side; not tied to pyplot, so nothing stays open."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, num_columns, squeeze=False, **grid)
    return figure, list(axes[0])
