"""Statements of the paper, each tested on our runs by an interval, never by a look.

A claim that something is higher: supported when the 95 % interval of the paired difference lies above zero, not
supported when it lies below, else undecided. A claim that more brings no gain: supported when the interval ends below
`MARGIN`, not supported when it lies above zero. A claim that one is as good as another: supported when the interval
begins above minus `MARGIN`, not supported when it lies below zero. What the mini world has built in is no finding:
its verdict is `BY_CONSTRUCTION`, whatever the interval.

Verdicts go by the interval alone. Beside those of accuracy stands a p-value corrected after Holm over the item's tests
(`corrected`), so that a reader sees which of many would not stand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from caprl_utils.prism.statistics import (
    AVERAGE,
    Bootstrap,
    Interval,
    Scores,
    bootstrap_models,
    holm,
    macro_average,
)
from caprl_utils.reports import captioners, numbers
from caprl_utils.reports.results import Results
from caprl_utils.reports.tables import Source
from caprl_utils.schema import Profile

MARGIN = 0.01  # ours: a gain of less than one point counts as none
BY_CONSTRUCTION = "by construction"
WINDOW_STEPS = 10  # steps at either end of a training curve that are compared
_Z95 = 1.959964


@dataclass(frozen=True)
class Claim:
    """One statement: `ours` against `theirs`, both labels of rows.

    kind: "accuracy" (of the average, or of `benchmarks` if the profile has any of them), "no gain" and "as good" (the
    same, other verdict), "larger gain" (of `ours` over `theirs` on `benchmarks` than on `others`), "tokens" (caption
    length in the evaluation; `share` of ours), "reward" (last against first steps of the training of `ours`).
    built_in: why its outcome is no finding where the captioners are the mini world's.
    """

    text: str
    ours: str
    theirs: str = ""
    kind: Literal["accuracy", "no gain", "as good", "larger gain", "tokens", "reward"] = "accuracy"
    benchmarks: Sequence[str] = ()
    others: Sequence[str] = ()
    share: float = 1.0
    built_in: str = ""

    def tested(self, profile: Profile) -> bool:
        """Whether the data of a profile could have decided otherwise."""
        return not (self.built_in and captioners.of_zoo(profile))

    @property
    def subtraction(self) -> str:
        """What its value is of: "A − B"."""
        ours = self.ours if self.share == 1 else f"{self.share:g} × {self.ours}"
        return f"{ours} − {self.theirs}"


@dataclass(frozen=True)
class Finding:
    """A claim and what the data say about it.

    runs: evaluated runs of ours and of theirs (trainings, for a reward). images, steps: what the interval is over.
    sources: where the numbers stand that were compared. p: corrected, of kind accuracy alone.
    """

    claim: Claim
    value: float
    low: float
    high: float
    verdict: str
    runs: tuple[int, ...] = ()
    images: int | None = None
    steps: int | None = None
    sources: tuple[Source, ...] = ()
    p: float | None = None

    @property
    def reason(self) -> str:
        """Why the outcome is built in; empty where it was tested."""
        return self.claim.built_in if self.verdict == BY_CONSTRUCTION else ""

    def line(self, pairs: Sequence[tuple[str, str]] = ()) -> str:
        """One line of the report. pairs: rows of the differences above it; a value that none of them holds says what
        it is of.
        """
        claim, text = self.claim, printed(self.claim.kind, self.value, self.low, self.high, self.p)
        if claim.theirs and (claim.kind == "tokens" or (claim.ours, claim.theirs) not in pairs):
            text = f"{claim.subtraction}: {text}"
        reason = f" {self.reason[0].upper()}{self.reason[1:]}." if self.reason else ""
        return f"- {claim.text}: **{self.verdict}**, {text}.{reason}"

    def as_json(self) -> dict[str, Any]:
        """Raw values."""
        return {
            "text": self.claim.text, "kind": self.claim.kind, "ours": self.claim.ours,
            "theirs": self.claim.theirs, "value": self.value, "interval": [self.low, self.high],
            "p": self.p, "verdict": self.verdict, "reason": self.reason, "runs": list(self.runs),
            "images": self.images, "steps": self.steps,
            "sources": [{"file": s.file, "key": s.key} for s in self.sources],
        }  # fmt: skip


def printed(kind: str, value: float, low: float, high: float, p: float | None = None) -> str:
    """A claim's difference with its unit and interval, and its p-value if it has one."""
    if kind in ("tokens", "reward"):
        first, *ends = numbers.numbers([value, low, high], decimals=1 if kind == "tokens" else 3)
        unit = " tokens" if kind == "tokens" else ""
        return f"{'+' if value > 0 else ''}{first}{unit} [{', '.join(ends)}]"
    text = f"{numbers.difference(value)} points {numbers.interval((low, high), signed=True)}"
    return text if p is None else f"{text}, {numbers.p_value(p)}"


