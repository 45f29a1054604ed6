"""What was measured: the runs behind an item's rows, resampled together; a row's seeds are averaged by sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.files import note_access
from caprl_utils.prism import probes
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.scores import read_samples, sample_scores
from caprl_utils.prism.statistics import AVERAGE, Bootstrap, Interval, Scores, bootstrap_models, macro_average
from caprl_utils.reports.items import Item, Row
from caprl_utils.reports.numbers import Source, from_record_path, look_up, record_path
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

Records = Mapping[str, Mapping[str, Any]]  # record_path -> record of a run


@dataclass(frozen=True)
class Curve:
    """One training: what was measured at each step."""

    label: str
    steps: Sequence[int]
    rewards: Sequence[float]
    lengths: Sequence[float]  # tokens per caption
    file: str = ""  # record_path of its curve.jsonl


@dataclass(frozen=True)
class Measured:
    """What the runs of one row say. rows_of_runs: samples.parquet of each. missing: runs that are not there."""

    row: Row
    records: Records
    rows_of_runs: tuple[Sequence[Mapping[str, Any]], ...]
    trainings: Records
    more: Records
    missing: Sequence[str]

    @cached_property
    def rows(self) -> list[Mapping[str, Any]]:
        """Rows of all runs together."""
        return [row for rows in self.rows_of_runs for row in rows]

    @cached_property
    def scores(self) -> Mapping[str, Any]:
        """Benchmark -> (image, sample) -> score."""
        return sample_scores(self.rows)

    @property
    def training_seeds(self) -> list[int]:
        return [seed for record in self.trainings.values() for seed in record["seeds"]]

    def mean_of(self, *keys: str) -> float | None:
        """Mean over the runs of a value of their records; None where one misses it."""
        values = [look_up(record, "/".join(("values", *keys))) for record in self.records.values()]
        return None if None in values else sum(values) / len(values)

    def sources(self, *keys: str) -> tuple[Source, ...]:
        """Where those values stand."""
        return tuple(Source(file, "/".join(("values", *keys))) for file in self.records)

    def samples(self, key: str) -> tuple[Source, ...]:
        """A column of the single scores of all runs."""
        return tuple(Source(file.replace("result.json", "samples.parquet"), key) for file in self.records)

    @cached_property
    def curves(self) -> list[Curve]:
        """Reward and length over each of its trainings. Raises UserError where one has none."""
        label, many = self.row.label, len(self.trainings) > 1
        numbered = enumerate(self.trainings, 1)
        return [_read_curve(file, f"{label}, training {n}" if many else label) for n, file in numbered]


@dataclass(frozen=True)
class Results:
    """The rows of an item that were measured, and their resampled means."""

    profile: Profile
    item: Item
    measured: Mapping[str, Measured]
    parts: Mapping[str, Bootstrap]  # benchmark that all rows have scores in, or "average" over these -> means
    missing: Mapping[str, Sequence[str]]  # label -> runs that are not there
    left_out: Mapping[str, int]  # benchmark -> samples that some row lacks

    @property
    def scored(self) -> list[str]:
        """Keys of the benchmarks with scores, in the profile's order."""
        return [name for name in self.parts if name != AVERAGE]

    @property
    def groups(self) -> list[str]:
        """All benchmarks, and "average"."""
        records = (record for found in self.measured.values() for record in found.records.values())
        return [*dict.fromkeys(name for r in records for name in r["values"]["benchmarks"]), AVERAGE]

    @property
    def heads(self) -> list[str]:
        """Their names as printed."""
        return [title_of(name) for name in self.groups]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Those of the item's comparisons whose rows were measured."""
        return [pair for pair in self.item.pairs if self.measured.keys() >= {*pair}]

    @cached_property
    def readers(self) -> dict[str, Measured]:
        """Role -> what that reader made of the probes of Table 3's page (`prism.probes`), where that was tried."""
        home = paths.RUNS / self.profile.name
        runs = {role: f"{probes.STAGE}/{role}" for role in probes.ROLES if self.item.kind == "prism"}
        return {
            role: Measured(Row(role, (run,)), _records(home, [run]), (read_samples(home / run),), {}, {}, ())
            for role, run in runs.items() if _there(self.profile, [run])
        }  # fmt: skip

    def interval(self, label: str, benchmark: str) -> Interval:
        """Mean and 95 % interval of a row."""
        return self.parts[benchmark].interval(label)

    def difference(self, ours: str, theirs: str, benchmarks: Sequence[str] = ()) -> Interval:
        """Paired difference of two rows on the average, or on the mean of those of `benchmarks` that were measured."""
        return self.part_of(benchmarks).difference(ours, theirs)

    def part_of(self, benchmarks: Sequence[str] = ()) -> Bootstrap:
        """Resampled means over those of `benchmarks` that were measured; over all of them when none is."""
        found = {name: self.parts[name] for name in benchmarks if name in self.parts}
        return macro_average(found) if found else self.parts[AVERAGE]

    def notes(self) -> list[str]:
        """What has no score, so that no number here is of it."""
        unscored = ", ".join(title_of(name) for name in self.groups if name not in self.parts)
        lost = [f"{count} of {title_of(name)}" for name, count in self.left_out.items() if name in self.parts]
        notes = [f"Without scores, and not in the average: {unscored}."] if unscored else []
        few = f"Samples that some row has no score for are left out of all: {', '.join(lost)}."
        return [*notes, few] if lost else notes


