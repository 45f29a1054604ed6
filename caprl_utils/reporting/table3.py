"""Table 3, caption quality in the Prism framework: our values, their differences, and the paper's beside
them.

Reads the records of finished runs only. A row stands for one captioner; several training seeds of one
captioner are averaged sample by sample. Rows whose runs are not there are left out, but for the two that
the paper's claim needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.evaluation.benchmarks import get_benchmark
from caprl_utils.evaluation.prism_compare import AVERAGE, bootstrap_models, sample_scores
from caprl_utils.evaluation.prism_scores import read_samples
from caprl_utils.evaluation.statistics import Bootstrap, Interval, holm
from caprl_utils.reporting import numbers
from caprl_utils.reporting.tables import Cell, Source, Table, record_path
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

BASE, CAPRL = "3B (base)", "CapRL-3B"
TOKENS = "Caption tokens"


@dataclass(frozen=True)
class Entry:
    """One row. runs: names under runs/<profile>/prism; "{seed}" stands for each training seed."""

    label: str
    runs: str
    paper: str | None = None  # the row of the paper's table that it stands for
    bound: bool = False  # a floor or ceiling, no captioner of the paper


ENTRIES = (
    Entry(BASE, "base-3b", "Qwen2.5-VL-3B"),
    Entry("7B", "base-7b", "Qwen2.5-VL-7B"),
    Entry("72B", "base-72b", "Qwen2.5-VL-72B"),
    Entry(CAPRL, "caprl-seed{seed}", "CapRL-3B"),
    Entry("floor: empty caption", "floor-empty", bound=True),
    Entry("floor: another image's caption", "floor-other-image", bound=True),
    Entry("ceiling: complete true facts", "ceiling-true-facts", bound=True),
    Entry("ceiling: the 72B looks at the image", "ceiling-image", bound=True),
)


@dataclass(frozen=True)
class Measured:
    """What the runs of one entry say."""

    entry: Entry
    files: tuple[str, ...]  # record_path of each run's result.json
    records: tuple[Mapping[str, Any], ...]
    scores: Mapping[str, Any]  # benchmark -> (image, sample) -> score

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

    @property
    def benchmarks(self) -> list[str]:
        """Keys of the benchmarks, in the profile's order."""
        return [name for name in self.parts if name != AVERAGE]

    def interval(self, label: str, benchmark: str) -> Interval:
        """Mean and 95 % interval of an entry."""
        return self.parts[benchmark].interval(label)

    def difference(self, label: str, baseline: str, benchmark: str) -> Interval:
        """Paired difference of two entries."""
        return self.parts[benchmark].difference(label, baseline)


def load(profile: Profile, entries: Sequence[Entry] = ENTRIES) -> Results:
    """Read the Prism runs of a profile. Raises UserError naming what is missing and how to make it."""
    measured = {}
    for entry in entries:
        if (found := _measure(profile, entry)) is not None:
            measured[entry.label] = found
    missing = [label for label in (BASE, CAPRL) if label not in measured]
    if missing:
        raise UserError(
            f"no Prism result of {' and '.join(missing)} in profile {profile.name}; "
            f"make it: make 05_prism_evaluation PROFILE={profile.name}"
        )
    scores = {label: found.scores for label, found in measured.items()}
    return Results(profile, measured, bootstrap_models(scores, profile.prism.bootstrap_draws, profile.seed))


def _measure(profile: Profile, entry: Entry) -> Measured | None:
    names = [entry.runs.format(seed=seed) for seed in (profile.rl.seeds if "{seed}" in entry.runs else [0])]
    folders = [paths.RUNS / profile.name / "prism" / name for name in names]
    there = [folder for folder in folders if (folder / "result.json").is_file()]
    if not there:
        return None
    if len(there) < len(folders):
        raise UserError(
            f"{entry.label}: {len(there)} of {len(folders)} training seeds were evaluated; "
            f"make the rest: make 05_prism_evaluation PROFILE={profile.name}"
        )
    rows = [row for folder in folders for row in read_samples(folder)]
    files = tuple(record_path(folder / "result.json") for folder in folders)
    return Measured(entry, files, tuple(load_result(f) for f in folders), sample_scores(rows))


