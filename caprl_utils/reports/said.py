"""Tables of what captions say: measured against the known facts of rendered images, and at equal length."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from caprl_utils.files import note_access
from caprl_utils.image_sources import open_images
from caprl_utils.prism.statistics import AVERAGE, Bootstrap, Interval, bootstrap_models
from caprl_utils.prism.told import MEASURES, Measure, by_image, counts, false
from caprl_utils.registry import drawn_source
from caprl_utils.reports import numbers
from caprl_utils.reports.items import budget_label, texts
from caprl_utils.reports.numbers import Cell, Table, from_record_path
from caprl_utils.reports.results import Curve, Results, shared
from caprl_utils.schema import Profile


def said_table(results: Results) -> Table:
    """Every measure of what captions say with its interval, rows as in the item and then its comparisons; without rows
    where no facts are known.
    """
    labels = [
        label for label, found in results.measured.items()
        if not found.row.bound and any(row["facts"] is not None for row in found.rows)
    ]  # fmt: skip
    parts = {name: resampled(results, labels, name) for name in MEASURES} if labels else {}
    rows = [(label, [_cell(results, name, part, label) for name, part in parts.items()]) for label in labels]
    pairs = [pair for pair in results.pairs if {*pair} <= {*labels}]
    rows += [(" − ".join(pair), [_cell(results, name, part, *pair) for name, part in parts.items()]) for pair in pairs]
    heads = [measure.head for measure in MEASURES.values()]
    name = f"{results.item.name}_said"
    return Table(name, "What the captions say", "Captions of", heads, rows, [texts()["notes"]["said"]])


def resampled(results: Results, labels: Sequence[str], measure: str, factors: Sequence[float] = ()) -> Bootstrap | None:
    """A measure's average over the benchmarks for every run of some rows, resampled by image; None where there is
    nothing to measure. factors: of the rows.
    """
    values = {}
    for label, factor in zip_longest(labels, factors, fillvalue=1.0):
        runs = results.measured[label].by_run.items()
        values |= {run: by_image(rows, measure, factor) for run, rows in runs}
    common, draws = shared(values)[0], results.profile.prism.bootstrap_draws
    return bootstrap_models(common, draws, results.profile.seed)[AVERAGE] if all(common.values()) else None


def measure_of(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Reads a measure's average from a run's record."""
    return lambda record: record["values"].get("said", {}).get(name)


def _cell(results: Results, name: str, part: Bootstrap | None, ours: str, theirs: str | None = None) -> Cell:
    """A row's value, its interval beside the raw number alone; or a difference, with its interval in print."""
    if part is None:
        return Cell(numbers.MISSING)
    measure, found = MEASURES[name], results.contrast(part, ours, theirs, results.spread(measure_of(name)))
    sources = [s for side in (ours, theirs) if side for s in results.measured[side].samples(measure.column)]
    text = _gap(measure, found) if theirs else _plain(measure, found.value)
    return Cell(text, found.value, (found.low, found.high), tuple(sources))


def _plain(measure: Measure, value: float) -> str:
    return numbers.percent(value) if measure.share else numbers.numbers([value], measure.decimals)[0]


def _gap(measure: Measure, found: Interval) -> str:
    if measure.share:
        return numbers.gap(found.value, found.low, found.high)
    first, *ends = numbers.numbers([found.value, found.low, found.high], measure.decimals)
    return f"{'+' if found.value > 0 else ''}{first} [{', '.join(ends)}]"


def budget_table(results: Results) -> Table:
    """The race at equal length: the average of every captioner under each token budget, of joined captions, and how
    far ours is ahead.
    """
    budgets = sorted({found.row.budget for found in results.measured.values() if found.row.budget})
    there, (ours, theirs) = results.measured, results.item.pairs[0]
    labels = [label for label, found in there.items() if not found.row.bound]
    rows = [(name, [*(_average(results, budget_label(name, n)) for n in budgets), _average(results, name)])
            for name in labels]  # fmt: skip
    joined = next((name for name, found in there.items() if found.row.runs[0].endswith("-joined")), None)
    if joined:
        rows.append((joined, [*[Cell(numbers.MISSING)] * len(budgets), _average(results, joined)]))
    sides = [*((budget_label(ours, n), budget_label(theirs, n)) for n in budgets), (ours, theirs)]
    rows.append((f"{ours} − {theirs}", [_average(results, *pair) for pair in sides]))
    length = numbers.number(there[joined].mean_of("caption_tokens")) if joined else numbers.MISSING
    heads = [*(f"First {n} tokens" for n in budgets), "Whole captions"]
    notes = [texts()["notes"]["budgets"].format(joined=length)]
    return Table(
        "budgets",
        "At equal length: accuracy (%) with 95 % interval",
        "Captioner",
        heads,
        rows if budgets else [],
        notes,
    )


def _average(results: Results, ours: str, theirs: str | None = None) -> Cell:
    """Average accuracy of a row, or of a comparison the difference; a dash where one was not evaluated."""
    sides = [side for side in (ours, theirs) if side]
    if not results.measured.keys() >= {*sides}:
        return Cell(numbers.MISSING)
    found = results.difference(ours, theirs) if theirs else results.interval(ours, AVERAGE)
    text = (numbers.gap if theirs else numbers.bounded)(found.value, found.low, found.high)
    sources = tuple(source for side in sides for source in results.measured[side].sources(AVERAGE))
    return Cell(text, found.value, (found.low, found.high), sources)


def false_over_steps(profile: Profile, curves: Sequence[Curve]) -> list[list[float]]:
    """False statements a caption at every step of each training, by the captions that are kept of it (the group of one
    image); empty where none are kept or the facts of the images are not known.
    """
    files = [from_record_path(curve.file).with_name("samples.jsonl") for curve in curves]
    if not drawn_source(profile.images.source) or not all(file.is_file() for file in files):
        return []
    metas, found = {image.id: image.meta for image in open_images(profile)}, []
    for curve, file in zip(curves, files, strict=True):
        note_access(file)
        by_step: dict[int, list[int]] = {}
        for row in map(json.loads, file.read_bytes().splitlines()):
            by_step.setdefault(row["step"], []).append(false(counts(row["caption"], metas[row["image_id"]])))
        found.append([sum(by_step[step]) / len(by_step[step]) for step in curve.steps])
    return found
