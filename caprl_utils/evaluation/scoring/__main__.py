"""`python -m caprl_utils.evaluation.scoring --vectors FILE.jsonl`: check the scorer against test vectors."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from caprl_utils.errors import UserError
from caprl_utils.evaluation.scoring import score_batch, version_record
from caprl_utils.evaluation.scoring.types import Score
from caprl_utils.evaluation.scoring.vectors import Vector, read_vectors


def main(arguments: list[str] | None = None) -> int:
    """Print every failure and `N passed, M failed`; 1 on any failure, 2 on an unusable file."""
    parser = argparse.ArgumentParser(prog="python -m caprl_utils.evaluation.scoring", description=__doc__)
    parser.add_argument("--vectors", type=Path, required=True, metavar="FILE.jsonl", help="test vectors")
    path = parser.parse_args(arguments).vectors
    try:
        vectors = read_vectors(path)
        scores = _score(vectors)
        if warning := version_record().get("warning"):
            print(f"warning: {warning}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [(v, s) for v, s in zip(vectors, scores, strict=True) if not v.accepts(s.value)]
    for vector, score in failed:
        print(_failure(vector, score))
    print(f"{len(vectors) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def _score(vectors: list[Vector]) -> list[Score]:
    scores: list[Score | None] = [None] * len(vectors)
    for mode in ("caprl", "standard"):
        places = [index for index, vector in enumerate(vectors) if vector.mode == mode]
        for index, score in zip(places, score_batch([vectors[i].row for i in places], mode), strict=True):
            scores[index] = score
    return [score for score in scores if score is not None]


def _failure(vector: Vector, score: Score) -> str:
    row = vector.row
    return (
        f"FAILED line {vector.line}: {row.benchmark} ({vector.mode}) prediction {row.prediction!r} "
        f"gold {row.gold!r}: expected {vector.expected}, got {score.value} "
        f"(parsed {score.parsed!r}, {score.reason or 'no remark'})"
    )


if __name__ == "__main__":
    sys.exit(main())
