"""Figure 4: accuracy over the number of pretraining pairs, CapRL's captions against DenseFusion's.

python -m caprl_utils.reports.figure4 --profile mini
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.pretraining.sets import CAPRL_1M, DENSEFUSION, FIGURE_4, VANILLA, growth_sets
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.statistics import AVERAGE
from caprl_utils.reports import opening, pretrained, style, table1
from caprl_utils.reports.claims import Claim
from caprl_utils.reports.pretrained import Item, Row
from caprl_utils.reports.results import Results
from caprl_utils.reports.summary import Brief
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "figure4"
_COLUMNS = 3  # panels side by side
_ASIDE = 0.02  # how far either line's points stand from their place, as a share of the axis
APART = (
    "In the figure CapRL's points stand a little to the right of their number of pairs and DenseFusion's as much to "
    "the left, so that intervals do not hide each other; both lines begin at Vanilla (grey), without these pairs."
)


def item(profile: Profile) -> Item:
    """Its rows: nothing, and both caption sets at every size.

    Comparisons that Table 1 makes of the same runs are stated and counted there, if the profile makes that table.
    """
    setting = profile.pretraining.settings[0]
    rows = [Row(setting, None), *(Row(setting, c) for c in (*growth_sets(profile.pretraining), *FIGURE_4))]
    labels = [row.label for row in rows[1:]]
    pairs = [(ours, theirs) for theirs, ours in zip(labels[::2], labels[1::2], strict=True)]
    claims = [Claim(f"{ours} is better than {theirs}", ours, theirs) for ours, theirs in pairs]
    none_to_all = {base.name: (base.name, VANILLA) for base in (CAPRL_1M, DENSEFUSION)}
    claims.append(Claim("CapRL's pairs are better than none", *none_to_all[CAPRL_1M.name]))
    pairs += none_to_all.values()
    smaller = [label for label in labels if label.startswith(f"{CAPRL_1M.name} x")]
    if smaller:
        pairs.append((CAPRL_1M.name, smaller[0]))
        claims.append(Claim("More of CapRL's pairs are better than fewer", *pairs[-1]))
    there = _in_table_1(profile, claims)
    notes = [f"Setting {setting}. A smaller set is a sample of the larger.", APART]
    if there:
        same = "; ".join(f"{claim.subtraction} as Table 1 ({number})" for claim, number in there)
        notes.append(f"Comparisons of the same runs are stated and counted once: {same}.")
    own = [claim for claim in claims if claim not in [claim for claim, _ in there]]
    brief = Brief(text="no pairs to all:", pairs=none_to_all)
    return Item(NAME, "Figure 4: growing caption sets", rows, pairs, brief, own, None, notes)


def _in_table_1(profile: Profile, claims: Sequence[Claim]) -> list[tuple[Claim, int]]:
    """Claims whose runs Table 1 compares as well, with the number of its statement."""
    if table1.NAME not in profile.pretraining.items:
        return []
    prefix = f"{profile.pretraining.settings[0]}, "
    numbers = {(c.ours, c.theirs): number for number, c in enumerate(table1.item(profile).claims, 1)}
    places = [(claim, numbers.get((prefix + claim.ours, prefix + claim.theirs))) for claim in claims]
    return [(claim, number) for claim, number in places if number is not None]


def draw(results: Results, pairs: Mapping[str, int], stem: Path) -> list[str]:
    """A panel per benchmark and one for the average, a line per caption set; writes PNG and SVG, returns the SVG's
    name.
    """
    panels = [*results.benchmarks, AVERAGE]
    with style.styled():
        figure, all_axes = style.new_grid(len(panels), _COLUMNS, sharey=True)
        for axes, panel in zip(all_axes, panels, strict=True):
            _panel(axes, results, pairs, panel)
        for axes in all_axes[::_COLUMNS]:
            axes.set_ylabel("accuracy (%), 95 % interval")
        for axes in all_axes[-_COLUMNS:]:
            axes.set_xlabel("caption pairs")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        style.note(figure, opening.counted(results))
        style.save(figure, stem)
    return [f"{stem.name}.svg"]


def _panel(axes: Axes, results: Results, pairs: Mapping[str, int], panel: str) -> None:
    """Both lines of one benchmark, from the point that they share."""
    width = max(pairs.values())
    (grey,) = style.looks([VANILLA])
    start = results.interval(VANILLA, panel)
    for base, side in ((DENSEFUSION, -1), (CAPRL_1M, 1)):
        (look,) = style.looks([base.name])
        labels = sorted((label for label in pairs if label.startswith(base.name)), key=pairs.get)
        parts = [results.interval(label, panel) for label in labels]
        sizes = [pairs[label] + side * _ASIDE * width for label in labels]
        axes.plot(
            [0, *sizes], [100 * part.value for part in (start, *parts)], color=look.colour, linestyle=look.line,
            linewidth=look.width, zorder=look.layer, marker=look.marker, markevery=slice(1, None), label=base.name,
        )  # fmt: skip
        axes.vlines(sizes, *_bounds(parts), color=look.colour, linewidth=1)
    point = {"marker": grey.marker, "color": grey.colour, "zorder": 4}
    axes.plot([0], [100 * start.value], linestyle="none", label=VANILLA, **point)
    axes.vlines([0], *_bounds([start]), color=grey.colour, linewidth=1)
    axes.set(
        title="Average" if panel == AVERAGE else get_benchmark(panel).name, xticks=sorted(set(pairs.values()))
    )


def _bounds(parts: Sequence[Any]) -> tuple[list[float], list[float]]:
    return [100 * part.low for part in parts], [100 * part.high for part in parts]


def write(profile: Profile, folder: Path | None = None) -> dict[str, Any]:
    """Write figure4.md, .csv, .json, .png and .svg; returns what the JSON holds."""
    return pretrained.write(profile, item(profile), folder, draw)


if __name__ == "__main__":
    sys.exit(pretrained.main(write, NAME, sys.argv[1:]))
