"""Test vectors: one JSON object per line with a row, a mode and the expected value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.scoring.symbolic import MATH_VERIFY_VERSION
from caprl_utils.prism.scoring.types import Mode, Row

FIELDS = ("benchmark", "prediction", "gold", "mode", "expected")
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


@dataclass(frozen=True, slots=True)
class Broken:
    """A line that is no vector, and why."""

    line: int
    reason: str


def read_vectors(path: Path) -> tuple[list[Vector], list[Broken]]:
    """All vectors of a JSONL file, and the lines that are none. Raises UserError where there is no such
    file, or nothing in it.
    """
    if not path.is_file():
        raise UserError(f"no test vectors at {path}: give a JSONL file")
    found = list(_parse(path))
    if not found:
        raise UserError(f"{path} is empty: one JSON object a line with {', '.join(FIELDS)}")
    vectors = [item for item in found if isinstance(item, Vector)]
    return vectors, [item for item in found if isinstance(item, Broken)]


def _parse(path: Path) -> Iterator[Vector | Broken]:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            yield _vector(number, json.loads(text))
        except (ValueError, UserError) as error:
            yield Broken(number, str(error))


def _vector(line: int, data: Any) -> Vector:
    if not isinstance(data, dict):
        raise UserError(f"a vector is a JSON object, not {type(data).__name__}")
    if missing := [name for name in FIELDS if name not in data]:
        raise UserError(f"missing {', '.join(missing)}")
    if data["mode"] not in ("caprl", "standard"):
        raise UserError(f"mode is {data['mode']!r}, not 'caprl' or 'standard'")
    meta = data.get("meta") or {}
    if not isinstance(meta, dict):
        raise UserError(f"meta is {type(meta).__name__}, not a JSON object")
    versions = meta.get("math_verify")
    expected = data["expected"]
    if isinstance(versions, dict):
        expected = versions.get(MATH_VERIFY_VERSION, expected)
    if expected is not None and (isinstance(expected, str) or not isinstance(expected, int | float)):
        raise UserError(f"expected is {expected!r}, not a number or null")
    row = Row(data["benchmark"], data["prediction"], data["gold"], meta)
    get_benchmark(str(row.benchmark))
    return Vector(line, row, data["mode"], None if expected is None else float(expected))
