"""What was measured: the runs behind an item's rows, resampled together, and how much trainings differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.files import note_access
from caprl_utils.prism import probes, statistics
from caprl_utils.prism.benchmarks import averaged, get_benchmark
from caprl_utils.prism.scores import most_frequent, read_samples, sample_scores
from caprl_utils.prism.statistics import AVERAGE, Bootstrap, Columns, Interval, Scores, Spread, macro_average
from caprl_utils.prism.told import by_image
from caprl_utils.reports.items import Item, Row, items
from caprl_utils.reports.numbers import Source, from_record_path, look_up, record_path, sources
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

Records = Mapping[str, Mapping[str, Any]]  # record_path -> record of a run
Kin = Sequence[tuple[Row, Mapping[int, Mapping[str, Any]]]]  # as `kindred` finds them: row, seed -> record
Value = Callable[[Mapping[str, Any]], float | None]  # of the record of an evaluation
READERS = {"prism_reader": "Reader of the evaluation", "reward_reader": "Reader of the reward"}


class Mean(NamedTuple):
    """What rows are compared by: its resampled means over their runs, and how it is read from the record of a run."""

    part: Bootstrap
    value: Value


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
    """What the runs of one row say."""

    row: Row
    columns: Columns  # training seed -> run ({None: run} of a row that was not trained)
    records: Records
    by_run: Mapping[str, Sequence[Mapping[str, Any]]]  # run -> its samples.parquet
    trainings: Records
    more: Records
    missing: Sequence[str]  # runs that are not there

    @cached_property
    def rows(self) -> list[Mapping[str, Any]]:
        """Rows of all runs together."""
        return [row for rows in self.by_run.values() for row in rows]

    @property
    def training_seeds(self) -> list[int]:
        return [seed for record in self.trainings.values() for seed in record["seeds"]]

    @property
    def trained_on(self) -> int:
        """Images or caption pairs of each of its trainings, which all have the same; 0 without any."""
        return next((record["n"] for record in self.trainings.values()), 0)

    def mean_of(self, *keys: str) -> float | None:
        """Mean over the runs of a value of their records; None where one misses it."""
        values = [look_up(record, "/".join(("values", *keys))) for record in self.records.values()]
        return None if None in values or not values else sum(values) / len(values)

    def sources(self, *keys: str) -> tuple[Source, ...]:
        """Where those values stand."""
        return sources(self.records, "values", *keys)

    def samples(self, key: str) -> tuple[Source, ...]:
        """A column of the single scores of all runs."""
        return sources((file.replace("result.json", "samples.parquet") for file in self.records), key)

    @cached_property
    def curves(self) -> list[Curve]:
        """Each of its trainings, without steps that have no reward. Raises UserError where one has no curve.jsonl."""
        found = []
        for number, record_file in enumerate(self.trainings, 1):
            file = from_record_path(record_file).with_name("curve.jsonl")
            lines = file.read_bytes().splitlines() if file.is_file() else []  # of bytes: split at \n alone
            rows = [row for row in map(json.loads, lines) if row["reward"] is not None]
            if not rows:
                raise UserError(f"no training curve in {paths.shown(file)}; make it: make 03_caprl_rl_training")
            note_access(file)
            rows.sort(key=lambda row: row["step"])
            columns = ([row[key] for row in rows] for key in ("step", "reward", "completion_tokens"))
            which = f", training {number}" if len(self.trainings) > 1 else ""
            found.append(Curve(f"{self.row.label}{which}", *columns, record_path(file)))
        return found


@dataclass(frozen=True)
class Results:
    """The rows of an item that were measured, and the resampled means of their runs."""

    profile: Profile
    item: Item
    measured: Mapping[str, Measured]
    parts: Mapping[str, Bootstrap]  # benchmark that all rows have scores in, or "average" over these -> means
    kin: Kin
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
    def unbound(self) -> dict[str, Measured]:
        """The rows that are no floor, ceiling or control."""
        return {label: found for label, found in self.measured.items() if not found.row.bound}

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Those of the item's comparisons whose rows were measured."""
        return [pair for pair in self.item.pairs if self.measured.keys() >= {*pair}]

    @cached_property
    def readers(self) -> dict[str, Measured]:
        """Role -> what that reader made of the probes of Table 3's page (`prism.probes`), where that was tried."""
        runs = {role: f"{probes.STAGE}/{role}" for role in probes.ROLES if self.item.kind == "prism"}
        found = {role: _measure(self.profile, Row(role, (run,))) for role, run in runs.items()}
        return {role: reader for role, reader in found.items() if reader.records}

    def interval(self, label: str, *benchmarks: str) -> Interval:
        """Mean and 95 % interval of a row on the average, or on the mean of some benchmarks; within 0 and 1."""
        found = self.contrast(self.accuracy(benchmarks), label)
        return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))

    def difference(self, ours: str, theirs: str, benchmarks: Sequence[str] = (), **null: float) -> Interval:
        """Difference of two rows in `accuracy`, paired by image and seed. null: see `Bootstrap.contrast`."""
        return self.contrast(self.accuracy(benchmarks), ours, theirs, **null)

    def contrast(self, mean: Mean, ours: str, theirs: str | None = None, **null: float) -> Interval:
        """A row, or its difference from another, in any mean of the rows' runs."""
        other = self.measured[theirs].columns if theirs else None
        return mean.part.contrast(self.measured[ours].columns, other, spread_of(self.kin, mean.value), **null)

    def accuracy(self, benchmarks: Sequence[str] = ()) -> Mean:
        """The mean over those of `benchmarks` that were measured; over all of them when none is."""
        found = {name: self.parts[name] for name in benchmarks if name in self.scored}
        names = list(found) or averaged(self.scored)

        def value(record: Mapping[str, Any]) -> float | None:
            means = [record["values"]["benchmarks"].get(name, {}).get("mean") for name in names]
            return None if None in means else sum(means) / len(means)

        return Mean(macro_average(found) if found else self.parts[AVERAGE], value)

    def said(self, measure: str, labels: Sequence[str], factors: Sequence[float] = ()) -> Mean | None:
        """What some rows' captions say (a key of `told.MEASURES`): the average over the benchmarks of each run,
        resampled by image; None where there is nothing to measure. factors: of the rows.
        """
        values = {}
        for label, factor in zip_longest(labels, factors, fillvalue=1.0):
            runs = self.measured[label].by_run.items()
            values |= {run: by_image(rows, measure, factor) for run, rows in runs}
        common, draws = shared(values)[0], self.profile.prism.bootstrap_draws
        if not all(common.values()):
            return None
        part = statistics.bootstrap_models(common, draws, self.profile.seed)[AVERAGE]
        return Mean(part, lambda record: record["values"].get("said", {}).get(measure))


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
    """Evaluations without which the item cannot be shown, "<stage>/<run>"; of a trained row one seed does."""
    rows = [row for row in item.rows if row.label in item.needed or (item.kind == "rl" and not row.seeds)]
    return [run for row in rows if not _there(profile, row.runs) for run in row.runs]


