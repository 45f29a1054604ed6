"""Are the readers valid? Their accuracy from captions that are known to be true, long, padded, empty or foreign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from caprl_utils.prism import probes
from caprl_utils.prism.scores import sample_scores
from caprl_utils.prism.statistics import AVERAGE, Interval, Scores, bootstrap_models
from caprl_utils.reports import numbers
from caprl_utils.reports.items import texts
from caprl_utils.reports.numbers import Cell, Source, Table
from caprl_utils.reports.results import Measured, Results
from caprl_utils.schema import Profile

TITLES = {"prism_reader": "Reader of the evaluation", "reward_reader": "Reader of the reward"}


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


def _cell(part: Interval | None, sources: tuple[Source, ...]) -> Cell:
    """An accuracy with its interval; a dash where a probe cannot be asked."""
    if part is None:
        return Cell(numbers.MISSING, sources=sources)
    text = numbers.bounded(part.value, part.low, part.high)
    return Cell(text, part.value, (part.low, part.high), sources)


def readers_table(results: Results) -> Table:
    """Every probe with what both readers made of it."""
    found = {role: points(results.profile, reader) for role, reader in results.readers.items()}
    rows = []
    for name in next(iter(found.values()), {}):
        tokens, cells = next(iter(found.values()))[name].tokens, []
        for role, reader in results.readers.items():
            parts = found[role][name].whole, found[role][name].options
            cells += [_cell(part, reader.samples("score")) for part in parts]
        rows.append((name, [Cell(numbers.number(tokens), tokens, None, reader.samples("num_tokens")), *cells]))
    heads = [head for role in found for head in (TITLES[role], f"{TITLES[role]}, questions with options")]
    caption = "Are the readers valid? Accuracy (%) with 95 % interval from captions made of known facts"
    return Table("readers", caption, "Caption", ["Tokens", *heads], rows, [texts()["notes"]["readers"]])
