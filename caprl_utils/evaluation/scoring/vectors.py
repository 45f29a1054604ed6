"""Test vectors: one JSON object per line with a row, a mode and the expected value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caprl_utils.errors import UserError
from caprl_utils.evaluation.scoring.symbolic import MATH_VERIFY_VERSION
from caprl_utils.evaluation.scoring.types import Mode, Row

TOLERANCE = 1e-6  # expected values are rounded to six decimals


@dataclass(frozen=True, slots=True)
class Vector:
    """One vector; `expected` is the value for the pinned math-verify, None for "no score"."""

    line: int
    row: Row
    mode: Mode
    expected: float | None

    def accepts(self, value: float | None) -> bool:
        if value is None or self.expected is None:
            return value is self.expected
        return abs(value - self.expected) <= TOLERANCE


def read_vectors(path: Path) -> list[Vector]:
    """All vectors of a JSONL file. Raises UserError naming file and line."""
    if not path.is_file():
        raise UserError(f"no test vectors at {path}: give a JSONL file")
    return list(_parse(path))


def _parse(path: Path) -> Iterator[Vector]:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            data = json.loads(text)
            meta = data.get("meta") or {}
            if data["mode"] not in ("caprl", "standard"):
                raise UserError(f"{path}, line {number}: mode is {data['mode']!r}, not 'caprl' or 'standard'")
            row = Row(data["benchmark"], data["prediction"], data["gold"], meta)
            expected = (meta.get("math_verify") or {}).get(MATH_VERIFY_VERSION, data["expected"])
            yield Vector(number, row, data["mode"], None if expected is None else float(expected))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}, line {number}: not a test vector ({detail})") from error
