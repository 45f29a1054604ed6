"""A picture of an assembly: donors on the left, the new model on the right, arrows for what was taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caprl_utils.vlm_init.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"language model": "#0b3c6f", "vision tower": "#4f8f4f", "projector": "#c8641a"}
SMALLEST = 0.14  # of the height, so that a small part can hold its label


def draw(summaries: list[Summary]) -> Figure:
    """One panel per model. Heights grow with the number of parameters, but for a floor that keeps labels readable."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(summaries), 3.4), layout="constrained")
    for axes, summary in zip(figure.subplots(1, len(summaries), squeeze=False)[0], summaries, strict=True):
        _panel(axes, summary)
    return figure


def _panel(axes: Axes, summary: Summary) -> None:
    axes.set(
        xlim=(0, 10),
        ylim=(-0.16, 1.04),
        title=f"{summary.setting['name']}: {summary.parameters:,} parameters",
    )
    axes.axis("off")
    shares = {
        name: max(SMALLEST, part.parameters / summary.parameters) for name, part in summary.parts.items()
    }
    top = 1.0
    for name, part in summary.parts.items():
        height = shares[name] / sum(shares.values())
        fresh = name == "projector"
        _box(axes, 0.1, top, height, part.source, COLOURS[name], filled=False, dashed=fresh)
        _box(axes, 6.1, top, height, f"{name}\n{part.parameters:,}", COLOURS[name], filled=True)
        axes.annotate("", (6.05, top - height / 2), (3.95, top - height / 2), arrowprops={"arrowstyle": "->"})
        words = "drawn" if fresh else f"{part.tensors} tensors"
        axes.text(5, top - height / 2 + 0.02, words, ha="center", va="bottom", fontsize=7)
        top -= height
    left_out = [f"{what}: {number:,}" for what, number in summary.left_out.items()]
    axes.text(
        0.1, -0.05, "left out: " + "; ".join(left_out or ["nothing"]), fontsize=7, color="#666666", va="top"
    )


def _box(
    axes: Axes, x: float, top: float, height: float, label: str, colour: str, filled: bool, dashed=False
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle(
            (x, top - height + 0.012), 3.8, height - 0.024, facecolor=colour if filled else "white",
            edgecolor=colour, linestyle="--" if dashed else "-", linewidth=1.4,
        )
    )  # fmt: skip
    axes.text(x + 1.9, top - height / 2, label.replace("/", "/\n") if len(label) > 26 else label, ha="center",
              va="center", fontsize=7.5, color="white" if filled else "black")  # fmt: skip
