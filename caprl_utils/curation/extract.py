"""Find the questions in what the writer wrote, and never guess (paper, QA curation, step 3).

A question is taken only when its number, bold statement, four distinct options, answer letter and answer text
are all there and agree. Everything else is rejected with one reason and counted. Harmless variants are read:
"A." or "(A)" for "A)", full-width brackets, bullets before options, text before the first question.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from caprl_utils.records import Question, Row, text_key

LETTERS = "ABCD"
NUM_QUESTIONS = 5  # paper: questions per image; prompts.WRITE_QUESTIONS asks for so many
_EXCERPT = 300  # characters of the rejected piece that are kept


class Reason(StrEnum):
    """Why a piece of text is no question; each piece gets one reason."""

    EMPTY_TEXT = "empty text"
    NO_QUESTION = "no numbered bold question in the text"
    CUT_OFF = "cut off at the token limit"
    NOT_BOLD = "question not bold"
    NO_NUMBER = "question without number"
    NUMBER_REPEATED = "number used twice"
    EXTRA_QUESTION = "more questions than asked for"
    EMPTY_QUESTION = "empty question"
    UNREADABLE = "characters that are no text"
    UNEXPECTED_LINE = "a line that is neither option nor answer"
    NO_ANSWER = "no answer line"
    ANSWER_NOT_BOLD = "answer line not bold"
    SEVERAL_ANSWERS = "more than one answer"
    ANSWER_TOO_EARLY = "options after the answer"
    LETTER_REPEATED = "option letter used twice"
    MISSING_OPTION = "fewer than four options"
    TOO_MANY_OPTIONS = "more than four options"
    WRONG_ORDER = "option letters out of order"
    EMPTY_OPTION = "empty option"
    OPTIONS_EQUAL = "two options with the same text"
    OPTION_REFERS = "option that refers to other options"
    ANSWER_WITHOUT_LETTER = "answer text without letter"
    ANSWER_WITHOUT_TEXT = "answer letter without text"
    UNKNOWN_LETTER = "answer letter is no option"
    ANSWER_DISAGREES = "answer text is not that of its letter"
    QUESTION_REPEATED = "same question twice"


class Rejection(Row):
    """A piece of the writer's text that is no question of the asked form, and why."""

    reason: str
    number: int | None
    text: str


class QuestionSet(Row):
    """The questions found in the text about one image (`id`) and what was rejected; later with their answers."""

    id: str
    questions: tuple[Question, ...]
    rejected: tuple[Rejection, ...] = ()


_BOLD = re.compile(r"^(?:#+\s*)?\*\*(?P<inner>.+?)\*\*\s*$")
_BOLD_NUMBER = re.compile(r"^(?:#+\s*)?\*\*\s*(?P<number>\d{1,3})\s*[.):．）：]\s*\*\*\s*(?P<text>.*)$")
_NUMBERED = re.compile(  # not "3.5 grams", whose 3 is no number of a question
    r"^(?:question\s*)?(?P<number>\d{1,3})\s*[.):．）：](?!\d)\s*(?P<text>.*)$", re.IGNORECASE
)
_OPTION = re.compile(r"^(?:[-*•]\s+)?[(（]?(?P<letter>[A-Z])[).:．）：]\s*(?P<text>.*)$")
_ANSWER = re.compile(
    r"^\*\*\s*(?:correct\s+)?answer\s*(?::\s*\*\*|\*\*\s*:|:(?=.*\*\*\s*$)|\*\*)\s*(?P<value>.*?)(?:\*\*)?\s*$",
    re.IGNORECASE,
)
_PLAIN_ANSWER = re.compile(r"^(?:correct\s+)?answer\s*[:：]", re.IGNORECASE)
_ANSWER_VALUE = re.compile(r"^[(（]?(?P<letter>[A-Z])(?:[).:．）：]\s*(?P<text>.*)|\s*)$")
# Letters are capitals and joined by whole words: "Dora" and "Band A" are no pairs of letters.
_TWO = r"[(（]?[A-Z][).）]?\s*(?:,|&|/|\+|\s(?:and|or|nor)\s)\s*[(（]?[A-Z]"
_TWO_LETTERS = re.compile(rf"^{_TWO}\b")
_REFERS = re.compile(
    rf"^(?i:both\s+|neither\s+|either\s+|only\s+)?(?i:options?\s+)?{_TWO}[)）]?$"
    r"|(?i:\b(?:all|none|both|neither|any|either|some|two)\s+of\s+(?:the\s+)?"
    r"(?:above|below|these|those|options|others)\b"
    r"|\ball\s+(?:options\s+)?(?:above|listed)\b|\b(?:above|previous|first|last)\s+options?\b)"
    r"|以上(?:都|皆|全)|上述"
)
_RULE = re.compile(r"^(?:[-_*=]\s*){3,}$")
_UNREADABLE = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass
class _Block:
    """A heading and the lines up to the next one."""

    number: int | None
    question: str
    bold: bool
    lines: list[str] = field(default_factory=list)

    def rejection(self, reason: Reason) -> Rejection:
        text = "\n".join([self.question, *self.lines])[:_EXCERPT]
        return Rejection(reason=reason, number=self.number, text=text.encode("utf-8", "replace").decode())


