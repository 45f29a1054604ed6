"""The measured captioners of a profile: finished Prism runs as rows of Table 3, resampled together.

A row stands for one captioner; several training seeds of one captioner are averaged sample by sample.
Rows whose runs are not there are left out, but for the two that the paper's claim needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.prism.scores import read_samples, sample_scores
from caprl_utils.prism.statistics import AVERAGE, Bootstrap, Interval, bootstrap_models
from caprl_utils.reports.tables import Source, record_path
from caprl_utils.rl.experiments import MAIN, seeds_of
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

BASE, CAPRL = "3B (base)", "CapRL-3B"
CUT = f"control: {CAPRL} cut to the base's length"


@dataclass(frozen=True)
class Entry:
    """One row. runs: names under runs/<profile>/prism; "{seed}" stands for each seed that the experiment was trained
    with, "{first}" for the first of them.
    """

    label: str
    runs: str
    paper: str | None = None  # the row of the paper's table that it stands for
    bound: bool = False  # a floor, ceiling or control, no captioner of the paper
    more: tuple[str, ...] = ()  # names of further runs: other seeds of a training that is not of RL
    experiment: str = MAIN  # whose seeds

    def names(self, profile: Profile) -> list[str]:
        """Names of its runs."""
        seeds = seeds_of(profile, self.experiment) if "{seed}" in self.runs else profile.rl.seeds[:1]
        return [*(self.runs.format(seed=seed, first=profile.rl.seeds[0]) for seed in seeds), *self.more]


ENTRIES = (
    Entry(BASE, "base-3b", "Qwen2.5-VL-3B"),
    Entry("7B", "base-7b", "Qwen2.5-VL-7B"),
    Entry("72B", "base-72b", "Qwen2.5-VL-72B"),
    Entry("UnifiedRW-as-Judge-3B", "judge_unified-seed{first}", "UnifiedRW-as-Judge-3B"),
    Entry("Qwen2.5VL-as-Judge-3B", "judge_vlm-seed{first}", "Qwen2.5VL-as-Judge-3B"),
    Entry(CAPRL, "caprl-seed{seed}", "CapRL-3B"),
    Entry("floor: empty caption", "floor-empty", bound=True),
    Entry("floor: another image's caption", "floor-other-image", bound=True),
    Entry(CUT, "caprl-seed{seed}-cut", bound=True),
    Entry("ceiling: complete true facts", "ceiling-true-facts", bound=True),
    Entry("ceiling: the 72B looks at the image", "ceiling-image", bound=True),
)


@dataclass(frozen=True)
class Measured:
    """What the runs of one entry say."""

    entry: Entry
    names: tuple[str, ...]  # of the runs
    files: tuple[str, ...]  # record_path of each run's result.json
    records: tuple[Mapping[str, Any], ...]
    rows_of_runs: tuple[Sequence[Mapping[str, Any]], ...]  # samples.parquet of each run
    scores: Mapping[str, Any]  # benchmark -> (image, sample) -> score

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """Rows of all runs together."""
        return [row for rows in self.rows_of_runs for row in rows]

    def mean_of(self, *keys: str) -> float | None:
        """Mean over the runs of a value of their records; None where one misses it."""
        found: list[Any] = []
        for record in self.records:
            value: Any = record["values"]
            for key in keys:
                value = value[key]
            found.append(value)
        return None if None in found else sum(found) / len(found)

    def sources(self, *keys: str) -> tuple[Source, ...]:
        """Where those values stand."""
        return tuple(Source(file, "/".join(("values", *keys))) for file in self.files)


@dataclass(frozen=True)
class Results:
    """All entries that were measured, and their resampled means."""

    profile: Profile
    measured: Mapping[str, Measured]
    parts: Mapping[str, Bootstrap]  # benchmark or "average" -> means of all entries
    missing: Mapping[str, Sequence[str]] = field(default_factory=dict)  # label -> runs that are not there

    @property
    def benchmarks(self) -> list[str]:
        """Keys of the benchmarks, in the profile's order."""
        return [name for name in self.parts if name != AVERAGE]

    @property
    def training_seeds(self) -> list[int]:
        """Those of CapRL that were evaluated."""
        found = self.measured[CAPRL]
        runs = found.entry.runs
        return [seed for seed in self.profile.rl.seeds if runs.format(seed=seed) in found.names]

    def interval(self, label: str, benchmark: str) -> Interval:
        """Mean and 95 % interval of an entry."""
        return self.parts[benchmark].interval(label)

    def difference(self, label: str, baseline: str, benchmark: str) -> Interval:
        """Paired difference of two entries."""
        return self.parts[benchmark].difference(label, baseline)


def load(
    profile: Profile,
    entries: Sequence[Entry] = ENTRIES,
    needed: Sequence[str] = (BASE, CAPRL),
    some_seeds: bool = False,
    stage: str = "prism",
    maker: str = "05_prism_evaluation",
) -> Results:
    """Read the Prism runs of a profile; entries without a run are left out, but for the labels in `needed`.

    stage, maker: where other evaluations with the same rows stand ("vqa"), and the notebook that makes them.
    some_seeds: take the training seeds that were evaluated; otherwise all must be there. Whatever is not
    there is named in the result's `missing`.
    Raises UserError naming what is missing and how to make it.
    """
    measured, missing = {}, {}
    for entry in entries:
        folders = [paths.RUNS / profile.name / stage / name for name in entry.names(profile)]
        there = [folder for folder in folders if (folder / "result.json").is_file()]
        if there and len(there) < len(folders) and not some_seeds:
            raise UserError(
                f"{entry.label}: {len(there)} of {len(folders)} training seeds were evaluated; "
                f"make the rest: make reproduce PROFILE={profile.name}"
            )
        if there:
            measured[entry.label] = _measure(entry, there)
        if len(there) < len(folders):
            missing[entry.label] = [folder.name for folder in folders if folder not in there]
    absent = [label for label in needed if label not in measured]
    if absent:
        raise UserError(
            f"no {stage.capitalize()} result of {' and '.join(absent)} in profile {profile.name}; "
            f"make it: make {maker} PROFILE={profile.name}"
        )
    scores = {label: found.scores for label, found in measured.items()}
    parts = bootstrap_models(scores, profile.prism.bootstrap_draws, profile.seed)
    return Results(profile, measured, parts, missing)


def _measure(entry: Entry, folders: Sequence[Path]) -> Measured:
    rows = tuple(read_samples(folder) for folder in folders)
    files = tuple(record_path(folder / "result.json") for folder in folders)
    scores = sample_scores([row for run in rows for row in run])
    names = tuple(folder.name for folder in folders)
    return Measured(entry, names, files, tuple(load_result(f) for f in folders), rows, scores)
