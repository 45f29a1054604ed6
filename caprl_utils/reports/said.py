"""Tables beside accuracies: what captions say against known facts, at equal length, and whether readers are valid."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

from caprl_utils import paths
from caprl_utils.files import note_access
from caprl_utils.image_sources import open_images
from caprl_utils.prism import probes
from caprl_utils.prism.scores import sample_scores
from caprl_utils.prism.statistics import AVERAGE, Bootstrap, Interval, Scores, bootstrap_models
from caprl_utils.prism.told import MEASURES, by_image, counts, false
from caprl_utils.registry import drawn_source
from caprl_utils.reports import numbers
from caprl_utils.reports.items import budget_label, texts
from caprl_utils.reports.numbers import Cell, Source, Table, from_record_path, record_path
from caprl_utils.reports.results import Curve, Measured, Results, shared
from caprl_utils.rl import judge_trial
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

TITLES = {"prism_reader": "Reader of the evaluation", "reward_reader": "Reader of the reward"}


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
    if theirs:
        return numbers.cell_of(found, sources, partial(numbers.gap, decimals=measure.decimals))
    text = numbers.percent(found.value) if measure.share else numbers.numbers([found.value], measure.decimals)[0]
    return Cell(text, found.value, (found.low, found.high), tuple(sources))


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
    caption = "From the first tokens of each caption: accuracy (%) with 95 % interval"
    return Table("budgets", caption, "Captioner", heads, rows if budgets else [], notes)


def _average(results: Results, ours: str, theirs: str | None = None) -> Cell:
    """Average accuracy of a row, or of a comparison the difference; a dash where one was not evaluated."""
    sides = [side for side in (ours, theirs) if side]
    if not results.measured.keys() >= {*sides}:
        return Cell(numbers.MISSING)
    sources = [source for side in sides for source in results.measured[side].sources(AVERAGE)]
    if theirs:
        return numbers.cell_of(results.difference(ours, theirs), sources, numbers.gap)
    return numbers.cell_of(results.interval(ours, AVERAGE), sources)


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


@dataclass(frozen=True)
class Point:
    """What a reader made of one probe: mean tokens of the captions, accuracy over all benchmarks (None where only some
    of their questions can be asked), and over those whose questions have options.
    """

    tokens: float
    whole: Interval | None
    options: Interval | None


def points(profile: Profile, reader: Measured) -> dict[str, Point]:
    """Probe -> what came out."""
    rows = {
        name: [row for row in reader.rows if row["caption_index"] == place]
        for place, name in enumerate(probes.names(profile))
    }  # fmt: skip
    asked_freely = {row["benchmark"] for row in reader.rows if not row["options"]}
    whole = {name: sample_scores(found) for name, found in rows.items() if name != probes.OPTIONS}
    options = {name: sample_scores([row for row in found if row["benchmark"] not in asked_freely])
               for name, found in rows.items()}  # fmt: skip
    last = {probes.OPTIONS: options.pop(probes.OPTIONS)}
    wholes, of_options, of_last = (_averages(profile, scores) for scores in (whole, options, last))
    return {
        name: Point(sum(row["num_tokens"] for row in found) / len(found), wholes.get(name),
                    (of_options | of_last).get(name))
        for name, found in rows.items() if found
    }  # fmt: skip


def _averages(profile: Profile, scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, Interval]:
    """Probe -> average over the benchmarks; empty where there are none."""
    if not all(scores.values()):
        return {}
    average = bootstrap_models(scores, profile.prism.bootstrap_draws, profile.seed)[AVERAGE]
    return {name: average.interval(name) for name in scores}


def readers_table(results: Results) -> Table:
    """Every probe with what both readers made of it."""
    found = {role: points(results.profile, reader) for role, reader in results.readers.items()}
    rows = []
    for name in next(iter(found.values()), {}):
        tokens, cells = next(iter(found.values()))[name].tokens, []
        for role, reader in results.readers.items():
            parts = found[role][name].whole, found[role][name].options
            cells += [numbers.cell_of(part, reader.samples("score")) for part in parts]
        rows.append((name, [Cell(numbers.number(tokens), tokens, None, reader.samples("num_tokens")), *cells]))
    heads = [head for role in found for head in (TITLES[role], f"{TITLES[role]}, questions with options")]
    caption = "Are the readers valid? Accuracy (%) with 95 % interval from captions made of known facts"
    return Table("readers", caption, "Caption", ["Tokens", *heads], rows, [texts()["notes"]["readers"]])


JUDGES = {"vlm_judge": "VLM judge", "reward_judge": "rating judge"}


def judges_table(results: Results) -> Table:
    """How often either judge scores the better of two captions higher, where that was tried (`rl.judge_trial`)."""
    home = paths.RUNS / results.profile.name / judge_trial.STAGE
    files = {name: home / role / "result.json" for role, name in JUDGES.items()}
    files, cells = {name: file for name, file in files.items() if file.is_file()}, {}
    for file in files.values():
        for pair, share in load_result(file)["values"]["pairs"].items():
            source = Source(record_path(file), f"values/pairs/{pair}")
            cells.setdefault(pair, []).append(Cell(numbers.percent(share), share, None, (source,)))
    caption = "Are the judges valid? How often the better of two captions of known facts is scored higher (%)"
    return Table("judges", caption, "Better and worse", [*files], list(cells.items()), [texts()["notes"]["judges"]])


FOOTING = ("told", "false share", "not shown", "repeats", "tokens")  # of MEASURES
BY_REWARD = ", by the reward's reader"  # what labels of rows end with that it reads (configs/reports.yaml)


def footing_table(results: Results) -> Table:
    """Rewards on one footing: what each taught by both readers and by the known facts, and what it cost. Each row is
    over its own images: one that states nothing leaves the others whole.
    """
    labels = [label for label, found in results.measured.items() if not found.row.bound]
    costs = {"reward_calls": "Reward calls a step", "seconds_reward": "Seconds for the reward", "seconds": "of a step"}
    rows = []
    for label in labels:
        cells = [_average(results, label), _average(results, f"{label}{BY_REWARD}")]
        cells += [_cell(results, name, resampled(results, [label], name), label) for name in FOOTING]
        rows.append((label, [*cells, *(_cost(results.measured[label], key) for key in costs)]))
    heads = ["Accuracy (%)", "by the reward's reader", *(MEASURES[name].head for name in FOOTING), *costs.values()]
    caption = "What each reward teaches: accuracy (%) with 95 % interval, what captions say, cost"
    return Table(f"{results.item.name}_footing", caption, "Trained with", heads, rows, [texts()["notes"]["footing"]])


def _cost(found: Measured, key: str) -> Cell:
    """Mean over a row's trainings of a number a step; a dash where it was not trained or not recorded."""
    values = [record["values"].get(key) for record in found.trainings.values()]
    if not values or None in values:
        return Cell(numbers.MISSING)
    sources = tuple(Source(file, f"values/{key}") for file in found.trainings)
    mean = sum(values) / len(values)
    return Cell(numbers.number(mean), mean, None, sources)


