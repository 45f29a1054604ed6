"""All figures, in one style: the same bytes for the same numbers, readable in grey (series differ in line and marker).

A model has one look in all figures; CapRL's line is the strongest. SVG keeps its text as text.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.files import write_atomic
from caprl_utils.pretraining.sets import VANILLA
from caprl_utils.prism.gallery import GREEN, GREY, RED
from caprl_utils.prism.probes import INVENTED, REPEATED, TRUE, WITH_INVENTED, lengths
from caprl_utils.prism.statistics import AVERAGE, Interval
from caprl_utils.reports import numbers
from caprl_utils.reports.items import GUESSER, about_models, texts
from caprl_utils.reports.results import READERS, Curve, Results, points, title_of
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

WIDTH_INCHES = 6.4
STYLE = Path(__file__).with_name("figures.mplstyle")
ACCURACY = "accuracy (%)"
VERDICT_LOOKS = {  # colour, marker: told apart in grey as well
    "supported": ("#1f6b3a", "o"), "not supported": ("#a5382a", "X"), "undecided": ("#b07d12", "D"),
    "no difference": ("#1d6a7d", "s"), "not testable here": ("#9a9a9a", "."),
}  # fmt: skip
EXAMPLE_LOOKS = {"true": ("✓", GREEN), "false": ("✗", RED), "repeat": ("↺", GREY)}  # of a statement, as on cards
SMOOTH_STEPS = 9  # ours: steps averaged by the heavy line around each; the thin line is every step
_NEAR_LIMIT = 0.5  # ours: a caption limit is drawn when a caption of any step comes that near to it
TITLED = {"alignment": "left", "title_fontproperties": {"weight": "bold", "size": 11}, "borderaxespad": 0.2}
_NOTE_SIGNS = 18  # ours: letters on an inch of the note below a figure
_LEGEND_SIGNS = 88  # ours: letters of a legend that fit beside each other
_FOREST_INCHES, _FOREST_SIGNS = 9.6, 78  # ours: width of the figure, and letters in a line of its labels
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


def styled() -> AbstractContextManager:
    """Draw figures inside this block: the style holds here and leaves the caller's settings alone."""
    from matplotlib import style

    return style.context(STYLE, after_reset=True)


def save(figure: Figure, stem: Path, note: str = "") -> list[Path]:
    """Write <stem>.png and <stem>.svg, atomically and without dates, inside `styled`. note: small line below."""
    if note:
        lines = textwrap.fill(note, int(_NOTE_SIGNS * figure.get_figwidth()))
        figure.supxlabel(lines, x=0.995, ha="right", fontsize=7, color="#555555")
    dates = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in dates]
    for file, (kind, metadata) in zip(files, dates.items(), strict=True):
        figure.savefig(buffer := io.BytesIO(), format=kind, metadata=metadata)
        write_atomic(file, buffer.getvalue())
    return files


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


def about(profile: Profile, *more: str) -> str:
    """The small line below a figure: the profile, whether its models are stand-ins, and more."""
    stand_ins = about_models(profile).get("figures")
    return "; ".join([f"profile {profile.name}{f', {stand_ins}' if stand_ins else ''}", *more])


def counted(results: Results) -> str:
    """`about` a figure of scores: "profile mini, ...; 500 questions about 250 images"."""
    part = results.parts[AVERAGE]
    over = f"{numbers.count(part.num_rows)} questions about {numbers.count(part.num_clusters)} images"
    return about(results.profile, over, "95 % intervals")


