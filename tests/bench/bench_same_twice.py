"""How often the tables' test tells trainings apart that differ in their seed alone (A/A), on the finished runs of mini.

Every row with several trainings is split into two halves in every way (of three trainings, one against one), and these
are compared as two rows are. The pooled spread is of the other rows, so that a row does not vouch for itself. More
trainings of a row: `make table4 table5 SET="ablations.seeds=[0,1,2,3,4,5]"`, and the bench with the same SET.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import harness

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.prism.scores import read_samples, sample_scores
from caprl_utils.prism.statistics import AVERAGE, Interval, bootstrap_models
from caprl_utils.reports.items import Item, items
from caprl_utils.reports.results import kindred, shared, spread_of
from caprl_utils.schema import Profile

LEVEL = 0.05
KINDS = {"table3": "reinforcement learning", "table1": "pretraining"}  # an item of each


def rows() -> list[dict[str, Any]]:
    """A row for either kind of training. Raises UserError where no two rows have several trainings."""
    profile = load_profile("mini")
    found = {what: compared(profile, items(profile)[name]) for name, what in KINDS.items()}
    if not any(found.values()):
        where = paths.shown(paths.RUNS / profile.name)
        raise UserError(f"no two rows with several trainings in {where}; run `make reproduce`")
    return [
        harness.row(
            f"same setting, other seeds: pairs told apart, {what}", sum(map(apart, gaps)) / len(gaps), LEVEL, 1.0,
            "share", len(gaps), lower=True, target=True,
        )
        for what, gaps in found.items() if gaps
    ]  # fmt: skip


def compared(profile: Profile, item: Item) -> list[Interval]:
    """The differences of all pairs of halves of the rows that an item pools, on the average."""
    kin, gaps = kindred(profile, item), []
    for row, records in kin:
        spread = spread_of([other for other in kin if other[0] is not row], lambda r: r["values"][AVERAGE])
        if len(records) > 1 and spread:
            columns = {seed: run for seed, run in zip(row.seeds, row.runs, strict=True) if seed in records}
            scores = {run: sample_scores(read_samples(paths.RUNS / profile.name / run)) for run in columns.values()}
            part = bootstrap_models(shared(scores)[0], profile.prism.bootstrap_draws, profile.seed)[AVERAGE]
            halves = [[{seed: columns[seed] for seed in half} for half in pair] for pair in splits(list(columns))]
            gaps += [part.contrast(*pair, spread) for pair in halves]
    return gaps


def splits(seeds: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """All pairs of disjoint halves, each once."""
    many = len(seeds) // 2
    for ours in combinations(seeds, many):
        rest = [seed for seed in seeds if seed not in ours]
        yield from ((ours, theirs) for theirs in combinations(rest, many) if ours < theirs)


def apart(gap: Interval) -> bool:
    return not gap.low <= 0 <= gap.high