def trade_off(results: Results) -> dict[str, tuple[Interval, Interval, float]]:
    """Row -> (facts told, share of false statements, tokens a caption), of rows that state something; empty where no
    facts are known.
    """
    found = {}
    for label in (label for label, one in results.measured.items() if not one.row.bound):
        parts = {name: resampled(results, [label], name) for name in ("told", "false share")}
        if None not in parts.values():
            told, false = (
                results.contrast(part, label, None, results.spread(measure_of(name))) for name, part in parts.items()
            )
            found[label] = told, false, results.measured[label].mean_of("caption_tokens")
    return found


def verifier_table(results: Results) -> Table:
    """How often the verifier of the correctness reward errs, where that was tried (`rl.judge_trial.verify`)."""
    file = paths.RUNS / results.profile.name / judge_trial.STAGE / judge_trial.VERIFIER / "result.json"
    record = load_result(file)["values"] if file.is_file() else {}
    rows = []
    for kind, found in record.items():
        cells = [Cell(numbers.count(found["sentences"]), found["sentences"])]
        cells.append(Cell(numbers.percent(found["error"]), found["error"]))
        sources = [Source(record_path(file), f"values/{kind}/{key}") for key in ("sentences", "error")]
        rows.append((kind, [replace(c, sources=(s,)) for c, s in zip(cells, sources, strict=True)]))
    caption = "The verifier's own error on held-out pictures: sentences that it takes for the opposite (%)"
    notes = [texts()["notes"]["verifier"]]
    return Table("verifier", caption, "Sentence", ["Sentences", "Taken for the opposite (%)"], rows, notes)
