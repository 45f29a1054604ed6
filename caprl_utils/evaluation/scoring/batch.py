"""Scoring one row or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.evaluation.benchmarks import get_benchmark
from caprl_utils.evaluation.scoring import caprl
from caprl_utils.evaluation.scoring.standard import score_standard
from caprl_utils.evaluation.scoring.types import Mode, Row, Score


def score(
    benchmark: str,
    prediction: Any,
    gold: Any,
    mode: Mode = "standard",
    meta: Mapping[str, Any] | None = None,
) -> Score:
    """Score one answer. See `Row` for the arguments and `Score` for what comes back."""
    return score_batch([Row(benchmark, prediction, gold, meta or {})], mode)[0]


def score_batch(rows: Sequence[Row], mode: Mode) -> list[Score]:
    """Score rows in one mode, in their order."""
    if mode == "standard":
        return [score_standard(row) for row in rows]
    if mode != "caprl":
        raise UserError(f"unknown scoring mode {mode!r}: use 'caprl' or 'standard'")
    scores = []
    for row in rows:
        branch = _branch(row.benchmark)
        answer = caprl.extract(str(row.prediction))
        verdict = caprl.reference_verdict(answer or "", str(row.gold))
        scores.append(caprl.combine(answer, row.gold, branch, verdict))
    return scores


def _branch(benchmark: str) -> caprl.Branch:
    facts = get_benchmark(benchmark).caprl
    if facts is None:
        raise UserError(f"benchmark {benchmark!r} has no branch in the authors' scorer: use mode 'standard'")
    return facts.branch
