"""All figures, in one style: the same bytes for the same numbers, readable in grey (series differ in line and marker).

A model has one look in all figures; CapRL's line is the strongest. SVG keeps its text as text.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.files import write_atomic
from caprl_utils.pretraining.sets import CAPRL_1M, DENSEFUSION, VANILLA
from caprl_utils.prism.probes import INVENTED, TRUE, lengths, repeated, with_invented
from caprl_utils.prism.statistics import AVERAGE, Interval
from caprl_utils.reports import numbers
from caprl_utils.reports.items import texts
from caprl_utils.reports.readers import TITLES, Point
from caprl_utils.reports.results import Curve, Results, title_of
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 6.4
STYLE = Path(__file__).with_name("figures.mplstyle")
ACCURACY = "accuracy (%), 95 % interval"
SMOOTH_STEPS = 9  # ours: steps averaged by the heavy line around each; the thin line is every step
_NEAR_LIMIT = 0.5  # ours: a caption limit is drawn when a caption of any step comes that near to it
_COLUMNS = 3  # panels of Figure 4 side by side
_ASIDE = 0.02  # how far either line's points of Figure 4 stand from their place, as a share of the axis


@dataclass(frozen=True)
class Look:
    """How one series is drawn. strong: the series that the figure is about."""

    colour: str
    line: str | tuple
    marker: str
    strong: bool = False

    def of_line(self) -> dict[str, Any]:
        """Arguments of matplotlib's plot; the strong line is wider and lies above the others."""
        width, layer = (2.2, 3.0) if self.strong else (1.4, 2.0)
        return {"color": self.colour, "linestyle": self.line, "linewidth": width, "zorder": layer}


def looks(labels: Sequence[str]) -> list[Look]:
    """A look for each series: that of its model, the same in every figure; further series of a model differ in line."""
    known, found = texts()["looks"], []
    spare = cycle(known["others"])
    for label in labels:
        part = next((part for part in known["models"] if part in label.lower()), None)
        colour, line, marker = known["models"][part] if part else next(spare)
        if seen := sum(earlier.colour == colour for earlier in found):
            line = known["again"][(seen - 1) % len(known["again"])]
        line = (line[0], tuple(line[1])) if isinstance(line, list) else line
        found.append(Look(colour, line, marker, strong=part == known["strong"]))
    return found


@contextmanager
def styled() -> Iterator[None]:
    """Draw figures inside this block: the style holds here and leaves the caller's settings alone."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(matplotlib.rc_params_from_file(STYLE, use_default_template=False))
        yield


def save(figure: Figure, stem: Path, note: str = "") -> list[Path]:
    """Write <stem>.png and <stem>.svg, atomically and without dates, inside `styled`. note: small line below."""
    if note:
        figure.supxlabel(note, x=0.995, ha="right", fontsize=7, color="#555555")
    dates = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    for kind, metadata in dates.items():
        figure.savefig(buffer := io.BytesIO(), format=kind, metadata=metadata)
        write_atomic(stem.with_name(f"{stem.name}.{kind}"), buffer.getvalue())
    return [stem.with_name(f"{stem.name}.{kind}") for kind in dates]


def new_grid(num_panels: int, num_columns: int, row_height_inches: float, **grid: Any) -> tuple[Figure, list]:
    """A figure of the common width, not tied to pyplot, with panels in rows; places that stay empty are not drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows = -(-num_panels // num_columns)
    figure = Figure(figsize=(WIDTH_INCHES, row_height_inches * num_rows))
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False, **grid).flat)
    for empty in axes[num_panels:]:
        empty.set_axis_off()
    return figure, axes[:num_panels]


def centred_mean(values: Sequence[float], width: int = SMOOTH_STEPS) -> list[float]:
    """Mean of `width` (odd) values around each place; fewer at both ends."""
    half = width // 2
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def counted(results: Results) -> str:
    """The small line below a figure of scores: "profile mini, 500 questions about 250 images"."""
    part = results.parts[AVERAGE]
    over = f"{numbers.count(part.num_rows)} questions about {numbers.count(part.num_clusters)} images"
    return f"profile {results.profile.name}, {over}"


