"""All figures, in one style: the same bytes for the same numbers, readable in grey (series differ in line and marker).

A model has one look in all figures; CapRL's line is the strongest. SVG keeps its text as text.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.files import write_atomic
from caprl_utils.pretraining.sets import VANILLA
from caprl_utils.prism.gallery import GREEN, GREY, RED
from caprl_utils.prism.probes import INVENTED, REPEATED, TRUE, WITH_INVENTED, lengths
from caprl_utils.prism.statistics import AVERAGE, Interval
from caprl_utils.prism.told import sentences
from caprl_utils.records import Sample
from caprl_utils.reports import numbers
from caprl_utils.reports.items import GUESSER, about_models, texts
from caprl_utils.reports.results import READERS, Curve, Results, points, title_of
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 6.4
STYLE = Path(__file__).with_name("figures.mplstyle")
ACCURACY = "accuracy (%)"
VERDICT_LOOKS = {  # colour, marker: told apart in grey as well
    "supported": ("#1f6b3a", "o"), "not supported": ("#a5382a", "X"), "undecided": ("#b07d12", "D"),
    "no difference": ("#1d6a7d", "s"), "not testable here": ("#9a9a9a", "."),
}  # fmt: skip
_SIGNS = {"true": ("✓", GREEN), "repeat": ("↺", GREY)}  # of a statement, as on cards; all others are false
SMOOTH_STEPS = 9  # ours: steps averaged by the heavy line around each; the thin line is every step
_NEAR_LIMIT = 0.5  # ours: a caption limit is drawn when a caption of any step comes that near to it
TITLED = {"alignment": "left", "title_fontproperties": {"weight": "bold", "size": 11}, "borderaxespad": 0.2}
_NOTE_SIGNS = 18  # ours: letters on an inch of the note below a figure
_LEGEND_SIGNS = 13.75  # ours: letters on an inch of a legend
_FOREST_INCHES, _FOREST_SIGNS = 9.6, 78  # ours: width of the figure, and letters in a line of its labels
_COLUMNS = 3  # panels of Figure 4 side by side
_ASIDE = 0.02  # how far either line's points of Figure 4 stand from their place, as a share of the axis


@dataclass(frozen=True)
class Look:
    """How one series is drawn. strong: the series that the figure is about. face: of its markers, white for further
    series of a model.
    """

    colour: str
    line: str | tuple
    marker: str
    face: str
    strong: bool

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
        found.append(Look(colour, line, marker, "white" if seen else colour, part == known["strong"]))
    return found


def save(figure: Figure, stem: Path, note: str) -> None:
    """Write <stem>.png and <stem>.svg, atomically and without dates. note: small line below."""
    if note:
        lines = textwrap.fill(note, int(_NOTE_SIGNS * figure.get_figwidth()))
        figure.supxlabel(lines, x=0.995, ha="right", fontsize=7, color="#555555")
    for kind, metadata in {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}.items():
        figure.savefig(buffer := io.BytesIO(), format=kind, metadata=metadata)
        write_atomic(stem.with_name(f"{stem.name}.{kind}"), buffer.getvalue())


@contextmanager
def drawn(
    stem: Path, note: str, title: str, panels: int, columns: int, row_inches: float, width: float = WIDTH_INCHES,
    **grid: Any,
) -> Iterator[list[Axes]]:  # fmt: skip
    """Panels in rows, to be filled in this block; then saved under one legend, in as many columns as its labels leave
    room for. Style and canvas are the figure's own: the caller's settings and pyplot are left alone.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(STYLE, after_reset=True):
        rows = -(-panels // columns)
        FigureCanvasAgg(figure := Figure(figsize=(width, row_inches * rows)))
        places = list(figure.subplots(rows, columns, squeeze=False, **grid).flat)
        for empty in places[panels:]:
            empty.set_axis_off()
        yield places[:panels]
        named: dict[str, Any] = {}
        for axes in places:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(label, handle)
        if named or title:
            fitting = int(_LEGEND_SIGNS * width / (max(map(len, named), default=0) + 5))
            ncols = max(1, min(fitting, len(named)))
            figure.legend(named.values(), named, loc="outside upper left", ncols=ncols, title=title, **TITLED)
        save(figure, stem, note)


def centred_mean(values: Sequence[float], width: int = SMOOTH_STEPS) -> list[float]:
    """Mean of `width` (odd) values around each place; fewer at both ends."""
    half = width // 2
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def about(profile: Profile, *more: str) -> str:
    """The small line below a figure: the profile, whether its models are stand-ins, and more."""
    stand_ins = about_models(profile).get("figures")
    return "; ".join([f"profile {profile.name}{f', {stand_ins}' if stand_ins else ''}", *more])


def counted(results: Results) -> str:
    """`about` a figure of scores: "profile mini, ...; 500 questions about 250 images"."""
    part = results.parts[AVERAGE]
    over = f"{numbers.count(part.num_rows)} questions about {numbers.count(part.num_clusters)} images"
    return about(results.profile, over, "95 % intervals")


def plot_curves(
    curves: Sequence[Curve], stem: Path, limit: int, note: str, false: Sequence[Sequence[float]] = (), title: str = ""
) -> None:  # fmt: skip
    """Reward and caption length over training steps (as Figure 1c). limit: tokens at which the training cuts. false:
    of each curve, false statements a caption at every step, if known.
    """
    shown = {"Reward": [curve.rewards for curve in curves], "Tokens a caption": [curve.lengths for curve in curves]}
    shown |= {"False a caption": false} if false else {}
    note = f"{note}; heavy: centred mean of {SMOOTH_STEPS} steps"
    with drawn(stem, note, title, len(shown), len(shown), 3.0) as panels:
        for axes, (name, series) in zip(panels, shown.items(), strict=True):
            for curve, values, look in zip(curves, series, looks([curve.label for curve in curves]), strict=True):
                axes.plot(curve.steps, values, color=look.colour, alpha=0.25, linewidth=0.8)
                axes.plot(curve.steps, centred_mean(values), label=curve.label, **look.of_line())
            axes.set(title=name, xlabel="training step")
        left, right = panels[:2]
        left.set(ylim=(0, 1.03))  # a full reward stays inside the frame
        if max(max(curve.lengths) for curve in curves) > _NEAR_LIMIT * limit:
            right.axhline(limit, color="#444444", linestyle=":", linewidth=1.2)
            place = {"xycoords": ("axes fraction", "data"), "va": "top", "fontsize": 7}
            right.annotate(f"cut at {limit}", (0.01, 0.98 * limit), **place)
        for axes in panels[1:]:
            axes.set_ylim(bottom=0)


def plot_dots(
    series: Mapping[str, Sequence], benchmarks: Sequence[str], stem: Path, note: str = "", title: str = "",
    settings: Sequence[str] = ("",),
) -> None:  # fmt: skip
    """Accuracy per benchmark (names as printed, the first on top), models side by side: model -> (accuracy, low, high)
    or None on each. A panel for each of `settings`; of several a model is named "<setting>, <model>".
    """
    rows, many = len(benchmarks), len(settings)
    height = 1.2 + rows * (0.11 * len(series) / many + 0.17)
    with drawn(stem, note, title, many, many, height, sharey=True) as panels:
        for axes, setting in zip(panels, settings, strict=True):
            named = {name: parts for name, parts in series.items() if name.startswith(setting)}
            spread, labels = 0.7 / max(1, len(named)), [name.removeprefix(f"{setting}, ") for name in named]
            for number, (label, look, parts) in enumerate(zip(labels, looks(labels), named.values(), strict=True)):
                offset = (number - (len(named) - 1) / 2) * spread
                found = {rows - 1 - place - offset: part for place, part in enumerate(parts) if part}
                for place, (_, low, high) in found.items():
                    axes.plot([100 * low, 100 * high], [place, place], color=look.colour, linewidth=1.2)
                axes.plot(
                    [100 * value for value, _, _ in found.values()], list(found), linestyle="none", color=look.colour,
                    marker=look.marker, markersize=6 if look.strong else 4.5, markerfacecolor=look.face, label=label,
                    clip_on=False,
                )  # fmt: skip
            for place in range(0, rows, 2):
                axes.axhspan(place - 0.5, place + 0.5, color="#f3f3f3", zorder=0)
            axes.set(yticks=range(rows), yticklabels=list(reversed(benchmarks)), xlim=(0, 100), title=setting)
            axes.set(xlabel=ACCURACY, ylim=(-0.5, rows - 0.5))
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)