def scores_table(results: Results, bounds: bool) -> Table:
    """Accuracy of every captioner (bounds=False) or of every floor and ceiling (bounds=True)."""
    shown = [m for m in results.measured.values() if m.entry.bound == bounds]
    columns = [[_score_cells(results, m, name) for m in shown] for name in (*results.benchmarks, AVERAGE)]
    texts = [numbers.percents([cell.value for cell in column]) for column in columns]
    rows = []
    for place, found in enumerate(shown):
        cells = [
            Cell(
                f"{t[place]} {numbers.interval(c[place].interval)}",
                c[place].value,
                c[place].interval,
                c[place].sources,
            )
            for c, t in zip(columns, texts, strict=True)
        ]
        rows.append((found.entry.label, [*cells, _token_cell(found)]))
    heads = [get_benchmark(name).name for name in results.benchmarks]
    caption = "Floors and ceilings" if bounds else "Accuracy (%) with 95 % interval"
    return Table("bounds" if bounds else "table3", caption, "Captioner", [*heads, "Average", TOKENS], rows)


def _score_cells(results: Results, found: Measured, benchmark: str) -> Cell:
    keys = (AVERAGE,) if benchmark == AVERAGE else ("benchmarks", benchmark, "mean")
    interval = results.interval(found.entry.label, benchmark)
    value = found.mean_of(*keys)
    if value is None or abs(value - interval.value) > 1e-9:
        raise UserError(
            f"{found.files[0]}: {'/'.join(keys)} is {value}, its samples.parquet says {interval.value}; "
            "delete that run and make it again"
        )
    return Cell("", value, (interval.low, interval.high), found.sources(*keys))


def _token_cell(found: Measured) -> Cell:
    value = found.mean_of("caption_tokens")
    return Cell(numbers.number(value), value, None, found.sources("caption_tokens"))


def differences_table(results: Results, pairs: Sequence[tuple[str, str]] | None = None) -> Table:
    """Paired differences in percentage points with interval and Holm's p over the benchmarks.

    pairs: (captioner, baseline); CapRL against every other captioner by default.
    """
    if pairs is None:
        others = [m.entry.label for m in results.measured.values() if not m.entry.bound]
        pairs = [(CAPRL, label) for label in others if label != CAPRL]
    heads = [get_benchmark(name).name for name in results.benchmarks]
    rows = []
    for ours, theirs in pairs:
        gaps = {name: results.difference(ours, theirs, name) for name in (*results.benchmarks, AVERAGE)}
        adjusted = holm({name: gaps[name].p_value for name in results.benchmarks})
        adjusted[AVERAGE] = gaps[AVERAGE].p_value
        texts = numbers.differences([gap.value for gap in gaps.values()])
        rows.append(
            (
                f"{ours} − {theirs}",
                [
                    _gap_cell(results, ours, theirs, name, gap, text, adjusted[name])
                    for (name, gap), text in zip(gaps.items(), texts, strict=True)
                ],
            )
        )
    notes = [
        "Paired by image: the same images are drawn for both captioners. p-values of single benchmarks are "
        "corrected after Holm, that of the average stands alone.",
    ]
    caption = "Difference in percentage points with 95 % interval"
    return Table("differences", caption, "Comparison", [*heads, "Average"], rows, notes)


def _gap_cell(
    results: Results, ours: str, theirs: str, benchmark: str, gap: Interval, text: str, p: float
) -> Cell:
    bounds = (gap.low, gap.high)
    keys = (AVERAGE,) if benchmark == AVERAGE else ("benchmarks", benchmark, "mean")
    sources = results.measured[ours].sources(*keys) + results.measured[theirs].sources(*keys)
    return Cell(
        f"{text} {numbers.interval(bounds, signed=True)}, {numbers.p_value(p)}", gap.value, bounds, sources
    )


def facts(results: Results) -> dict[str, Any]:
    """What the report says in words: n, captions, seeds, and CapRL against base on the average."""
    base = results.measured[BASE].records[0]
    gap = results.difference(CAPRL, BASE, AVERAGE)
    return {
        "profile": results.profile.name,
        "num_samples": {name: base["n"][name] for name in results.benchmarks},
        "num_images": {name: base["values"]["benchmarks"][name]["num_images"] for name in results.benchmarks},
        "captions_per_image": base["captions_per_image"],
        "reader": base["reader"]["mode"],
        "training_seeds": list(results.profile.rl.seeds),
        "draws": results.profile.prism.bootstrap_draws,
        "unparsed": {m.entry.label: [r["unparsed"] for r in m.records] for m in results.measured.values()},
        "gain": gap.value,
        "gain_interval": [gap.low, gap.high],
        "verdict": verdict(gap.low, gap.high),
    }


def verdict(low: float, high: float) -> str:
    """A claim that a difference is positive, by its 95 % interval."""
    if low > 0:
        return "supported"
    return "not supported" if high < 0 else "undecided"