def plot_curves(
    curves: Sequence[Curve], stem: Path, limit: int | None = None, note: str = "",
    false: Sequence[Sequence[float]] = (),
) -> list[Path]:  # fmt: skip
    """Reward and caption length over training steps (as Figure 1c). limit: tokens at which the training cuts. false:
    of each curve, false statements a caption at every step, if known.
    """
    shown = {"Reward": [curve.rewards for curve in curves], "Tokens a caption": [curve.lengths for curve in curves]}
    shown |= {"False a caption": false} if false else {}
    with styled():
        figure, panels = new_grid(len(shown), len(shown), 2.9)
        for axes, (title, series) in zip(panels, shown.items(), strict=True):
            for curve, values, look in zip(curves, series, looks([curve.label for curve in curves]), strict=True):
                axes.plot(curve.steps, values, color=look.colour, alpha=0.25, linewidth=0.8)
                axes.plot(curve.steps, centred_mean(values), label=curve.label, **look.of_line())
            axes.set(title=title, xlabel="training step")
        left, right = panels[:2]
        left.set(ylim=(0, 1.03))  # a full reward stays inside the frame
        if limit is not None and max(max(curve.lengths) for curve in curves) > _NEAR_LIMIT * limit:
            right.axhline(limit, color="#444444", linestyle=":", linewidth=1.2)
            place = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 7}
            right.annotate(f"cut at {limit}", (0.01, limit), **place)
        for axes in panels[1:]:
            axes.set_ylim(bottom=0)
        if len(curves) > 1:
            figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return save(figure, stem, f"{note}; heavy: centred mean of {SMOOTH_STEPS} steps".removeprefix("; "))


def plot_dots(series: Mapping[str, Sequence], benchmarks: Sequence[str], stem: Path, note: str = "") -> list[Path]:
    """Accuracy per benchmark, one row each, models side by side with their intervals.

    series: model -> (accuracy, low, high) on each of the benchmarks (names as printed), None where there is none.
    """
    with styled():
        rows = len(benchmarks)
        figure, (axes,) = new_grid(1, 1, 1.2 + rows * (0.11 * len(series) + 0.17))
        spread = 0.7 / max(1, len(series))
        for number, (label, look) in enumerate(zip(series, looks(list(series)), strict=True)):
            offset = (number - (len(series) - 1) / 2) * spread
            found = {rows - 1 - place - offset: part for place, part in enumerate(series[label]) if part}
            for place, (_, low, high) in found.items():
                axes.plot([100 * low, 100 * high], [place, place], color=look.colour, linewidth=1.2)
            axes.plot(
                [100 * value for value, _, _ in found.values()], list(found), linestyle="none", marker=look.marker,
                color=look.colour, markersize=6 if look.strong else 4.5, label=label, clip_on=False,
            )  # fmt: skip
        axes.set(yticks=range(rows), yticklabels=list(reversed(benchmarks)), xlim=(0, 100))
        axes.set(xlabel=ACCURACY, ylim=(-0.5, rows - 0.5))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        for place in range(0, rows, 2):
            axes.axhspan(place - 0.5, place + 0.5, color="#f3f3f3", zorder=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1.2, handletextpad=0.2)
        return save(figure, stem, note)


def growth(results: Results) -> dict[str, list[tuple[int, float, float, float]]]:
    """Line -> (training images, accuracy, low, high) in order; the base model stands at 0 images."""
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    groups = texts()["groups"]
    named = {"average": (), "documents and charts": groups["documents"], "natural images": groups["natural"]}
    for label, found in results.measured.items():
        images = next((record["n"] for record in found.trainings.values()), 0)
        for name, benchmarks in named.items():
            if not benchmarks or any(b in results.parts for b in benchmarks):
                part = results.interval(label, *benchmarks)
                lines.setdefault(name, []).append((images, part.value, part.low, part.high))
    return {name: sorted(points) for name, points in lines.items()}


