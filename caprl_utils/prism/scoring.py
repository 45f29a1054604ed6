"""Stage 3 of Prism, one answer at a time: two ways to score that are never mixed.

`standard`  each benchmark's own metric, as the common toolkits compute it (`METRICS`). A metric that needs a judge
            gives no score without one; it never falls back to another rule. Which model judges moves the score by
            points, so it is named in the record and is part of the run's key.
`caprl`     the verdict of the authors' Prism scorer, quirk by quirk (`caprl`).

`caprl score --vectors FILE.jsonl` checks both against test vectors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from caprl_utils import prompts
from caprl_utils.answers import DEFAULT_LETTERS, final_answer, unwrap_commands
from caprl_utils.errors import UserError
from caprl_utils.hashing import text_hash
from caprl_utils.models.base import Backend, Request, Sampling
from caprl_utils.paths import shown
from caprl_utils.prism import caprl, metrics
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.metrics import Score, as_options, mathvista_match
from caprl_utils.records import Sample
from caprl_utils.runs import RowStore

Scoring = Literal["standard", "caprl"]
Asked = Sequence[tuple[Sample, str]]  # a question, and what the reader said
Metric = Callable[[Sample, str], Score]

NEEDS_JUDGE = "no judge: this benchmark's metric is a judge's verdict"


def score(sample: Sample, text: str, scoring: Scoring = "standard", judge: Judge | None = None) -> Score:
    """Score one answer; see `score_answers`."""
    return score_answers([(sample, text)], scoring, judge)[0]


def score_answers(answers: Asked, scoring: Scoring, judge: Judge | None = None) -> list[Score]:
    """Score answers in their order.

    answers: in "caprl" the reader's complete texts. judge: for the metrics that need
    one; without it those answers have no value.
    Raises UserError for an unknown benchmark, one that the scoring does not know, or an answer that is no text.
    """
    for sample, text in answers:
        if not isinstance(text, str):
            raise UserError(
                f"benchmark {sample.benchmark!r}: an answer must be text, not {type(text).__name__}"
            )
    if scoring == "caprl":
        return [caprl.score(text, sample.gold, _branch(sample.benchmark)) for sample, text in answers]
    scores = [_metric(sample.benchmark)(sample, text) for sample, text in answers]
    if judge is None:
        return scores
    left: dict[str, list[int]] = {}
    for index, ((sample, _), found) in enumerate(zip(answers, scores, strict=True)):
        if found.value is None and get_benchmark(sample.benchmark).judge == "needed":
            left.setdefault(get_benchmark(sample.benchmark).metric, []).append(index)
    for metric, places in left.items():
        judged = JUDGED[metric]([answers[index] for index in places], judge)
        for index, found in zip(places, judged, strict=True):
            scores[index] = found
    return scores


def _branch(benchmark: str) -> caprl.Branch:
    facts = get_benchmark(benchmark).caprl
    if facts is None:
        raise UserError(
            f"benchmark {benchmark!r} has no branch in the authors' scorer: use scoring 'standard'"
        )
    return facts.branch


def _metric(benchmark: str) -> Metric:
    name = get_benchmark(benchmark).metric
    if name not in METRICS:
        raise UserError(
            f"benchmark {benchmark!r} names the unknown metric {name!r}; known: {', '.join(METRICS)}"
        )
    return METRICS[name]


def _text(metric: Callable[[str, Any], float]) -> Metric:
    def run(sample: Sample, text: str) -> Score:
        answer = _short_answer(text)
        value = metric(answer, _unwrapped(sample.gold))
        return Score(value, answer or None, None if answer.strip() else "empty answer")

    return run


def _short_answer(text: str) -> str:
    """The final answer; a plain short answer keeps its outer spaces, which ANLS counts as the toolkits do."""
    answer = final_answer(text)
    return text if text.strip() == answer else answer


def _unwrapped(gold: Any) -> Any:
    r"""A gold without `\text{...}` and its like, which the answer has lost too."""
    if isinstance(gold, (list, tuple)):
        return [_unwrapped(item) for item in gold]
    return unwrap_commands(gold) if isinstance(gold, str) else gold


def _accepted(gold: Any) -> list[str]:
    """Accepted answers; a single text is one answer, the text of a list is that list."""
    if isinstance(gold, str):
        return [str(item) for item in metrics.literal_list(gold) or [gold]]
    return [str(item) for item in gold]


def _pro(sample: Sample, text: str) -> Score:
    answer, meta = final_answer(text), sample.meta
    value = metrics.relaxed_accuracy_pro(
        answer, _unwrapped(sample.gold), meta.get("year"), meta.get("question_type")
    )
    return Score(value, answer or None, None if answer else "empty answer")


def _letters(sample: Sample) -> str:
    return get_benchmark(sample.benchmark).letters or DEFAULT_LETTERS


def _letter(sample: Sample, text: str) -> Score:
    return metrics.letter_accuracy(text, sample.gold, sample.options or None, _letters(sample))


def _equal_or_judge(sample: Sample, text: str) -> Score:
    answer = final_answer(text)
    if answer and answer == str(sample.gold).strip():
        return Score(1.0, answer, "equal text, which needs no judge")
    return Score(None, answer or None, NEEDS_JUDGE)


def _judge_only(sample: Sample, text: str) -> Score:
    return Score(None, final_answer(text) or None, NEEDS_JUDGE)


def _mathvista_arguments(sample: Sample) -> dict[str, Any]:
    """What MathVista's comparison takes from a sample."""
    return {
        "question_type": sample.meta.get("question_type"),
        "answer_type": sample.meta.get("answer_type"),
        "choices": as_options(sample.meta.get("choices")),
        "precision": sample.meta.get("precision"),
    }


