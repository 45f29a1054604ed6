"""Scoring one row or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.scoring import caprl, fast, symbolic, workers
from caprl_utils.prism.scoring.standard import score_standard
from caprl_utils.prism.scoring.types import Judge, Mode, Row, Score

_verified: dict[workers.Pair, caprl.Verdict] = {}  # what math-verify said in this process, by pair

NEVER_ENDED = f"the comparison did not end within {workers.HARD_LIMIT_SEC:.0f} s and was stopped"


def score(
    benchmark: str,
    prediction: Any,
    gold: Any,
    mode: Mode = "standard",
    meta: Mapping[str, Any] | None = None,
    *,
    judge: Judge | None = None,
) -> Score:
    """Score one answer. See `Row` for the arguments and `Score` for what comes back."""
    return score_batch([Row(benchmark, prediction, gold, meta or {})], mode, judge=judge)[0]


def score_batch(
    rows: Sequence[Row],
    mode: Mode,
    *,
    judge: Judge | None = None,
    processes: int | None = None,
) -> list[Score]:
    """Score rows in one mode, in their order.

    Args:
        mode: "caprl" (the authors' scorer) or "standard" (each benchmark's metric).
        judge: used in standard mode by the metrics that need one; without it those rows have no value.
        processes: worker processes for math-verify, see `workers.verdicts`.

    Raises:
        UserError: unknown mode or benchmark, or a row that its metric cannot take.
    """
    if mode == "standard":
        return score_standard(rows, judge)
    if mode != "caprl":
        raise UserError(f"unknown scoring mode {mode!r}: use 'caprl' or 'standard'")
    branches = {key: _branch(key) for key in {row.benchmark for row in rows}}
    answers = [caprl.extract(_text(row)) for row in rows]
    pairs = [(answer or "", str(row.gold)) for answer, row in zip(answers, rows, strict=True)]
    known = symbolic_verdicts(pairs, processes)
    return [
        Score(None, answer, NEVER_ENDED)
        if known[pair] is None
        else caprl.combine(answer, row.gold, branches[row.benchmark], known[pair])
        for row, answer, pair in zip(rows, answers, pairs, strict=True)
    ]


def symbolic_verdicts(
    pairs: Sequence[workers.Pair],
    processes: int | None = None,
) -> dict[workers.Pair, caprl.Verdict | None]:
    """The verdict of every distinct pair: from an earlier call, by a proven shortcut, else by math-verify."""
    known = {pair: _verified.get(pair) or fast.known_verdict(*pair) for pair in set(pairs)}
    open_pairs = sorted(pair for pair, verdict in known.items() if verdict is None)
    found = dict(zip(open_pairs, workers.verdicts(open_pairs, processes), strict=True))
    if len(_verified) + len(found) > fast.CACHE_SIZE:
        _verified.clear()
    _verified.update((pair, verdict) for pair, verdict in found.items() if verdict is not None)
    return known | found


def forget() -> None:
    """Drop everything remembered from earlier calls (for timing)."""
    _verified.clear()
    fast.shape.cache_clear()
    symbolic.forget()


def _text(row: Row) -> str:
    if not isinstance(row.prediction, str):
        raise UserError(
            f"benchmark {row.benchmark!r}: mode 'caprl' takes the reader's complete answer as text, "
            f"not {type(row.prediction).__name__}"
        )
    return row.prediction


def _branch(benchmark: str) -> caprl.Branch:
    facts = get_benchmark(benchmark).caprl
    if facts is None:
        raise UserError(f"benchmark {benchmark!r} has no branch in the authors' scorer: use mode 'standard'")
    return facts.branch