def plot_forest(
    lines: Mapping[str, Sequence[tuple[str, Sequence[float], str]]], stem: Path, title: str, profile: Profile
) -> None:  # fmt: skip
    """Differences coloured by verdict: unit, a panel each -> (label, (value, low, high), verdict)."""
    room = {label: 1.2 + len(label) // _FOREST_SIGNS for found in lines.values() for label, *_ in found}
    heights = [sum(room[label] for label, *_ in found) + 4 for found in lines.values()] or [4]
    size, note = 0.14 * sum(heights) / len(heights) + 0.3, about(profile, "95 % intervals")
    with drawn(stem, note, title, len(heights), 1, size, _FOREST_INCHES, height_ratios=heights) as panels:
        for axes, (unit, found) in zip(panels, lines.items(), strict=False):
            rooms = [room[label] for label, *_ in found]
            places = [own / 2 - end for own, end in zip(rooms, accumulate(rooms), strict=True)]
            for place, (_, (value, *ends), verdict) in zip(places, found, strict=True):
                colour, marker = VERDICT_LOOKS[verdict]
                axes.plot(ends, [place, place], color=colour, linewidth=1.4)
                axes.plot(value, place, marker, label=verdict, color=colour, markersize=6)
            axes.axvline(0, color="#444444", linewidth=0.8)
            axes.set(ylim=(min(places) - 1, max(places) + 1), xlabel=unit)
            axes.set_yticks(places, [textwrap.fill(label, _FOREST_SIGNS) for label, *_ in found], fontsize=7.5)


def _line(axes: Axes, places: Sequence[float], parts: Sequence[Interval], look: Look, **named: Any) -> None:
    """Accuracies over places, each with its interval."""
    axes.plot(places, [100 * part.value for part in parts], marker=look.marker, **look.of_line(), **named)
    bounds = [[100 * part.low for part in parts], [100 * part.high for part in parts]]
    axes.vlines(places, *bounds, color=look.colour, linewidth=1)


def growth(results: Results) -> dict[str, list[tuple[int, Interval]]]:
    """Line -> (training images, accuracy) in order; the base model stands at 0 images."""
    groups, lines = texts()["groups"], {}
    named = {"average": (), "documents and charts": groups["documents"], "natural images": groups["natural"]}
    for label, found in results.measured.items():
        for name, benchmarks in named.items():
            if not benchmarks or any(b in results.parts for b in benchmarks):
                lines.setdefault(name, []).append((found.trained_on, results.interval(label, *benchmarks)))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def plot_growth(results: Results, stem: Path) -> None:
    """Figure 5 right: accuracy over the number of training images, a line per group of benchmarks."""
    lines = growth(results)
    with drawn(stem, counted(results), results.item.title, 1, 1, 2.6) as (axes,):
        # the average has the colour of the model itself, which is CapRL at every point
        found = looks(["CapRL" if name == "average" else name for name in lines])
        for (name, points), look in zip(lines.items(), found, strict=True):
            _line(axes, *zip(*points, strict=True), look, label=name)
        scale = "training images; 0: before training; the scale is logarithmic above 0"
        places = sorted({images for points in lines.values() for images, _ in points})
        axes.set(xlabel=scale, ylabel=ACCURACY)
        axes.set_xscale("symlog", linthresh=min(filter(None, places), default=1), linscale=0.5)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()


def plot_pareto(found: Mapping[str, tuple[Interval, Interval, float]], stem: Path, note: str, title: str) -> None:
    """Facts told against false statements, with intervals both ways; a marker's area is the length of captions. Grey:
    the rows than which none tells more and errs less. found: as `tables.trade_off` gives it.
    """
    places = {name: (100 * told.value, 100 * false.value) for name, (told, false, _) in found.items()}
    best = [
        (x, y) for x, y in places.values()
        if not any(a >= x and b <= y and (a, b) != (x, y) for a, b in places.values())
    ]  # fmt: skip
    note = f"{note}; area of a marker: tokens a caption; grey: none tells more and errs less"
    with drawn(stem, note, title, 1, 1, 4.4) as (axes,):
        axes.plot(*zip(*sorted(best), strict=True), color="#bbbbbb", linewidth=4, zorder=1, solid_capstyle="round")
        for (name, (told, false, tokens)), look in zip(found.items(), looks([*found]), strict=True):
            x, y = places[name]
            axes.hlines(y, 100 * told.low, 100 * told.high, color=look.colour, linewidth=1)
            axes.vlines(x, 100 * false.low, 100 * false.high, color=look.colour, linewidth=1)
            drawing = {"edgecolors": look.colour, "zorder": 3, "clip_on": False}
            axes.scatter(x, y, 3 * tokens, look.face, marker=look.marker, label=name, **drawing)
        axes.set(xlabel="facts told (%)", ylabel="false statements (%), fewer is better")
        axes.set_ylim(bottom=0)


def plot_example(sample: Sample, rows: Mapping[str, Sequence[Mapping[str, Any]]], profile: Profile, stem: Path) -> None:
    """A picture, what captioners say of it, and which questions a reader answers from that. rows: captioner -> rows of
    its samples.parquet about its first caption of the picture.
    """
    columns = []  # title, and (text, colour) of each line
    for number, (name, some) in enumerate(rows.items(), 1):
        kinds = sentences(some[0]["caption"], sample.meta)
        looked = [(text, *_SIGNS.get(kind, ("✗", RED))) for text, kind in kinds if kind]
        columns.append((f"{number}  {name}", [(f"{sign} {text}", colour) for text, sign, colour in looked]))
    answered = []
    for same in zip(*rows.values(), strict=False):
        question, signs = same[0]["question"].partition("\n")[0], ("✓" if row["score"] == 1 else "✗" for row in same)
        answered.append((f"{' '.join(signs)}  {question}", "#333333"))
    columns.append((f"{' '.join(map(str, range(1, len(rows) + 1)))}  answered from it", answered))
    height, width = max(2.2, 0.21 * max(len(lines) for _, lines in columns) + 0.9), 1 + len(columns)
    note = about(profile, "green: true, red: false, grey: said before")
    with drawn(stem, note, "", width, width, height, _FOREST_INCHES) as panels:
        panels[0].imshow(sample.images[0](), interpolation="antialiased")
        for axes in panels:
            axes.set_axis_off()
        options = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "fontsize": 8.5}
        for axes, (title, lines) in zip(panels[1:], columns, strict=True):
            axes.annotate(title, (0, 1), (0, 0), weight="bold", **options)
            for number, (text, colour) in enumerate(lines, 1):
                axes.annotate(text, (0, 1), (0, -15 * number), color=colour, **options)


