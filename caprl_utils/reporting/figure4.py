"""Figure 4: accuracy over the number of pretraining pairs, CapRL's captions against DenseFusion's.

python -m caprl_utils.reporting.figure4 --profile mini
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caprl_utils.evaluation.benchmarks import get_benchmark
from caprl_utils.evaluation.prism_compare import AVERAGE
from caprl_utils.pretraining.sets import CAPRL_1M, DENSEFUSION, FIGURE_4, VANILLA, growth_sets
from caprl_utils.reporting import pretrained, style
from caprl_utils.reporting.claims import Claim
from caprl_utils.reporting.pretrained import Item, Row
from caprl_utils.reporting.results import Results
from caprl_utils.schema import Profile

NAME = "figure4"
# The paper's four panels, and the mini benchmarks of the same kinds of images; the average is ours.
PANELS = ("infovqa", "chartqa", "seedbench2_plus", "ai2d", "mini-infographic", "mini-chart", "mini-geometry")
_ASIDE = 0.04  # the second line's points, as a share of the axis: intervals must not hide each other


def item(profile: Profile) -> Item:
    """Its rows: nothing, and both caption sets at every size."""
    setting = profile.pretraining.settings[0]
    sets = [*growth_sets(profile.pretraining), *FIGURE_4]
    rows = [Row(setting, None), *(Row(setting, captions) for captions in sets)]
    labels = [row.label for row in rows[1:]]
    pairs = [(ours, theirs) for theirs, ours in zip(labels[::2], labels[1::2], strict=True)]
    claims = [Claim(f"{ours} is better than {theirs}", ours, theirs) for ours, theirs in pairs]
    claims.append(Claim("CapRL's pairs are better than none", CAPRL_1M.name, VANILLA))
    smaller = [label for label in labels if label.startswith(f"{CAPRL_1M.name} x")]
    if smaller:
        claims.append(Claim("More of CapRL's pairs are better than fewer", CAPRL_1M.name, smaller[0]))
    notes = (f"Setting {setting}. A smaller set is a sample of the larger.",)
    return Item(NAME, "Figure 4: growing caption sets", rows, [pairs[-1], *pairs[:-1]], claims, None, notes)


def draw(results: Results, pairs: Mapping[str, int], stem: Path) -> list[str]:
    """A panel per benchmark, a line per caption set; writes PNG and SVG, returns the SVG's name."""
    panels = [*[name for name in PANELS if name in results.benchmarks][:4], AVERAGE]
    lines = {
        base.name: [VANILLA, *(la for la in pairs if la.startswith(base.name))]
        for base in (CAPRL_1M, DENSEFUSION)
    }
    with style.styled():
        figure, all_axes = style.new_figure(len(panels), sharey=True)
        for axes, panel in zip(all_axes, panels, strict=True):
            for aside, ((name, labels), look) in enumerate(zip(lines.items(), style.LOOKS, strict=False)):
                points = [
                    (pairs[label], results.interval(label, panel)) for label in sorted(labels, key=pairs.get)
                ]
                width = max(size for size, _ in points)
                sizes = [size + _ASIDE * aside * width for size, _ in points]
                means = [100 * part.value for _, part in points]
                axes.plot(
                    sizes, means, color=look.colour, linestyle=look.line, marker=look.marker, label=name
                )
                bounds = [[100 * side for side in (part.low, part.high)] for _, part in points]
                axes.vlines(sizes, *zip(*bounds, strict=True), color=look.colour, linewidth=1)
            axes.set(
                title="Average" if panel == AVERAGE else get_benchmark(panel).name, xlabel="caption pairs"
            )
        all_axes[0].set_ylabel("accuracy (%), 95 % interval")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(lines))
        style.save(figure, stem)
    return [f"{stem.name}.svg"]


def write(profile: Profile, folder: Path | None = None) -> dict[str, Any]:
    """Write figure4.md, .csv, .json, .png and .svg; returns what the JSON holds."""
    return pretrained.write(profile, item(profile), folder, draw)


if __name__ == "__main__":
    sys.exit(pretrained.main(write, NAME, sys.argv[1:]))
