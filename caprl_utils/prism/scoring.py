"""Stage 3 of Prism, one answer at a time: two ways to score that are never mixed.

`standard` is each benchmark's own metric, as the common toolkits compute it (`metrics`). One that needs a judge gives
no score without one; which model judges moves the score by points, so record and key name it. `caprl` is the verdict of
the authors' Prism scorer, quirk by quirk. `caprl score --vectors FILE.jsonl` checks both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from caprl_utils import prompts
from caprl_utils.answers import MARKS, after_reasoning, final_answer, without_full_stop
from caprl_utils.errors import UserError
from caprl_utils.files import text_lines
from caprl_utils.hashing import text_hash
from caprl_utils.models.base import Backend, Request, Sampling
from caprl_utils.paths import shown
from caprl_utils.prism import caprl
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.metrics import METRICS, Score, all_rotations, as_list, mathvista_match
from caprl_utils.records import Sample
from caprl_utils.runs import RowStore

Scoring = Literal["standard", "caprl"]
Asked = Sequence[tuple[Sample, str]]  # a question, and what the reader said


def score_answers(answers: Asked, scoring: Scoring, judge: Judge | None = None) -> list[Score]:
    """Scores in the order of the answers; no value where a judge lacks. Raises UserError for what it does not know."""
    if scoring == "caprl":
        return [_by_authors(sample, text) for sample, text in answers]
    scores = [METRICS[_metric(sample)](sample, text) for sample, text in answers]
    for metric, by_judge in JUDGED.items() if judge else ():
        left = [i for i, one in enumerate(scores) if one.value is None and _metric(answers[i][0]) == metric]
        for index, found in zip(left, by_judge([answers[i] for i in left], judge), strict=True):
            scores[index] = found
    return scores


def _metric(sample: Sample) -> str:
    return get_benchmark(sample.benchmark).metric


def _by_authors(sample: Sample, text: str) -> Score:
    if (facts := get_benchmark(sample.benchmark).caprl) is None:
        raise UserError(f"benchmark {sample.benchmark!r} is unknown to the authors' scorer: use scoring 'standard'")
    return caprl.score(text, sample.gold, facts.branch)


# --- the metrics that need a judge ---
# The wording is ours, the contracts are the benchmarks': MM-Vet a grade from 0.0 to 1.0 in tenths, MathVerse an
# extraction and then a comparison, CharXiv a verdict by the type of the answer, MathVista an extraction only. So scores
# compare with other runs of this project and judge, not with GPT-4 figures. Of a reply the last line in the form that
# was asked for counts, behind any reasoning, whatever marks or quotes stand around it; without one: no score.

MATHVISTA = "llm_extract_then_typed_match"
MAX_TOKENS = 2048  # ours: a reply is one line, with room for reasoning before it


class Judge:
    """A model that grades or extracts, greedily; a stopped evaluation asks only for the replies that it lacks."""

    def __init__(self, backend: Backend, store: RowStore):
        self.backend, self.name, self.store = backend, backend.name, store
        self._replies = {row["id"]: row["reply"] for row in store.read()}

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """A reply to each prompt. Raises UserError when the judge failed; what it replied stays on disk."""
        asked = {key: text for text in texts if (key := text_hash(text)) not in self._replies}
        requests = [Request(key, text) for key, text in asked.items()]
        for completion in self.backend.generate(requests, Sampling(MAX_TOKENS)) if requests else ():
            if completion.text is not None:
                self.store.append({"id": completion.id, "reply": completion.text})
                self._replies[completion.id] = completion.text
        if failed := len(asked.keys() - self._replies):
            raise UserError(
                f"the judge {self.name} failed on {failed} of {len(asked)} prompts. Its replies so far are kept in "
                f"{shown(self.store.path)}; mend the cause and run again, only the missing ones are asked."
            )
        return [self._replies[text_hash(text)] for text in texts]


_GRADE = (  # no percentage, no range, and if it is out of something, then out of 1
    r"(?i)\bgrade[^\w.-]{1,6}(?:(?:is|boxed)[^\w.-]+)?([0-9.]*[0-9])"
    r"(?![0-9.,]*[0-9%]|\s*(?:[-\u2013]|to|or)\s*[0-9.]|\s*(?:/|out\s+of)\s*(?!1(?:\.0)?(?![0-9.])))"
)
_VERDICT = r"(?i)\bverdict\W{1,6}(?:(?:is|boxed)\W+)?(yes|no)\b"
_EXTRACTED = rf"(?im)\bextracted[{MARKS}]*:\s*(.+)$"
_ECHO = re.compile(  # the instruction told again, or half of it
    r"(?im)^.*reply with one line.*$|[\"\u201c]?verdict: yes[\"\u201d]? or [\"\u201c]?verdict: no\b[\"\u201d]?"
    r"|verdict: yes ?/ ?no\b|[\"\u201c]extracted: (?:x|none)[\"\u201d]|extracted: x\b"
)


def _ask(
    judge: Judge, asked: Asked, template: str, pattern: str, made: Callable[[Sample, str, str], str | Score],
    hint: Callable[[Sample], str] = lambda sample: "",
) -> list[Any]:  # fmt: skip
    """What `made` makes of sample, final answer and what the pattern captures last in the judge's reply, behind its
    reasoning; a score without value where it finds nothing. hint: what the template says beside.
    """
    asked = [(sample, final_answer(text)) for sample, text in asked]
    texts = [
        template.format(question=s.question, gold=s.gold, answer=a, **dict.fromkeys(("hint", "rule"), hint(s)))
        for s, a in asked
    ]
    found = []
    for (sample, answer), reply in zip(asked, judge(texts), strict=True):
        said = re.findall(pattern, _ECHO.sub("", after_reasoning(reply)))
        no_verdict = f"judge {judge.name} replied {reply.strip()[:60]!r}, which is no verdict"
        found.append(made(sample, answer, said[-1].strip(MARKS)) if said else Score(None, answer, no_verdict))
    return found


def _graded(asked: Asked, judge: Judge) -> list[Score]:
    def grade(_: Sample, answer: str, said: str) -> Score:
        value = float(said) if said.count(".") < 2 else math.nan
        if 0.0 <= value <= 1.0 and round(10 * value, 6) % 1 == 0:
            return Score(value, answer)
        why = f"judge {judge.name} graded {said}, which is no verdict: 0.0 to 1.0 in tenths"
        return Score(None, answer, why)

    return _ask(judge, asked, prompts.GRADE, _GRADE, grade)


def _compared(asked: Asked, judge: Judge) -> list[Score]:
    def verdict(_: Sample, answer: str, said: str) -> Score:
        return Score(float(said.lower() == "yes"), answer, f"judged by {judge.name}")

    def rule(sample: Sample) -> str:
        charxiv = sample.benchmark == "charxiv"
        return prompts.CHARXIV_RULES.get(sample.meta.get("answer_type"), "") if charxiv else prompts.MATH_RULE

    return _ask(judge, asked, prompts.COMPARE, _VERDICT, verdict, rule)


def _mathverse(asked: Asked, judge: Judge) -> list[Score]:
    def quick(sample: Sample, said: str) -> str | Score:
        if not said:
            return Score(0.0, None, f"{judge.name} found no answer in the response")
        return Score(1.0, said, "equal text after extraction") if said == str(sample.gold).strip() else said

    scores = _extracted(asked, judge, quick)
    rest = [index for index, found in enumerate(scores) if isinstance(found, str)]
    judged = _compared([(asked[i][0], scores[i]) for i in rest], judge)
    for index, score in zip(rest, judged, strict=True):
        scores[index] = score
    return scores


def _mathvista(asked: Asked, judge: Judge) -> list[Score]:
    def match(sample: Sample, said: str) -> Score:
        if sample.meta.get("answer_type") in ("integer", "float"):
            said = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|^[$\u20ac\u00a3\u00a5]\s*", "", said)
        score = mathvista_match(sample, said, extracted=True)
        return replace(score, reason=score.reason or f"extracted by {judge.name}")

    return _extracted(asked, judge, match)


def _extracted(asked: Asked, judge: Judge, made: Callable[[Sample, str], str | Score]) -> list[Any]:
    """What `made` makes of each sample and the answer that the judge finds in the text, "" where there is none."""

    def read(sample: Sample, _: str, said: str) -> str | Score:
        said = without_full_stop(final_answer(re.sub(r'"\s*\}$', "", said))).strip(MARKS)
        return made(sample, "" if said.lower() == "none" else said)

    hints = prompts.TYPE_HINTS
    return _ask(judge, asked, prompts.EXTRACT, _EXTRACTED, read, lambda s: hints.get(s.meta.get("answer_type"), ""))


JUDGED: dict[str, Callable[[Asked, Judge], list[Score]]] = {
    "llm_judge_graded": _graded,
    "llm_judge": _compared,
    "mathverse_judge": _mathverse,
    MATHVISTA: _mathvista,
}


# --- test vectors ---

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
        expected = (self.meta or {}).get("math_verify", {}).get(caprl.MATH_VERIFY_VERSION, self.expected)
        found = self._score()
        both = found.value is not None and expected is not None
        if abs(found.value - expected) <= TOLERANCE if both else found.value is expected:
            return None
        return (
            f"{self.benchmark} ({self.mode}) prediction {self.prediction!r} gold {self.gold!r}: expected {expected}, "
            f"got {found.value} (parsed {found.parsed!r}, {found.reason or 'no remark'})"
        )

    def _score(self) -> Score:
        meta = self.meta or {}
        options, several = tuple(as_list(meta.get("options")) or ()), isinstance(self.prediction, list)
        pairs = zip(self.prediction, self.gold, strict=True) if several else [(self.prediction, self.gold)]
        asked = [(Sample("vector", self.benchmark, (), "", gold, options, meta), text) for text, gold in pairs]
        (sample, text), *_ = asked
        if self.mode == "standard" and _metric(sample) == MATHVISTA and len(text.split()) == 1:
            return mathvista_match(sample, text, extracted=True)  # a vector's prediction is the final short answer
        return all_rotations(score_answers(asked, self.mode))


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