# What is compared, in either order, and on which benchmarks; () is the average.
Test = tuple[frozenset[str], tuple[str, ...]]


def corrected(
    results: Results, pairs: Sequence[tuple[str, str]], claims: Sequence[Claim] = ()
) -> dict[Test, float]:
    """p-values after Holm over an item's tests: its pairs on the average, and its claims of kind accuracy.

    A pair and the claim on it are one test, whichever stands first. Claims that are built in are no tests.
    """
    stated = [c for c in claims if c.kind == "accuracy" and c.tested(results.profile)]
    asked = [*((*pair, ()) for pair in pairs), *((c.ours, c.theirs, c.benchmarks) for c in stated)]
    known = [test for test in asked if all(side in results.measured for side in test[:2])]
    return holm({_test(*test): accuracy_difference(results, *test).p_value for test in known})


def p_of(found: Mapping[Test, float], ours: str, theirs: str, benchmarks: Sequence[str] = ()) -> float | None:
    """The corrected p-value of one test; None when it is none of the item's."""
    return found.get(_test(ours, theirs, benchmarks))


def _test(ours: str, theirs: str, benchmarks: Sequence[str] = ()) -> Test:
    return frozenset((ours, theirs)), tuple(benchmarks)


def test_all(
    claims: Sequence[Claim],
    results: Results,
    pairs: Sequence[tuple[str, str]],
    curves: Mapping[str, Sequence[float]] | None = None,
) -> list[Finding]:
    """What the data say about an item's claims, those left out whose runs are not there. pairs: that it compares."""
    adjusted = corrected(results, pairs, claims)
    found = [finding for claim in claims if (finding := test(claim, results, curves or {})) is not None]
    return [
        replace(f, p=p_of(adjusted, f.claim.ours, f.claim.theirs, f.claim.benchmarks))
        if f.claim.kind == "accuracy" and not f.reason
        else f
        for f in found
    ]


def test(claim: Claim, results: Results, curves: Mapping[str, Sequence[float]]) -> Finding | None:
    """The verdict of the data; None when a run that the claim needs is not there, or too short for it.

    curves: label -> reward per step.
    """
    if claim.kind == "reward":
        if claim.ours not in curves:
            return None
        if (risen := rise(curves[claim.ours])) is None:
            return None
        value, low, high = risen
        steps = len(curves[claim.ours])
        return Finding(claim, value, low, high, verdict(low, high), (1,), None, steps, _curve(claim, results))
    if claim.ours not in results.measured or claim.theirs not in results.measured:
        return None
    gap = _gap(claim, results)
    if gap is None:
        return None
    judge = {"no gain": no_gain, "as good": as_good}.get(claim.kind, verdict)
    word = judge(gap.low, gap.high) if claim.tested(results.profile) else BY_CONSTRUCTION
    sides = [results.measured[label] for label in (claim.ours, claim.theirs)]
    return Finding(
        claim, gap.value, gap.low, gap.high, word,
        tuple(len(side.names) for side in sides), gap.num_clusters,
        sources=tuple(s for side in sides for keys in _compared(claim, results) for s in side.sources(*keys)),
    )  # fmt: skip


def _gap(claim: Claim, results: Results) -> Interval | None:
    if claim.kind == "tokens":
        return token_difference(results, claim.ours, claim.theirs, claim.share)
    if claim.kind == "larger gain":
        return gain_difference(results, claim)
    return accuracy_difference(results, claim.ours, claim.theirs, claim.benchmarks)


