"""What the scorer takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Mode = Literal["caprl", "standard"]


@dataclass(frozen=True, slots=True)
class Score:
    """One verdict.

    value: 0 to 1; None when the sample could not be scored (no judge, a comparison that never ended).
    parsed: the answer that was compared; None when none was found in the text (such answers score 0).
    reason: what a reader of the row should know: why there is no value or no answer, or by which
        detour the value came about. None when there is nothing to say.
    """

    value: float | None
    parsed: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to score.

    benchmark: a key of configs/benchmarks.yaml.
    prediction: in mode "caprl" the complete completion of the reader; in mode "standard" a completion
        or a short answer. A list over the rotations for a circular question.
    gold: one gold answer, or the list of accepted ones where the benchmark has a list.
    meta: what the metric needs: options, question_type, year, answer_type, choices, precision, group,
        rotations (options of each), question (for a judge).
    """

    benchmark: str
    prediction: Any
    gold: Any
    meta: Mapping[str, Any] = field(default_factory=dict)


class Judge(Protocol):
    """A model that grades or extracts answers: prompts in, texts out, None for a call that failed.

    `name` and version go into the result record, because the judge moves the score by points.
    """

    name: str

    def __call__(self, prompts: Sequence[str]) -> Sequence[str | None]: ...