def _finish(figure: Figure, axes: Axes, title: str, stem: Path, note: str) -> list[Path]:
    """Save with one legend above all panels, under the title, in as many columns as its labels leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(int(_LEGEND_SIGNS / (max(map(len, labels)) + 5)), len(labels)))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, title=title, **TITLED)
    return save(figure, stem, note)


def plot_curves(
    curves: Sequence[Curve], stem: Path, limit: int, note: str, false: Sequence[Sequence[float]] = (), title: str = ""
) -> list[Path]:  # fmt: skip
    """Reward and caption length over training steps (as Figure 1c). limit: tokens at which the training cuts. false:
    of each curve, false statements a caption at every step, if known.
    """
    shown = {"Reward": [curve.rewards for curve in curves], "Tokens a caption": [curve.lengths for curve in curves]}
    shown |= {"False a caption": false} if false else {}
    with styled():
        figure, panels = new_grid(len(shown), len(shown), 3.0)
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
        return _finish(figure, left, title, stem, f"{note}; heavy: centred mean of {SMOOTH_STEPS} steps")


def plot_dots(
    series: Mapping[str, Sequence], benchmarks: Sequence[str], stem: Path, note: str = "", title: str = "",
    settings: Sequence[str] = ("",),
) -> list[Path]:  # fmt: skip
    """Accuracy per benchmark (names as printed), models side by side: model -> (accuracy, low, high) or None on each. A
    panel for each of `settings`; of several a model is named "<setting>, <model>".
    """
    with styled():
        rows, most = len(benchmarks), len(series) / len(settings)
        figure, panels = new_grid(len(settings), len(settings), 1.2 + rows * (0.11 * most + 0.17), sharey=True)
        for axes, setting in zip(panels, settings, strict=True):
            named = {name: parts for name, parts in series.items() if name.startswith(setting)}
            _dots(axes, {name.removeprefix(f"{setting}, "): parts for name, parts in named.items()}, rows)
            axes.set(yticks=range(rows), yticklabels=list(reversed(benchmarks)), xlim=(0, 100), title=setting)
            axes.set(xlabel=ACCURACY, ylim=(-0.5, rows - 0.5))
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
        return _finish(figure, panels[0], title, stem, note)


def _dots(axes: Axes, series: Mapping[str, Sequence], rows: int) -> None:
    """A panel of `plot_dots`: the first benchmark on top, every second on grey; a model's further series are hollow."""
    spread, filled = 0.7 / max(1, len(series)), set()
    for number, (label, look) in enumerate(zip(series, looks(list(series)), strict=True)):
        offset = (number - (len(series) - 1) / 2) * spread
        found = {rows - 1 - place - offset: part for place, part in enumerate(series[label]) if part}
        for place, (_, low, high) in found.items():
            axes.plot([100 * low, 100 * high], [place, place], color=look.colour, linewidth=1.2)
        axes.plot(
            [100 * value for value, _, _ in found.values()], list(found), linestyle="none", marker=look.marker,
            color=look.colour, markersize=6 if look.strong else 4.5, label=label, clip_on=False,
            markerfacecolor="white" if look.colour in filled else look.colour,
        )  # fmt: skip
        filled.add(look.colour)
    for place in range(0, rows, 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#f3f3f3", zorder=0)


def plot_forest(
    lines: Mapping[str, Sequence[tuple[str, Sequence[float], str]]], stem: Path, title: str, profile: Profile
) -> list[Path]:  # fmt: skip
    """Differences coloured by verdict: unit, a panel each -> (label, (value, low, high), verdict)."""
    room = {label: 1.2 + len(label) // _FOREST_SIGNS for found in lines.values() for label, *_ in found}
    heights = [sum(room[label] for label, *_ in found) + 4 for found in lines.values()] or [4]
    with styled():
        figure, panels = new_grid(len(heights), 1, 0.14 * sum(heights) / len(heights) + 0.3, height_ratios=heights)
        figure.set_figwidth(_FOREST_INCHES)
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
        named = {line.get_label(): line for axes in panels for line in axes.lines if line.get_label() in VERDICT_LOOKS}
        columns = len(VERDICT_LOOKS)
        figure.legend(named.values(), named, loc="outside upper left", ncols=columns, title=title, **TITLED)
        return save(figure, stem, about(profile, "95 % intervals"))


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


def plot_growth(results: Results, stem: Path) -> list[Path]:
    """Figure 5 right: accuracy over the number of training images, a line per group of benchmarks."""
    lines = growth(results)
    with styled():
        figure, (axes,) = new_grid(1, 1, 2.6)
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
        return _finish(figure, axes, results.item.title, stem, counted(results))


def plot_pareto(
    found: Mapping[str, tuple[Interval, Interval, float]], stem: Path, note: str, title: str
) -> list[Path]:  # fmt: skip
    """Facts told against false statements, with intervals both ways; a marker's area is the length of captions. Grey:
    the rows than which none tells more and errs less. found: as `tables.trade_off` gives it.
    """
    places = {name: (100 * told.value, 100 * false.value) for name, (told, false, _) in found.items()}
    best = [
        (x, y) for x, y in places.values()
        if not any(a >= x and b <= y and (a, b) != (x, y) for a, b in places.values())
    ]  # fmt: skip
    with styled():
        figure, (axes,) = new_grid(1, 1, 4.4)
        axes.plot(*zip(*sorted(best), strict=True), color="#bbbbbb", linewidth=4, zorder=1, solid_capstyle="round")
        filled = set()
        for (name, (told, false, tokens)), look in zip(found.items(), looks([*found]), strict=True):
            (x, y), colour = places[name], look.colour
            axes.hlines(y, 100 * told.low, 100 * told.high, color=colour, linewidth=1)
            axes.vlines(x, 100 * false.low, 100 * false.high, color=colour, linewidth=1)
            axes.scatter(
                x, y, 3 * tokens, "white" if colour in filled else colour, marker=look.marker, edgecolors=colour,
                zorder=3, clip_on=False, label=name,
            )  # fmt: skip
            filled.add(colour)
        axes.set(xlabel="facts told (%)", ylabel="false statements (%), fewer is better")
        axes.set_ylim(bottom=0)
        legend = "area of a marker: tokens a caption; grey: none tells more and errs less"
        return _finish(figure, axes, title, stem, f"{note}; {legend}")


def plot_example(
    picture: Image, told: Mapping[str, Sequence[tuple[str, str]]], asked: Sequence[tuple[str, Sequence[bool]]],
    profile: Profile, stem: Path,
) -> list[Path]:  # fmt: skip
    """A picture, what captioners say of it, and which questions a reader answers from that. told: captioner ->
    (sentence, its kind: a key of EXAMPLE_LOOKS). asked: (question, right from each caption).
    """
    columns = []  # title, and (text, colour) of each line
    for number, (name, sentences) in enumerate(told.items(), 1):
        looked = [(text, *EXAMPLE_LOOKS[kind]) for text, kind in sentences]
        columns.append((f"{number}  {name}", [(f"{sign} {text}", colour) for text, sign, colour in looked]))
    signs = [(" ".join("✓" if good else "✗" for good in answers), question) for question, answers in asked]
    heads = " ".join(map(str, range(1, len(told) + 1)))
    columns.append((f"{heads}  answered from it", [(f"{sign}  {question}", "#333333") for sign, question in signs]))
    most = max(len(lines) for _, lines in columns)
    with styled():
        figure, all_axes = new_grid(1 + len(columns), 1 + len(columns), max(2.2, 0.21 * most + 0.9))
        figure.set_figwidth(_FOREST_INCHES)
        all_axes[0].imshow(picture, interpolation="antialiased")
        for axes in all_axes:
            axes.set_axis_off()
        options = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "fontsize": 8.5}
        for axes, (title, lines) in zip(all_axes[1:], columns, strict=True):
            axes.annotate(title, (0, 1), (0, 0), weight="bold", **options)
            for number, (text, colour) in enumerate(lines, 1):
                axes.annotate(text, (0, 1), (0, -15 * number), color=colour, **options)
        return save(figure, stem, about(profile, "green: true, red: false, grey: said before"))


def plot_readers(results: Results, stem: Path) -> list[Path]:
    """Table 3: accuracy of each reader from true captions, by their length and by what was invented beside it."""
    found = {role: points(results.profile, reader) for role, reader in results.readers.items()}
    filled = [TRUE, *map(REPEATED.format, lengths(results.profile))]
    mixed = {0: TRUE, **{count: WITH_INVENTED.format(count) for count in INVENTED}}
    with styled():
        figure, (left, right) = new_grid(2, 2, 2.6, sharey=True)
        for (role, probes), look in zip(found.items(), looks([*found]), strict=True):
            of_length = [probes[name][:2] for name in filled]
            of_mixture = [(count, probes[name][1]) for count, name in mixed.items()]
            for axes, row in ((left, of_length), (right, of_mixture)):
                _line(axes, *zip(*row, strict=True), look, label=READERS[role])
        left.set(title="True facts, repeated", xlabel="tokens of the caption", ylabel=ACCURACY, ylim=(0, 103))
        right.set(title="True facts and invented ones", xlabel="invented statements", xticks=list(mixed))
        note = about(results.profile, "average over the benchmarks, 95 % intervals")
        return _finish(figure, left, "The readers, tested on captions of known truth", stem, note)


def plot_sets(results: Results, stem: Path) -> list[Path]:
    """Figure 4: a panel per benchmark and the average, a line per caption set, both from the point that they share."""
    pairs = {label: found.trained_on for label, found in results.measured.items()}
    panels, width = [*results.scored, AVERAGE], max(pairs.values())
    (grey,) = looks([VANILLA])
    ticks: list[int] = []  # sets that lost a few captions would write one number over another
    for count in sorted(set(pairs.values()), reverse=True):
        if not ticks or ticks[-1] - count > width / 10:
            ticks.append(count)
    with styled():
        figure, all_axes = new_grid(len(panels), _COLUMNS, 2.2, sharey=True)
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
        return _finish(figure, all_axes[0], results.item.title, stem, counted(results))