def shared(scores: Mapping[str, Mapping[str, Scores]]) -> tuple[dict[str, dict[str, Scores]], dict[str, int]]:
    """(label -> benchmark -> scores of the samples that all labels have, benchmark -> how many others there are)."""
    kept, left_out = {label: {} for label in scores}, {}
    for name in dict.fromkeys(name for found in scores.values() for name in found):
        keys = [set(found.get(name, {})) for found in scores.values()]
        common = set.intersection(*keys)
        if others := len(set.union(*keys)) - len(common):
            left_out[name] = others
        for label, found in scores.items() if common else ():
            kept[label][name] = {key: score for key, score in found[name].items() if key in common}
    return kept, left_out


def keys_of(benchmark: str) -> tuple[str, ...]:
    """Where a benchmark's mean, or the average, stands among the values of a record."""
    return (AVERAGE,) if benchmark == AVERAGE else ("benchmarks", benchmark, "mean")


def title_of(benchmark: str) -> str:
    """Name of a benchmark, or "Average", as printed."""
    return "Average" if benchmark == AVERAGE else get_benchmark(benchmark).name


def _there(profile: Profile, runs: Sequence[str]) -> list[str]:
    """Those that are finished."""
    return [run for run in runs if (paths.RUNS / profile.name / run / "result.json").is_file()]


def missing_runs(profile: Profile, item: Item) -> list[str]:
    """Evaluations without which the item cannot be shown, "<stage>/<run>"; some seeds do where a table says which."""
    found = []
    for row in item.rows:
        if row.label in item.needed or (item.kind == "rl" and not row.trainings):
            there = _there(profile, row.runs)
            found += [] if there and item.kind == "prism" else [run for run in row.runs if run not in there]
    return found


def listed(runs: Sequence[str]) -> str:
    """The first of many runs by name."""
    more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    return f"{', '.join(runs[:4])}{more}"


def load(profile: Profile, item: Item) -> Results:
    """Read the runs of an item and resample their scores. Raises UserError naming what is missing and how to make it.

    Rows without runs are left out, if the item can do without. Table 3 takes the seeds there are, other items need all.
    """
    if missing := missing_runs(profile, item):
        command = f"make {item.target} PROFILE={profile.name}"
        raise UserError(f"{item.name} needs {listed(missing)}; make them: {command}")
    found = {row.label: _measure(profile, item, row) for row in item.rows}
    measured = {label: one for label, one in found.items() if one.records}
    scores, left_out = shared({label: one.scores for label, one in measured.items()})
    if not any(scores.values()):
        told = "no question was scored in all of its rows; the records say why (unscored)"
        raise UserError(f"{item.name}: {told}")
    parts = bootstrap_models(scores, profile.prism.bootstrap_draws, profile.seed)
    missing_of = {label: one.missing for label, one in found.items() if one.missing and not one.row.budget}
    return Results(profile, item, measured, parts, missing_of, left_out)


def _measure(profile: Profile, item: Item, row: Row) -> Measured:
    home, there = paths.RUNS / profile.name, _there(profile, row.runs)
    if there and len(there) < len(row.runs) and item.kind != "prism":
        told = f"{len(there)} of {len(row.runs)} training seeds were evaluated"
        raise UserError(f"{row.label}: {told}; make the rest: make {item.target} PROFILE={profile.name}")
    trainings = row.trainings if there else ()
    if item.kind == "prism":
        trainings = [t for t, run in zip(row.trainings, row.runs, strict=False) if run in there]
    captions = _there(profile, (row.captions or ())[1:])
    return Measured(
        row, _records(home, there), tuple(read_samples(home / run) for run in there), _records(home, trainings),
        _records(home, [*row.more, *captions] if there else []),
        [Path(run).name for run in row.runs if run not in there],
    )  # fmt: skip


def _records(home: Path, runs: Sequence[str]) -> Records:
    return {record_path(home / run / "result.json"): load_result(home / run) for run in runs}


def _read_curve(record_file: str, label: str) -> Curve:
    """The curve.jsonl beside a record; steps without a reward are left out. Raises UserError without any."""
    file = from_record_path(record_file).with_name("curve.jsonl")
    lines = file.read_bytes().splitlines() if file.is_file() else []  # of bytes: split at \n alone
    rows = [row for row in map(json.loads, lines) if row["reward"] is not None]
    if not rows:
        raise UserError(f"no training curve in {paths.shown(file)}; make it: make 03_caprl_rl_training")
    note_access(file)
    rows.sort(key=lambda row: row["step"])
    columns = ([row[key] for row in rows] for key in ("step", "reward", "completion_tokens"))
    return Curve(label, *columns, record_path(file))
