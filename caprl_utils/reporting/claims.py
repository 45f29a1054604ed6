"""Statements of the paper about its ablations, each tested on our runs by an interval, never by a look.

A claim that something is higher: supported when the 95 % interval of the paired difference lies above zero, not
supported when it lies below, else undecided. A claim that more brings no gain: supported when the interval ends below
`MARGIN`, not supported when it lies above zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from caprl_utils.evaluation.prism_compare import AVERAGE, Scores, bootstrap_models
from caprl_utils.evaluation.statistics import Bootstrap, Interval, macro_average
from caprl_utils.reporting import numbers
from caprl_utils.reporting.results import Results
from caprl_utils.reporting.table3 import verdict

MARGIN = 0.01  # ours: a gain of less than one point counts as none
WINDOW_STEPS = 10  # steps at either end of a training curve that are compared
_Z95 = 1.959964


@dataclass(frozen=True)
class Claim:
    """One statement: `ours` against `theirs`, both labels of rows.

    kind: "accuracy" (of the average, or of `benchmarks` if the profile has any of them), "tokens" (caption length in
    the evaluation), "no gain" (accuracy), "reward" (last against first steps of the training of `ours`).
    """

    text: str
    ours: str
    theirs: str = ""
    kind: Literal["accuracy", "no gain", "tokens", "reward"] = "accuracy"
    benchmarks: Sequence[str] = ()


@dataclass(frozen=True)
class Finding:
    """A claim and what the data say about it."""

    claim: Claim
    value: float
    low: float
    high: float
    verdict: str

    def line(self) -> str:
        """One line of the report."""
        if self.claim.kind == "tokens":
            first, low, high = numbers.numbers([self.value, self.low, self.high])
            text = f"{'+' if self.value > 0 else ''}{first} tokens [{low}, {high}]"
        elif self.claim.kind == "reward":
            first, low, high = numbers.numbers([self.value, self.low, self.high], decimals=3)
            text = f"{'+' if self.value > 0 else ''}{first} [{low}, {high}]"
        else:
            gap = numbers.difference(self.value)
            text = f"{gap} points {numbers.interval((self.low, self.high), signed=True)}"
        return f"- {self.claim.text}: **{self.verdict}**, {text}."

    def as_json(self) -> dict[str, Any]:
        """Raw values."""
        return {
            "text": self.claim.text, "kind": self.claim.kind, "ours": self.claim.ours,
            "theirs": self.claim.theirs, "value": self.value, "interval": [self.low, self.high],
            "verdict": self.verdict,
        }  # fmt: skip


def test(claim: Claim, results: Results, curves: Mapping[str, Sequence[float]]) -> Finding | None:
    """The verdict of the data; None when a run that the claim needs is not there. curves: label -> reward per step."""
    if claim.kind == "reward":
        if claim.ours not in curves:
            return None
        value, low, high = rise(curves[claim.ours])
        return Finding(claim, value, low, high, verdict(low, high))
    if claim.ours not in results.measured or claim.theirs not in results.measured:
        return None
    if claim.kind == "tokens":
        gap = token_difference(results, claim.ours, claim.theirs)
    else:
        gap = accuracy_difference(results, claim.ours, claim.theirs, claim.benchmarks)
    word = no_gain(gap.low, gap.high) if claim.kind == "no gain" else verdict(gap.low, gap.high)
    return Finding(claim, gap.value, gap.low, gap.high, word)


def accuracy_difference(results: Results, ours: str, theirs: str, benchmarks: Sequence[str] = ()) -> Interval:
    """Paired difference of two rows on the average, or on the mean of those of `benchmarks` that were measured."""
    return part_of(results, benchmarks).difference(ours, theirs)


def part_of(results: Results, benchmarks: Sequence[str] = ()) -> Bootstrap:
    """Resampled means over those of `benchmarks` that were measured; over all of them when none is."""
    chosen = [name for name in benchmarks if name in results.parts]
    return macro_average({name: results.parts[name] for name in chosen}) if chosen else results.parts[AVERAGE]


def token_difference(results: Results, ours: str, theirs: str) -> Interval:
    """Paired difference in tokens per caption, resampled by image as the scores are."""
    lengths = {label: caption_tokens(results.measured[label].rows) for label in (ours, theirs)}
    settings = results.profile.prism
    parts = bootstrap_models(lengths, settings.bootstrap_draws, results.profile.seed)
    return parts[AVERAGE].difference(ours, theirs)


def caption_tokens(rows: Sequence[Mapping[str, Any]]) -> dict[str, Scores]:
    """Benchmark -> (image, image) -> mean tokens of its captions."""
    found: dict[str, dict[tuple[str, str], dict[tuple[str, int], int]]] = {}
    for row in rows:
        if row["num_tokens"] is not None:
            captions = found.setdefault(row["benchmark"], {}).setdefault(
                (row["image_id"], row["image_id"]), {}
            )
            captions[row["caption"] or "", row["caption_index"]] = row["num_tokens"]
    return {
        name: {key: sum(captions.values()) / len(captions) for key, captions in images.items()}
        for name, images in found.items()
    }


def no_gain(low: float, high: float) -> str:
    """A claim that more brings no gain."""
    if high < MARGIN:
        return "supported"
    return "not supported" if low > 0 else "undecided"


def rise(rewards: Sequence[float]) -> tuple[float, float, float]:
    """(last minus first, low, high): means over `WINDOW_STEPS` steps at either end, steps taken as independent."""
    width = min(WINDOW_STEPS, len(rewards) // 2)
    if width < 2:
        return math.nan, -math.inf, math.inf
    means, spreads = [], []
    for part in (rewards[:width], rewards[-width:]):
        mean = sum(part) / width
        means.append(mean)
        spreads.append(sum((r - mean) ** 2 for r in part) / (width - 1) / width)
    value, half = means[1] - means[0], _Z95 * math.sqrt(sum(spreads))
    return value, value - half, value + half