def _compared(claim: Claim, results: Results) -> list[tuple[str, ...]]:
    """Keys of the values that a claim compares, in the records of its runs."""
    if claim.kind == "tokens":
        return [("caption_tokens",)]
    groups = [name for name in (*claim.benchmarks, *claim.others) if name in results.parts]
    return [("benchmarks", name, "mean") for name in groups] or [(AVERAGE,)]


def _curve(claim: Claim, results: Results) -> tuple[Source, ...]:
    """The training whose captioner was evaluated under the claim's label."""
    if claim.ours not in results.measured:
        return ()
    file = results.measured[claim.ours].files[0].replace("/prism/", "/rl/")
    return (Source(file.replace("result.json", "curve.jsonl"), "reward"),)


def verdict(low: float, high: float) -> str:
    """A claim that a difference is positive, by its 95 % interval."""
    if low > 0:
        return "supported"
    return "not supported" if high < 0 else "undecided"


def no_gain(low: float, high: float) -> str:
    """A claim that more brings no gain."""
    if high < MARGIN:
        return "supported"
    return "not supported" if low > 0 else "undecided"


def as_good(low: float, high: float) -> str:
    """A claim that ours is as good as theirs: no worse by `MARGIN` or more."""
    if low > -MARGIN:
        return "supported"
    return "not supported" if high < 0 else "undecided"


def accuracy_difference(results: Results, ours: str, theirs: str, benchmarks: Sequence[str] = ()) -> Interval:
    """Paired difference of two rows on the average, or on the mean of those of `benchmarks` that were measured."""
    return part_of(results, benchmarks).difference(ours, theirs)


def gain_difference(results: Results, claim: Claim) -> Interval | None:
    """How much more ours gains over theirs on `benchmarks` than on `others`; None where either were not measured."""
    groups = (claim.benchmarks, claim.others)
    if not all(any(name in results.parts for name in group) for group in groups):
        return None
    first, second = (part_of(results, group) for group in groups)
    both = Bootstrap(
        first.models, first.means - second.means, first.samples - second.samples,
        first.num_clusters + second.num_clusters, first.num_rows + second.num_rows,
    )  # fmt: skip
    return both.difference(claim.ours, claim.theirs)


def part_of(results: Results, benchmarks: Sequence[str] = ()) -> Bootstrap:
    """Resampled means over those of `benchmarks` that were measured; over all of them when none is."""
    chosen = [name for name in benchmarks if name in results.parts]
    return macro_average({name: results.parts[name] for name in chosen}) if chosen else results.parts[AVERAGE]


def token_difference(results: Results, ours: str, theirs: str, share: float = 1.0) -> Interval:
    """Paired difference in tokens per caption, `share` of ours less theirs, resampled by image as the scores are."""
    lengths = {
        label: caption_tokens(results.measured[label].rows, factor)
        for label, factor in ((ours, share), (theirs, 1.0))
    }
    settings = results.profile.prism
    parts = bootstrap_models(lengths, settings.bootstrap_draws, results.profile.seed)
    return parts[AVERAGE].difference(ours, theirs)


def caption_tokens(rows: Sequence[Mapping[str, Any]], factor: float = 1.0) -> dict[str, Scores]:
    """Benchmark -> (image, image) -> mean tokens of its captions, times `factor`."""
    found: dict[str, dict[tuple[str, str], dict[tuple[str, int], int]]] = {}
    for row in rows:
        if row["num_tokens"] is not None:
            captions = found.setdefault(row["benchmark"], {}).setdefault(
                (row["image_id"], row["image_id"]), {}
            )
            captions[row["caption"] or "", row["caption_index"]] = row["num_tokens"]
    return {
        name: {key: factor * sum(captions.values()) / len(captions) for key, captions in images.items()}
        for name, images in found.items()
    }


def rise(rewards: Sequence[float]) -> tuple[float, float, float] | None:
    """(last minus first, low, high): means over `WINDOW_STEPS` steps at either end, steps taken as independent.

    None for a training of less than four steps.
    """
    width = min(WINDOW_STEPS, len(rewards) // 2)
    if width < 2:
        return None
    means, spreads = [], []
    for part in (rewards[:width], rewards[-width:]):
        mean = sum(part) / width
        means.append(mean)
        spreads.append(sum((r - mean) ** 2 for r in part) / (width - 1) / width)
    value, half = means[1] - means[0], _Z95 * math.sqrt(sum(spreads))
    return value, value - half, value + half