METRICS: dict[str, Metric] = {
    "relaxed_accuracy": _text(metrics.relaxed_accuracy),
    "relaxed_accuracy_pro": _pro,
    "anls": _text(lambda answer, gold: metrics.anls(answer, _accepted(gold))),
    "exact_match": _text(lambda answer, gold: metrics.exact_match(answer.strip(), str(gold))),
    "vqa_accuracy": _text(lambda answer, gold: metrics.vqa_accuracy(answer, _accepted(gold))),
    "letter_accuracy": _letter,
    "letter_or_exact_match": lambda sample, text: metrics.letter_or_short(
        text, str(sample.gold), sample.options or None, _letters(sample)
    ),
    "mmmu_accuracy": lambda sample, text: metrics.mmmu_accuracy(
        text, sample.gold, sample.options or None, sample.meta.get("question_type")
    ),
    "wemath_four_dimensional": _letter,  # of a question; `scores.units` makes the benchmark's score of them
    "circular_accuracy": _letter,  # of a rotation; `scores.score_rows` puts those of a question together
    "math_equality": lambda sample, text: metrics.mathvision_accuracy(
        text, sample.gold, sample.options or None
    ),
    "llm_extract_then_typed_match": lambda sample, text: metrics.mathvista_match(
        text, sample.gold, extracted=False, **_mathvista_arguments(sample)
    ),
    "mathverse_judge": _equal_or_judge,
    "llm_judge": _judge_only,
    "llm_judge_graded": _judge_only,
}


# --- the metrics that need a judge ---
#
# The wording is ours, the contracts are the benchmarks': MM-Vet a grade from 0.0 to 1.0 in tenths, MathVerse an
# extraction and then a comparison, CharXiv a verdict by the category of the answer, MathVista an extraction only. So
# the scores compare with other runs of this project and judge, not with GPT-4 figures. A reply that does not keep to
# its form gives no score; it is never read loosely.

MAX_TOKENS = 512  # ours: a reply is one line, with some room for words before it


