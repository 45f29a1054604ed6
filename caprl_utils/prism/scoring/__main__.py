"""`python -m caprl_utils.prism.scoring --vectors FILE.jsonl`: check the scorer against test vectors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from caprl_utils.errors import UserError
from caprl_utils.prism.scoring import score_batch, version_record
from caprl_utils.prism.scoring.types import Score
from caprl_utils.prism.scoring.vectors import Vector, read_vectors


def main(arguments: list[str] | None = None) -> int:
    """Print every failure and `N passed, M failed`; 1 on any failure, 2 where there is no usable file.

    A line that is no vector, or that the scorer refuses, counts as failed; the others are scored.
    """
    parser = argparse.ArgumentParser(prog="python -m caprl_utils.prism.scoring", description=__doc__)
    parser.add_argument("--vectors", type=Path, required=True, metavar="FILE.jsonl", help="test vectors")
    path = parser.parse_args(arguments).vectors
    try:
        vectors, broken = read_vectors(path)
        if warning := version_record().get("warning"):
            print(f"warning: {warning}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failures = [f"FAILED line {line.line} of {path}: {line.reason}" for line in broken]
    for vector, score in zip(vectors, _score(vectors), strict=True):
        if isinstance(score, UserError):
            failures.append(f"FAILED line {vector.line} of {path}: {score}")
        elif not vector.accepts(score.value):
            failures.append(_failure(vector, score))
    print(*failures, sep="\n", end="\n" if failures else "")
    print(f"{len(vectors) + len(broken) - len(failures)} passed, {len(failures)} failed")
    return 1 if failures else 0


def _score(vectors: Sequence[Vector]) -> list[Score | UserError]:
    """A score for each vector, or why it could not be scored."""
    scores: dict[int, Score | UserError] = {}
    for mode in ("caprl", "standard"):
        group = [vector for vector in vectors if vector.mode == mode]
        try:
            found = score_batch([vector.row for vector in group], mode)
        except UserError:  # one of them: find it
            found = [_alone(vector) for vector in group]
        scores.update(zip((vector.line for vector in group), found, strict=True))
    return [scores[vector.line] for vector in vectors]


def _alone(vector: Vector) -> Score | UserError:
    try:
        return score_batch([vector.row], vector.mode)[0]
    except UserError as error:
        return error


def _failure(vector: Vector, score: Score) -> str:
    row = vector.row
    return (
        f"FAILED line {vector.line}: {row.benchmark} ({vector.mode}) prediction {row.prediction!r} "
        f"gold {row.gold!r}: expected {vector.expected}, got {score.value} "
        f"(parsed {score.parsed!r}, {score.reason or 'no remark'})"
    )


if __name__ == "__main__":
    sys.exit(main())