def extract(text: str, finish_reason: str = "stop") -> tuple[list[Question], list[Rejection]]:
    """The questions in a text, and one rejection per piece that is none.

    finish_reason: "length" when the writer was stopped by its token limit.
    """
    blocks = _blocks(text)
    if not blocks:
        reason = Reason.NO_QUESTION if text.strip() else Reason.EMPTY_TEXT
        excerpt = text[:_EXCERPT].encode("utf-8", "replace").decode()
        return [], [Rejection(reason=reason, number=None, text=excerpt)]
    questions: list[Question] = []
    rejected: list[Rejection] = []
    numbers: set[int] = set()
    statements: set[str] = set()
    for block in blocks:
        found = _heading_problem(block, numbers) or _read(block)
        if isinstance(found, Reason) and block is blocks[-1] and finish_reason == "length":
            found = Reason.CUT_OFF
        if isinstance(found, Question) and text_key(found.question) in statements:
            found = Reason.QUESTION_REPEATED
        if isinstance(found, Reason):
            rejected.append(block.rejection(found))
        else:
            questions.append(found)
            statements.add(text_key(found.question))
        if block.number is not None:
            numbers.add(block.number)
    return questions, rejected


def _blocks(text: str) -> list[_Block]:
    blocks: list[_Block] = []
    for line in (raw.strip() for raw in text.splitlines()):
        if not line or _RULE.match(line):
            continue
        if (block := _heading(line)) is not None:
            blocks.append(block)
        elif blocks:
            blocks[-1].lines.append(line)
    return blocks


def _heading(line: str) -> _Block | None:
    """The start of a question: a bold line, or a numbered one; never an option or an answer line."""
    if _ANSWER.match(line) or _PLAIN_ANSWER.match(line):
        return None
    if match := _BOLD_NUMBER.match(line):
        return _Block(int(match["number"]), match["text"].strip().strip("*").strip(), bold=True)
    if match := _BOLD.match(line):
        inner = match["inner"].strip()
        if _OPTION.match(inner):
            return None
        numbered = _NUMBERED.match(inner)
        number = int(numbered["number"]) if numbered else None
        return _Block(number, numbered["text"].strip() if numbered else inner, bold=True)
    if match := _NUMBERED.match(line):
        return _Block(int(match["number"]), match["text"].strip(), bold=False)
    return None


def _heading_problem(block: _Block, numbers: set[int]) -> Reason | None:
    if not block.bold:
        return Reason.NOT_BOLD
    if block.number is None:
        return Reason.NO_NUMBER
    if block.number in numbers:
        return Reason.NUMBER_REPEATED
    if not 1 <= block.number <= NUM_QUESTIONS:
        return Reason.EXTRA_QUESTION
    if not block.question:
        return Reason.EMPTY_QUESTION
    return None


def _read(block: _Block) -> Question | Reason:
    """The block as a question, or why it is none."""
    if _UNREADABLE.search("\n".join([block.question, *block.lines])):
        return Reason.UNREADABLE
    options: list[tuple[str, str]] = []
    answers: list[str] = []
    for line in block.lines:
        if match := _ANSWER.match(line):
            answers.append(match["value"].strip().strip("*").strip())
        elif _PLAIN_ANSWER.match(line):
            return Reason.ANSWER_NOT_BOLD
        elif match := _OPTION.match(line):
            if answers:
                return Reason.ANSWER_TOO_EARLY
            options.append((match["letter"], " ".join(match["text"].split())))
        elif not answers:  # what follows the answer is a remark
            return Reason.UNEXPECTED_LINE
    if len(answers) != 1:
        return Reason.SEVERAL_ANSWERS if answers else Reason.NO_ANSWER
    problem = _options_problem(options)
    return problem or _with_answer(block, [text for _, text in options], answers[0])


def _options_problem(options: list[tuple[str, str]]) -> Reason | None:
    letters = [letter for letter, _ in options]
    texts = [text for _, text in options]
    if len(set(letters)) < len(letters):
        return Reason.LETTER_REPEATED
    if len(letters) < len(LETTERS):
        return Reason.MISSING_OPTION
    if len(letters) > len(LETTERS):
        return Reason.TOO_MANY_OPTIONS
    if letters != list(LETTERS):
        return Reason.WRONG_ORDER
    if not all(text_key(text) for text in texts):
        return Reason.EMPTY_OPTION
    if len({text_key(text) for text in texts}) < len(texts):
        return Reason.OPTIONS_EQUAL
    if any(_REFERS.search(text) for text in texts):  # it would change its meaning when options are shuffled
        return Reason.OPTION_REFERS
    return None


def _with_answer(block: _Block, options: list[str], value: str) -> Question | Reason:
    if not value:
        return Reason.NO_ANSWER
    if _TWO_LETTERS.match(value) and text_key(value) not in map(text_key, options):
        return Reason.SEVERAL_ANSWERS
    match = _ANSWER_VALUE.match(value)
    if match is None:
        return Reason.ANSWER_WITHOUT_LETTER
    letter, text = match["letter"], match["text"]
    if letter not in LETTERS:
        return Reason.UNKNOWN_LETTER
    if not text:
        return Reason.ANSWER_WITHOUT_TEXT
    if text_key(text) != text_key(options[LETTERS.index(letter)]):
        return Reason.ANSWER_DISAGREES
    question = " ".join(block.question.split())
    return Question(question=question, options=tuple(options), answer=letter, number=block.number)