def kindred(profile: Profile, one: Item) -> Kin:
    """Rows over which is pooled how much seeds matter: the item's and all of the paper's items whose trainings are of
    its kind, each once, and records. What else of ours is there changes no table.
    """
    known = [item for item in items(profile).values() if not item.ours or item.name == one.name]
    of_kind = [item for item in known if (item.kind == "pretraining") == (one.kind == "pretraining")]
    rows: dict[tuple[str, ...], Row] = {}
    for row in (row for item in of_kind for row in item.rows if row.seeds and not row.bound):
        rows.setdefault(row.trainings or row.runs, row)
    home, found = paths.RUNS / profile.name, []
    for row in rows.values():
        there = {seed: run for seed, run in zip(row.seeds, row.runs, strict=True) if _there(profile, [run])}
        found.append((row, {seed: load_result(home / run) for seed, run in there.items()}))
    return found


def spread_of(kin: Kin, value: Value) -> Spread | None:
    """How much a value differs between trainings with another seed. Rows of one setting share what a seed decides."""
    blocks: dict[str, dict[int, dict[int, float]]] = {}
    for place, (row, records) in enumerate(kin):
        found = {seed: value(record) for seed, record in records.items()}
        blocks.setdefault(row.setting, {})[place] = {seed: v for seed, v in found.items() if v is not None}
    return statistics.pooled(blocks.values())


