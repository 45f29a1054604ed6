"""Mode `standard`: each benchmark's own metric, as the field reports it.

One function per metric code of configs/benchmarks.yaml. A metric that needs a judge gives no score
without one; it never falls back to another rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from caprl_utils.answers import DEFAULT_LETTERS, final_answer, unwrap_commands
from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.scoring import choices, maths, text
from caprl_utils.prism.scoring import judge as judge_module
from caprl_utils.prism.scoring.types import Judge, Row, Score

NEEDS_JUDGE = "no judge: this benchmark's metric is a judge's verdict"


def _text(metric: Callable[[str, Any], float]) -> Callable[[Row], Score]:
    def run(row: Row) -> Score:
        answer = _short_answer(row.prediction)
        value = metric(answer, _unwrapped(row.gold))
        return Score(value, answer or None, None if answer.strip() else "empty answer")

    return run


def _short_answer(prediction: str) -> str:
    """The final answer; a plain short answer keeps its outer spaces, which ANLS counts as the toolkits do."""
    answer = final_answer(prediction)
    return prediction if prediction.strip() == answer else answer


def _unwrapped(gold: Any) -> Any:
    r"""A gold without `\text{...}` and its like, which the answer has lost too."""
    if isinstance(gold, (list, tuple)):
        return [_unwrapped(item) for item in gold]
    return unwrap_commands(gold) if isinstance(gold, str) else gold


def _accepted(gold: Any) -> list[str]:
    """Accepted answers; a single text is one answer, the text of a list is that list."""
    if isinstance(gold, str):
        return [str(item) for item in text.literal_list(gold) or [gold]]
    return [str(item) for item in gold]


def _pro(row: Row) -> Score:
    answer = final_answer(row.prediction)
    value = text.relaxed_accuracy_pro(
        answer, _unwrapped(row.gold), row.meta.get("year"), row.meta.get("question_type")
    )
    return Score(value, answer or None, None if answer else "empty answer")


def _options(meta: Mapping[str, Any]) -> list[str] | None:
    return choices.as_options(meta.get("options"))


def _letters(row: Row) -> str:
    return get_benchmark(row.benchmark).letters or DEFAULT_LETTERS


def _letter(row: Row) -> Score:
    return choices.letter_accuracy(row.prediction, row.gold, _options(row.meta), _letters(row))


def _circular(row: Row) -> Score:
    if row.meta.get("group") == "circular":
        rotations = row.meta.get("rotations")
        return choices.circular_accuracy(row.prediction, row.gold, _options(row.meta), rotations)
    return _letter(row)


def _mathvista(row: Row) -> Score:
    return maths.mathvista_match(
        row.prediction, row.gold, extracted=False, **judge_module.mathvista_arguments(row.meta)
    )


def _equal_or_judge(row: Row) -> Score:
    answer = final_answer(row.prediction)
    if answer and answer == str(row.gold).strip():
        return Score(1.0, answer, "equal text, which needs no judge")
    return Score(None, answer or None, NEEDS_JUDGE)


def _judge_only(row: Row) -> Score:
    return Score(None, final_answer(row.prediction) or None, NEEDS_JUDGE)


METRICS: dict[str, Callable[[Row], Score]] = {
    "relaxed_accuracy": _text(text.relaxed_accuracy),
    "relaxed_accuracy_pro": _pro,
    "anls": _text(lambda answer, gold: text.anls(answer, _accepted(gold))),
    "exact_match": _text(lambda answer, gold: text.exact_match(answer.strip(), str(gold))),
    "vqa_accuracy": _text(lambda answer, gold: text.vqa_accuracy(answer, _accepted(gold))),
    "letter_accuracy": _letter,
    "letter_or_exact_match": lambda row: choices.letter_or_short(
        row.prediction, str(row.gold), _options(row.meta), _letters(row)
    ),
    "mmmu_accuracy": lambda row: choices.mmmu_accuracy(
        row.prediction, row.gold, _options(row.meta), row.meta.get("question_type")
    ),
    "wemath_four_dimensional": _letter,  # per question; the four dimensions are computed over all rows
    "circular_accuracy": _circular,
    "math_equality": lambda row: maths.mathvision_accuracy(row.prediction, row.gold, _options(row.meta)),
    "llm_extract_then_typed_match": _mathvista,
    "mathverse_judge": _equal_or_judge,
    "llm_judge": _judge_only,
    "llm_judge_graded": _judge_only,
}


def score_standard(rows: Sequence[Row], judge: Judge | None = None) -> list[Score]:
    """Each row by its benchmark's own metric; what is left to a judge goes to `judge` in batches."""
    scores = [_score_row(row) for row in rows]
    if judge is None:
        return scores
    left: dict[str, list[int]] = {}
    for index, (row, score) in enumerate(zip(rows, scores, strict=True)):
        if score.value is None and get_benchmark(row.benchmark).judge == "needed":
            left.setdefault(get_benchmark(row.benchmark).metric, []).append(index)
    for metric, places in left.items():
        judged = judge_module.judge_rows(metric, [rows[index] for index in places], judge)
        for index, score in zip(places, judged, strict=True):
            scores[index] = score
    return scores


def _score_row(row: Row) -> Score:
    metric = get_benchmark(row.benchmark).metric
    if metric not in METRICS:
        known = ", ".join(METRICS)
        raise UserError(f"benchmark {row.benchmark!r} names the unknown metric {metric!r}; known: {known}")
    if not isinstance(row.prediction, str) and row.meta.get("group") != "circular":
        kind = type(row.prediction).__name__
        raise UserError(f"benchmark {row.benchmark!r}: a prediction must be text, not {kind}")
    return METRICS[metric](row)
