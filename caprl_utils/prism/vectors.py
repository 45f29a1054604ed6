"""`caprl score --vectors FILE.jsonl`: both ways to score, checked against values worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from caprl_utils.errors import UserError
from caprl_utils.files import text_lines
from caprl_utils.prism.metrics import MATH_VERIFY_VERSION, Score, all_rotations, as_list, mathvista_match
from caprl_utils.prism.scores import Scoring, score_answers
from caprl_utils.records import Sample

TOLERANCE = 1e-6  # expected values are rounded to six decimals


class Vector(BaseModel):
    """A line of a file of test vectors. prediction, gold: of a circular question lists over its rotations. expected:
    None for "no score"; meta.math_verify has it by version, of which the pinned one counts.
    """

    model_config = ConfigDict(strict=True)

    benchmark: str
    prediction: str | list[str]
    gold: Any
    mode: Scoring
    expected: float | None
    meta: dict[str, Any] | None = None

    def failure(self) -> str | None:
        """What is wrong; None where the scorer gives what is expected."""
        meta, several = self.meta or {}, isinstance(self.prediction, list)
        options, expected = tuple(as_list(meta.get("options")) or ()), self.expected
        pairs = zip(self.prediction, self.gold, strict=True) if several else [(self.prediction, self.gold)]
        asked = [(Sample("vector", self.benchmark, (), "", gold, options, meta), text) for text, gold in pairs]
        (sample, text), *_ = asked  # ValueError where there is none
        if self.mode == "standard" and self.benchmark == "mathvista" and len(text.split()) == 1:
            found: Score = mathvista_match(sample, text, extracted=True)  # the prediction is the final short answer
        else:
            found = all_rotations(score_answers(asked, self.mode))
        expected = meta.get("math_verify", {}).get(MATH_VERIFY_VERSION, expected)
        both = found.value is not None and expected is not None
        if abs(found.value - expected) <= TOLERANCE if both else found.value is expected:
            return None
        return (
            f"{self.benchmark} ({self.mode}) prediction {self.prediction!r} gold {self.gold!r}: expected {expected}, "
            f"got {found.value} (parsed {found.parsed!r}, {found.reason or 'no remark'})"
        )


def check_vectors(path: Path) -> tuple[int, list[str]]:
    """Score a JSONL file of vectors: how many passed, a line for each other. Raises UserError where there are none."""
    lines = dict(text_lines(path)) if path.is_file() else {}
    if not lines:
        raise UserError(f"no test vectors in {path}: one JSON object a line with {[*Vector.model_fields]}")
    failures = []
    for number, line in lines.items():
        try:
            failure = Vector.model_validate_json(line).failure()
        except (UserError, AttributeError, TypeError, ValueError) as error:  # no vector, or one of another form
            failure = " ".join(str(error).split())
        failures += [f"FAILED line {number} of {path}: {failure}"] if failure else []
    return len(lines) - len(failures), failures