class Judge:
    """A model that grades or extracts, greedily; its replies are kept, so that a stopped evaluation asks only for the
    rest.
    """

    def __init__(self, backend: Backend, store: RowStore):
        self.backend, self.name, self.store = backend, backend.name, store
        self._replies = {row["id"]: row["reply"] for row in store.read()}

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """A reply to each prompt. Raises UserError when the judge failed; what it replied stays on disk."""
        asked = {key: text for text in texts if (key := text_hash(text)) not in self._replies}
        requests = [Request(key, text) for key, text in asked.items()]
        failed = 0
        for completion in self.backend.generate(requests, Sampling(MAX_TOKENS)) if requests else ():
            if completion.text is None:
                failed += 1
            else:
                self.store.append({"id": completion.id, "reply": completion.text})
                self._replies[completion.id] = completion.text
        if failed:
            raise UserError(
                f"the judge {self.name} failed on {failed} of {len(asked)} prompts. Its replies so far are kept in "
                f"{shown(self.store.path)}; mend the cause and run again, only the missing ones are asked."
            )
        return [self._replies[text_hash(text)] for text in texts]


def _graded(asked: Asked, judge: Judge) -> list[Score]:
    answers = [final_answer(text) for _, text in asked]
    texts = [_fill(prompts.GRADE, sample, answer) for (sample, _), answer in zip(asked, answers, strict=True)]
    scores = []
    for answer, reply in zip(answers, judge(texts), strict=True):
        found = re.search(r"Grade:\s*(0(?:\.\d)?|1(?:\.0)?)\s*$", reply, re.MULTILINE)
        scores.append(Score(float(found[1]), answer) if found else _unread(judge, reply, answer))
    return scores


def _compared(
    samples: Sequence[Sample], judge: Judge, answers: Sequence[str], rule: Callable[[Sample], str]
) -> list[Score]:
    texts = [
        _fill(prompts.COMPARE, sample, answer, rule=rule(sample))
        for sample, answer in zip(samples, answers, strict=True)
    ]
    scores = []
    for answer, reply in zip(answers, judge(texts), strict=True):
        found = re.search(r"Verdict:\s*(yes|no)\b", reply, re.IGNORECASE)
        scores.append(
            Score(float(found[1].lower() == "yes"), answer, f"judged by {judge.name}")
            if found
            else _unread(judge, reply, answer)
        )
    return scores


def _charxiv(asked: Asked, judge: Judge) -> list[Score]:
    def rule(sample: Sample) -> str:
        category = sample.meta.get("reasoning_q_source")
        if category not in prompts.CHARXIV_RULES:
            raise UserError(
                f"benchmark {sample.benchmark!r}: meta.reasoning_q_source is {category!r}, not 1 to 4"
            )
        return prompts.CHARXIV_RULES[category]

    return _compared([sample for sample, _ in asked], judge, [final_answer(text) for _, text in asked], rule)


def _mathverse(asked: Asked, judge: Judge) -> list[Score]:
    extracted = _extracted(asked, judge)
    scores: list[Score | None] = []
    for (sample, _), (answer, failure) in zip(asked, extracted, strict=True):
        if failure is not None:
            scores.append(failure)
        elif not answer:
            scores.append(Score(0.0, None, f"{judge.name} found no answer in the response"))
        elif answer == str(sample.gold).strip():
            scores.append(Score(1.0, answer, "equal text after extraction"))
        else:
            scores.append(None)
    rest = [index for index, score in enumerate(scores) if score is None]
    answers = [str(extracted[index][0]) for index in rest]
    judged = _compared([asked[index][0] for index in rest], judge, answers, lambda sample: prompts.MATH_RULE)
    for index, score in zip(rest, judged, strict=True):
        scores[index] = score
    return [score for score in scores if score is not None]


def _mathvista_extracted(asked: Asked, judge: Judge) -> list[Score]:
    scores = []
    for (sample, _), (answer, failure) in zip(asked, _extracted(asked, judge), strict=True):
        if failure is not None:
            scores.append(failure)
            continue
        score = mathvista_match(answer or "", sample.gold, extracted=True, **_mathvista_arguments(sample))
        scores.append(replace(score, reason=score.reason or f"extracted by {judge.name}"))
    return scores


def _extracted(asked: Asked, judge: Judge) -> list[tuple[str | None, Score | None]]:
    """(answer, None); (None, None) where the response gives none; (None, score) for an unread reply."""
    texts = [
        _fill(
            prompts.EXTRACT, sample, final_answer(text),
            hint=prompts.TYPE_HINTS.get(str(sample.meta.get("answer_type")), ""),
        )
        for sample, text in asked
    ]  # fmt: skip
    results: list[tuple[str | None, Score | None]] = []
    for reply in judge(texts):
        found = re.search(r"Extracted:[ \t]*(.+)", reply)
        if found is None:
            results.append((None, _unread(judge, reply, None)))
        else:
            text = found[1].strip()
            results.append((None if text.lower() == "none" else text, None))
    return results


