"""Metrics that need a judge: MM-Vet's grade, MathVerse's and CharXiv's verdicts, MathVista's extraction.

The judge is any callable of prompts (see `Judge`); which one it was is part of the result. The wording is
ours, the contracts are the benchmarks': MM-Vet a grade from 0.0 to 1.0 in tenths, MathVerse an extraction
and then a comparison, CharXiv a verdict by the category of the answer, MathVista an extraction only. So
the scores compare with other runs of this project and judge, not with GPT-4 figures. A reply that does not
keep to its form gives no score; it is never read loosely.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from caprl_utils import prompts
from caprl_utils.answers import final_answer
from caprl_utils.errors import UserError
from caprl_utils.prism.scoring.choices import as_options
from caprl_utils.prism.scoring.maths import mathvista_match
from caprl_utils.prism.scoring.types import Judge, Row, Score


def judge_rows(metric: str, rows: Sequence[Row], judge: Judge) -> list[Score]:
    """Scores of rows that share a judge metric, in their order."""
    return _METRICS[metric](rows, judge)


def _ask(judge: Judge, texts: Sequence[str]) -> list[str | None]:
    if not texts:
        return []
    replies = list(judge(texts))
    if len(replies) != len(texts):
        raise UserError(f"judge {judge.name!r} returned {len(replies)} replies for {len(texts)} prompts")
    return replies


def _graded(rows: Sequence[Row], judge: Judge) -> list[Score]:
    answers = [final_answer(row.prediction) for row in rows]
    texts = [_fill(prompts.GRADE, row, answer) for row, answer in zip(rows, answers, strict=True)]
    scores = []
    for answer, reply in zip(answers, _ask(judge, texts), strict=True):
        found = re.search(r"Grade:\s*(0(?:\.\d)?|1(?:\.0)?)\s*$", reply or "", re.MULTILINE)
        scores.append(Score(float(found[1]), answer) if found else _unread(judge, reply, answer))
    return scores


def _compared(
    rows: Sequence[Row], judge: Judge, answers: Sequence[str], rule: Callable[[Row], str]
) -> list[Score]:
    texts = [
        _fill(prompts.COMPARE, row, answer, rule=rule(row)) for row, answer in zip(rows, answers, strict=True)
    ]
    scores = []
    for answer, reply in zip(answers, _ask(judge, texts), strict=True):
        found = re.search(r"Verdict:\s*(yes|no)\b", reply or "", re.IGNORECASE)
        scores.append(
            Score(float(found[1].lower() == "yes"), answer, f"judged by {judge.name}")
            if found
            else _unread(judge, reply, answer)
        )
    return scores


def _charxiv(rows: Sequence[Row], judge: Judge) -> list[Score]:
    def rule(row: Row) -> str:
        category = row.meta.get("reasoning_q_source")
        if category not in prompts.CHARXIV_RULES:
            raise UserError(
                f"benchmark {row.benchmark!r}: meta.reasoning_q_source is {category!r}, not 1 to 4"
            )
        return prompts.CHARXIV_RULES[category]

    return _compared(rows, judge, [final_answer(row.prediction) for row in rows], rule)


def _mathverse(rows: Sequence[Row], judge: Judge) -> list[Score]:
    extracted = _extracted(rows, judge)
    scores: list[Score | None] = []
    for row, (answer, failure) in zip(rows, extracted, strict=True):
        if failure is not None:
            scores.append(failure)
        elif not answer:
            scores.append(Score(0.0, None, f"{judge.name} found no answer in the response"))
        elif answer == str(row.gold).strip():
            scores.append(Score(1.0, answer, "equal text after extraction"))
        else:
            scores.append(None)
    rest = [index for index, score in enumerate(scores) if score is None]
    answers = [str(extracted[index][0]) for index in rest]
    judged = _compared([rows[index] for index in rest], judge, answers, lambda row: prompts.MATH_RULE)
    for index, score in zip(rest, judged, strict=True):
        scores[index] = score
    return [score for score in scores if score is not None]


def _mathvista(rows: Sequence[Row], judge: Judge) -> list[Score]:
    scores = []
    for row, (answer, failure) in zip(rows, _extracted(rows, judge), strict=True):
        if failure is not None:
            scores.append(failure)
            continue
        score = mathvista_match(answer or "", row.gold, extracted=True, **mathvista_arguments(row.meta))
        scores.append(replace(score, reason=score.reason or f"extracted by {judge.name}"))
    return scores


def mathvista_arguments(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What MathVista's comparison takes from a row's meta."""
    return {
        "question_type": meta.get("question_type"),
        "answer_type": meta.get("answer_type"),
        "choices": as_options(meta.get("choices")),
        "precision": meta.get("precision"),
    }


def _extracted(rows: Sequence[Row], judge: Judge) -> list[tuple[str | None, Score | None]]:
    """(answer, None); (None, None) where the response gives none; (None, score) for an unread reply."""
    texts = [
        _fill(
            prompts.EXTRACT,
            row,
            final_answer(row.prediction),
            hint=prompts.TYPE_HINTS.get(str(row.meta.get("answer_type")), ""),
        )
        for row in rows
    ]
    results: list[tuple[str | None, Score | None]] = []
    for reply in _ask(judge, texts):
        found = re.search(r"Extracted:[ \t]*(.+)", reply or "")
        if found is None:
            results.append((None, _unread(judge, reply, None)))
        else:
            text = found[1].strip()
            results.append((None if text.lower() == "none" else text, None))
    return results


def _fill(template: str, row: Row, answer: str, **parts: str) -> str:
    if "question" not in row.meta:
        raise UserError(f"benchmark {row.benchmark!r}: a judge needs the question; give it as meta.question")
    return template.format(question=row.meta["question"], gold=row.gold, answer=answer, **parts)


def _unread(judge: Judge, reply: str | None, answer: str | None) -> Score:
    said = "failed" if reply is None else f"replied {reply.strip()[:60]!r}"
    return Score(None, answer, f"judge {judge.name} {said}, which is no verdict")


_METRICS: dict[str, Callable[[Sequence[Row], Judge], list[Score]]] = {
    "llm_judge_graded": _graded,
    "llm_judge": _charxiv,
    "mathverse_judge": _mathverse,
    "llm_extract_then_typed_match": _mathvista,
}