def plot_growth(results: Results, stem: Path) -> list[Path]:
    """Figure 5 right: accuracy over the number of training images, a line per group of benchmarks."""
    lines = growth(results)
    with styled():
        figure, (axes,) = new_grid(1, 1, 2.6)
        # the average has the colour of the model itself, which is CapRL at every point
        found = looks(["CapRL" if name == "average" else name for name in lines])
        for (name, points), look in zip(lines.items(), found, strict=True):
            images, values, lows, highs = zip(*points, strict=True)
            percent = [[100 * v for v in column] for column in (values, lows, highs)]
            axes.plot(images, percent[0], marker=look.marker, label=name, **look.of_line())
            axes.vlines(images, percent[1], percent[2], color=look.colour, linewidth=1)
        scale = "training images; 0: before training; the scale is logarithmic above 0"
        axes.set(xlabel=scale, ylabel=ACCURACY)
        places = sorted({point[0] for points in lines.values() for point in points})
        least = min((place for place in places if place), default=1)
        axes.set_xscale("symlog", linthresh=least, linscale=0.5)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return save(figure, stem, counted(results))


def plot_readers(found: Mapping[str, Mapping[str, Point]], profile: Profile, stem: Path) -> list[Path]:
    """Table 3: accuracy of each reader from true captions, by their length and by what was invented beside the truth.

    found: role -> probe -> what came out (`readers.points`).
    """
    filled = [TRUE, *map(repeated, lengths(profile))]
    mixed = {0: TRUE, **{count: with_invented(count) for count in INVENTED}}
    with styled():
        figure, (left, right) = new_grid(2, 2, 2.6, sharey=True)
        for (role, probes), look in zip(found.items(), looks([*found]), strict=True):
            of_length = [(probes[name].tokens, probes[name].whole) for name in filled]
            for axes, row in ((left, of_length), (right, [(n, probes[name].whole) for n, name in mixed.items()])):
                places, parts = zip(*row, strict=True)
                line = {"marker": look.marker, "label": TITLES[role], **look.of_line()}
                axes.plot(places, [100 * part.value for part in parts], **line)
                axes.vlines(places, *_bounds(parts), color=look.colour, linewidth=1)
        left.set(title="True facts, repeated", xlabel="tokens of the caption", ylabel=ACCURACY, ylim=(0, 103))
        right.set(title="True facts and invented ones", xlabel="invented statements", xticks=list(mixed))
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return save(figure, stem, f"profile {profile.name}; average over the benchmarks")


def plot_sets(results: Results, pairs: Mapping[str, int], stem: Path) -> list[Path]:
    """Figure 4: a panel per benchmark and the average, a line per caption set. pairs: row -> its caption pairs."""
    panels = [*results.scored, AVERAGE]
    with styled():
        figure, all_axes = new_grid(len(panels), _COLUMNS, 2.2, sharey=True)
        for axes, panel in zip(all_axes, panels, strict=True):
            _panel(axes, results, pairs, panel)
        for axes in all_axes[::_COLUMNS]:
            axes.set_ylabel(ACCURACY)
        for axes in all_axes[-_COLUMNS:]:
            axes.set_xlabel("caption pairs")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return save(figure, stem, counted(results))


def _panel(axes: Axes, results: Results, pairs: Mapping[str, int], panel: str) -> None:
    """Both lines of one benchmark, from the point that they share."""
    width = max(pairs.values())
    (grey,) = looks([VANILLA])
    start = results.interval(VANILLA, panel)
    for base, side in ((DENSEFUSION, -1), (CAPRL_1M, 1)):
        (look,) = looks([base.name])
        labels = sorted((label for label in pairs if label.startswith(base.name)), key=pairs.get)
        parts = [results.interval(label, panel) for label in labels]
        sizes = [pairs[label] + side * _ASIDE * width for label in labels]
        values = [100 * part.value for part in (start, *parts)]
        line = {"marker": look.marker, "markevery": slice(1, None), "label": base.name, **look.of_line()}
        axes.plot([0, *sizes], values, **line)
        axes.vlines(sizes, *_bounds(parts), color=look.colour, linewidth=1)
    point = {"marker": grey.marker, "color": grey.colour, "zorder": 4}
    axes.plot([0], [100 * start.value], linestyle="none", label=VANILLA, **point)
    axes.vlines([0], *_bounds([start]), color=grey.colour, linewidth=1)
    ticks: list[int] = []  # sets that lost a few captions would write one number over another
    for count in sorted(set(pairs.values()), reverse=True):
        if not ticks or ticks[-1] - count > width / 10:
            ticks.append(count)
    axes.set(title=title_of(panel), xticks=ticks)


def _bounds(parts: Sequence[Interval]) -> tuple[list[float], list[float]]:
    return [100 * part.low for part in parts], [100 * part.high for part in parts]