def plot_readers(results: Results, stem: Path) -> None:
    """Table 3: accuracy of each reader from true captions, by their length and by what was invented beside it."""
    found = {role: points(results.profile, reader) for role, reader in results.readers.items()}
    filled = [TRUE, *map(REPEATED.format, lengths(results.profile))]
    mixed = {0: TRUE, **{count: WITH_INVENTED.format(count) for count in INVENTED}}
    note = about(results.profile, "average over the benchmarks, 95 % intervals")
    title = "The readers, tested on captions of known truth"
    with drawn(stem, note, title, 2, 2, 2.6, sharey=True) as (left, right):
        for (role, probes), look in zip(found.items(), looks([*found]), strict=True):
            of_length = [probes[name][:2] for name in filled]
            of_mixture = [(count, probes[name][1]) for count, name in mixed.items()]
            for axes, row in ((left, of_length), (right, of_mixture)):
                _line(axes, *zip(*row, strict=True), look, label=READERS[role])
        left.set(title="True facts, repeated", xlabel="tokens of the caption", ylabel=ACCURACY, ylim=(0, 103))
        right.set(title="True facts and invented ones", xlabel="invented statements", xticks=list(mixed))


def plot_sets(results: Results, stem: Path) -> None:
    """Figure 4: a panel per benchmark and the average, a line per caption set, both from the point that they share."""
    pairs = {label: found.trained_on for label, found in results.measured.items()}
    panels, width = [*results.scored, AVERAGE], max(pairs.values())
    (grey,) = looks([VANILLA])
    ticks: list[int] = []  # sets that lost a few captions would write one number over another
    for count in sorted(set(pairs.values()), reverse=True):
        if not ticks or ticks[-1] - count > width / 10:
            ticks.append(count)
    grid = len(panels), _COLUMNS, 2.2
    with drawn(stem, counted(results), results.item.title, *grid, sharey=True) as all_axes:
        for axes, panel in zip(all_axes, panels, strict=True):
            start = results.interval(VANILLA, panel)
            for name, side in zip(results.item.told_pairs, (1, -1), strict=True):
                labels = sorted((label for label in pairs if label.startswith(name)), key=pairs.get)
                parts = [start, *(results.interval(label, panel) for label in labels)]
                sizes = [0, *(pairs[label] + side * _ASIDE * width for label in labels)]
                _line(axes, sizes, parts, looks([name])[0], label=name, markevery=slice(1, None))
            _line(axes, [0], [start], replace(grey, strong=True), label=VANILLA)
            floor = 100 * results.interval(GUESSER.label, panel).value
            axes.axhline(floor, color="#9a9a9a", linewidth=1, linestyle=":", label="most frequent answer")
            axes.set(title=title_of(panel), xticks=ticks)
        for axes in all_axes[::_COLUMNS]:
            axes.set_ylabel(ACCURACY)
        for axes in all_axes[-_COLUMNS:]:
            axes.set_xlabel("caption pairs")
