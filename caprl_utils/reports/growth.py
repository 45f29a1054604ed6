"""Figure 5 right: accuracy over the number of training images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from caprl_utils.reports import style

AVERAGE = "average"  # the line in the colour of the model itself, which is CapRL at every point


def plot_growth(
    lines: Mapping[str, Sequence[tuple[int, float, float, float]]], stem: Path, note: str = ""
) -> list[Path]:
    """One line per group of benchmarks with its intervals; writes PNG and SVG.

    lines: group -> (images, accuracy, low, high), shares of 1, in the order of images. note: small line below.
    """
    with style.styled():
        figure, (axes,) = style.new_figure(1)
        looks = style.looks(["CapRL" if name == AVERAGE else name for name in lines])
        for (name, points), look in zip(lines.items(), looks, strict=True):
            images, values, lows, highs = zip(*points, strict=True)
            percent = [[100 * v for v in column] for column in (values, lows, highs)]
            axes.plot(
                images, percent[0], color=look.colour, linestyle=look.line, marker=look.marker, label=name,
                linewidth=look.width, zorder=look.layer,
            )  # fmt: skip
            axes.vlines(images, percent[1], percent[2], color=look.colour, linewidth=1)
        axes.set(
            xlabel="training images; 0: before training; the scale is logarithmic above 0",
            ylabel="accuracy (%), 95 % interval",
        )
        places = sorted({point[0] for points in lines.values() for point in points})
        axes.set_xscale(
            "symlog", linthresh=min((place for place in places if place), default=1), linscale=0.5
        )
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        style.note(figure, note)
        return style.save(figure, stem)
