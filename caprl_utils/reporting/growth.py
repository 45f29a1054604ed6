"""Figure 5 right: accuracy over the number of training images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from caprl_utils.reporting import style


def plot_growth(lines: Mapping[str, Sequence[tuple[int, float, float, float]]], stem: Path) -> list[Path]:
    """One line per group of benchmarks with its intervals; writes PNG and SVG.

    lines: group -> (images, accuracy, low, high), shares of 1, in the order of images.
    """
    with style.styled():
        figure, (axes,) = style.new_figure(1)
        for (name, points), look in zip(lines.items(), style.LOOKS, strict=False):
            images, values, lows, highs = zip(*points, strict=True)
            percent = [[100 * v for v in column] for column in (values, lows, highs)]
            axes.plot(
                images, percent[0], color=look.colour, linestyle=look.line, marker=look.marker, label=name
            )
            axes.vlines(images, percent[1], percent[2], color=look.colour, linewidth=1)
        axes.set(xlabel="training images (0: before training)", ylabel="accuracy (%), 95 % interval")
        axes.set_xscale("symlog", linthresh=10)
        places = sorted({point[0] for points in lines.values() for point in points})
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return style.save(figure, stem)