def listed(runs: Sequence[str]) -> str:
    """The first of many runs by name."""
    more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    return f"{', '.join(runs[:4])}{more}"


def load(profile: Profile, item: Item) -> Results:
    """Read the runs of an item and resample their scores. Rows without runs are left out, if the item can do without;
    of a row's seeds those are taken that are there. Raises UserError naming what is missing and how to make it.
    """
    if missing := missing_runs(profile, item):
        raise UserError(f"{item.name} needs {listed(missing)}; make them: make {item.target} PROFILE={profile.name}")
    found = {row.label: _measure(profile, row) for row in item.rows if row.runs}
    measured = {label: one for label, one in found.items() if one.records}
    for row in (row for row in item.rows if not row.runs):  # the guesser, on the first row's questions
        (first, *_) = next(iter(measured.values())).by_run.values()
        measured[row.label] = Measured(row, {None: row.label}, {}, {row.label: most_frequent(first)}, {}, {}, ())
    by_run = {run: sample_scores(rows) for one in measured.values() for run, rows in one.by_run.items()}
    scores, left_out = shared(by_run)
    if not any(scores.values()):
        raise UserError(f"{item.name}: no question was scored in all of its rows; the records say why (unscored)")
    parts = statistics.bootstrap_models(scores, profile.prism.bootstrap_draws, profile.seed)
    missing_of = {label: one.missing for label, one in found.items() if one.missing and not one.row.budget}
    return Results(profile, item, measured, parts, kindred(profile, item), missing_of, left_out)


def _measure(profile: Profile, row: Row) -> Measured:
    home, there = paths.RUNS / profile.name, _there(profile, row.runs)

    def records(runs: Sequence[str]) -> Records:
        return {record_path(home / run / "result.json"): load_result(home / run) for run in runs}

    columns = {seed: run for seed, run in zip(row.seeds or [None], row.runs, strict=True) if run in there}
    trainings = [t for t, run in zip(row.trainings, row.runs, strict=False) if run in there]
    more = _there(profile, [*row.more, *(row.captions or ())[1:]]) if there else []
    by_run = {run: read_samples(home / run) for run in there}
    missing = [Path(run).name for run in row.runs if run not in there]
    return Measured(row, columns, records(there), by_run, records(trainings), records(more), missing)


def points(profile: Profile, reader: Measured) -> dict[str, tuple[float, Interval | None, Interval | None]]:
    """What a reader made of each probe: mean tokens of the captions, accuracy over all benchmarks (None where only some
    of their questions can be asked), and over those whose questions have options.
    """
    rows = {name: [] for name in probes.names(profile)}
    for row in reader.rows:
        rows[list(rows)[row["caption_index"]]].append(row)
    asked_freely = {row["benchmark"] for row in reader.rows if not row["options"]}

    def averages(names: Iterable[str], without: set[str]) -> dict[str, Interval]:
        scores = {name: sample_scores([r for r in rows[name] if r["benchmark"] not in without]) for name in names}
        if not all(scores.values()):
            return {}
        average = statistics.bootstrap_models(scores, profile.prism.bootstrap_draws, profile.seed)[AVERAGE]
        return {name: average.interval(name) for name in scores}

    told = [name for name in rows if name != probes.OPTIONS]
    whole, options = averages(told, set()), averages(told, asked_freely) | averages([probes.OPTIONS], asked_freely)
    tokens = {name: sum(row["num_tokens"] for row in found) / len(found) for name, found in rows.items() if found}
    return {name: (mean, whole.get(name), options.get(name)) for name, mean in tokens.items()}
