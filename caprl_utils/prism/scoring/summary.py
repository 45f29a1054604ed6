"""Counts that belong beside every mean: not scored, not read, judged otherwise by the other mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from caprl_utils.prism.scoring.caprl import GOLD_UNPARSED
from caprl_utils.prism.scoring.types import Score


@dataclass(frozen=True, slots=True)
class Summary:
    """Scores of one benchmark in one mode.

    mean: None if any row has no score; a mean over the rest would favour what needs no judge.
    unparsed: rows without a readable answer; they score 0 and count in the mean.
    gold_unparsed: rows whose gold the parser rejects (mode caprl: they score 1).
    disagreeing: rows that the other mode scores otherwise; None if it was not given.
    """

    rows: int
    mean: float | None
    unscored: int
    unparsed: int
    gold_unparsed: int
    disagreeing: int | None


def summarise(scores: Sequence[Score], other_mode: Sequence[Score] | None = None) -> Summary:
    """Sum up the scores of one benchmark; `other_mode` holds the same rows scored in the other mode.

    Raises ValueError if the two are not of the same length.
    """
    values = [score.value for score in scores if score.value is not None]
    disagreeing = None
    if other_mode is not None:
        disagreeing = sum(a.value != b.value for a, b in zip(scores, other_mode, strict=True))
    return Summary(
        rows=len(scores),
        mean=sum(values) / len(values) if values and len(values) == len(scores) else None,
        unscored=len(scores) - len(values),
        unparsed=sum(score.parsed is None for score in scores if score.value is not None),
        gold_unparsed=sum(score.reason == GOLD_UNPARSED for score in scores),
        disagreeing=disagreeing,
    )