def _fill(template: str, sample: Sample, answer: str, **parts: str) -> str:
    return template.format(question=sample.question, gold=sample.gold, answer=answer, **parts)


def _unread(judge: Judge, reply: str, answer: str | None) -> Score:
    return Score(None, answer, f"judge {judge.name} replied {reply.strip()[:60]!r}, which is no verdict")


JUDGED: dict[str, Callable[[Asked, Judge], list[Score]]] = {
    "llm_judge_graded": _graded,
    "llm_judge": _charxiv,
    "mathverse_judge": _mathverse,
    "llm_extract_then_typed_match": _mathvista_extracted,
}


# --- test vectors: one JSON object a line with a question, an answer, a scoring and the expected value ---

FIELDS = ("benchmark", "prediction", "gold", "mode", "expected")
TOLERANCE = 1e-6  # expected values are rounded to six decimals


def check_vectors(path: Path) -> tuple[int, list[str]]:
    """Score the vectors of a JSONL file; returns how many passed, and a line for each that failed.

    A line that is no vector, or that the scorer refuses, counts as failed. Raises UserError where there is no such
    file, or nothing in it.
    """
    if not path.is_file():
        raise UserError(f"no test vectors at {path}: give a JSONL file")
    passed, failures = 0, []
    for number, text in _lines(path):
        try:
            failure = _check_vector(json.loads(text))
        except (ValueError, UserError) as error:
            failure = str(error)
        if failure is None:
            passed += 1
        else:
            failures.append(f"FAILED line {number} of {path}: {failure}")
    if not passed and not failures:
        raise UserError(f"{path} is empty: one JSON object a line with {', '.join(FIELDS)}")
    return passed, failures


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if text.strip():
            yield number, text


def _check_vector(data: Any) -> str | None:
    """None where the scorer gives what the vector expects, else what is wrong."""
    if not isinstance(data, dict):
        raise UserError(f"a vector is a JSON object, not {type(data).__name__}")
    if missing := [name for name in FIELDS if name not in data]:
        raise UserError(f"missing {', '.join(missing)}")
    if data["mode"] not in ("caprl", "standard"):
        raise UserError(f"mode is {data['mode']!r}, not 'caprl' or 'standard'")
    meta, expected = data.get("meta") or {}, data["expected"]
    if not isinstance(meta, dict):
        raise UserError(f"meta is {type(meta).__name__}, not a JSON object")
    if isinstance(versions := meta.get("math_verify"), dict):
        expected = versions.get(caprl.MATH_VERIFY_VERSION, expected)
    if expected is not None and not isinstance(expected, int | float):
        raise UserError(f"expected is {expected!r}, not a number or null")
    found = _score_vector(data, meta)
    same = (
        found.value is expected
        if None in (found.value, expected)
        else abs(found.value - expected) <= TOLERANCE
    )
    return None if same else (
        f"{data['benchmark']} ({data['mode']}) prediction {data['prediction']!r} gold {data['gold']!r}: expected "
        f"{expected}, got {found.value} (parsed {found.parsed!r}, {found.reason or 'no remark'})"
    )  # fmt: skip


def _score_vector(data: dict[str, Any], meta: dict[str, Any]) -> Score:
    options = tuple(metrics.as_options(meta.get("options")) or ())
    circular = meta.get("group") == "circular"  # MMBench: a list over the rotations
    pairs = (
        zip(data["prediction"], data["gold"], strict=True)
        if circular
        else [(data["prediction"], data["gold"])]
    )
    scores = [
        score(
            Sample("vector", str(data["benchmark"]), (), meta.get("question", ""), gold, options, meta),
            prediction, data["mode"],
        )
        for prediction, gold in pairs
    ]  # fmt: skip
    return metrics.all_rotations(scores) if circular else scores[0]
