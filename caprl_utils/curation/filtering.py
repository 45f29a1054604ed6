"""Keep what the image answers and nothing else does (author README: visual > 0.75, text < 0.25)."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from caprl_utils.curation.answering import accuracy
from caprl_utils.records import Answered, Answers, Extracted, Question, Row, text_key
from caprl_utils.schema import Curation


class Verdict(StrEnum):
    """What the filter says about a question."""

    KEPT = "kept"
    LEAKS = "answered without the image"
    NOT_VISIBLE = "not answered with the image"
    BOTH = "answered without the image, not with it"


class JudgedQuestion(Row):
    """One question with its measured accuracies: a row of questions.parquet.

    other_accuracy: with another image. open_correct: without options, the answer was the right option's text.
    """

    id: str
    image_id: str
    number: int
    question: str
    options: tuple[str, ...]
    answer: str
    visual_accuracy: float
    text_accuracy: float
    other_accuracy: float | None
    open_correct: bool | None
    unparsed: int
    verdict: Verdict

    def as_question(self) -> Question:
        """Without the measurements."""
        return Question(question=self.question, options=self.options, answer=self.answer)


def judge(extracted: Extracted, answered: Answered, settings: Curation) -> Iterator[JudgedQuestion]:
    """All questions about one image with their verdicts."""
    for answers in answered.answers:
        question = extracted.questions[answers.number]
        visual = accuracy(answers.visual, question.answer)
        text = accuracy(answers.text, question.answer)
        yield JudgedQuestion(
            id=f"{extracted.id}#{answers.number}",
            image_id=extracted.id,
            number=answers.number,
            **question.model_dump(),
            visual_accuracy=visual,
            text_accuracy=text,
            other_accuracy=accuracy(answers.other, question.answer),
            open_correct=_open_correct(answers, question),
            unparsed=sum(letter is None for letter in (*answers.visual, *answers.text)),
            verdict=verdict(visual, text, settings),
        )


def verdict(visual: float, text: float, settings: Curation) -> Verdict:
    """Both limits are strict: a question exactly at one is dropped."""
    visible, leaks = visual > settings.min_visual_accuracy, text >= settings.max_text_accuracy
    if visible:
        return Verdict.LEAKS if leaks else Verdict.KEPT
    return Verdict.BOTH if leaks else Verdict.NOT_VISIBLE


def _open_correct(answers: Answers, question: Question) -> bool | None:
    if answers.open_answer is None:
        return None
    return text_key(answers.open_answer) == text_key(question.answer_text)


def truth_of(question: Question, meta: dict[str, Any]) -> str | None:
    """What an image source that knows its images says about a question.

    Sources with knowledge give `facts` (visible) and `known` (answerable without the image), both key ->
    value, asked as "What is the KEY?". Returns "sound", "leaking", "wrong answer" or "unknown fact"; None for
    a source without knowledge.
    """
    if "facts" not in meta:
        return None
    key = question.question.removeprefix("What is the ").removesuffix("?")
    for name, label in (("known", "leaking"), ("facts", "sound")):
        if key in meta[name]:
            return label if text_key(question.answer_text) == text_key(meta[name][key]) else "wrong answer"
    return "unknown fact"
