"""Find the questions in what the writer wrote, and never guess (paper, QA curation, step 3).

A question is taken only when its number, bold statement, four distinct options and the letter of one of them are all
there, and the answer's text, if any, is that option's. All else is rejected with one reason and counted. Harmless
variants are read, the authors' own layout among them: "Question 1:", "A.", "(A)", dashes, full-width marks, headings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from caprl_utils.records import Question, Row, text_key

LETTERS = "ABCD"
NUM_QUESTIONS = 5  # paper: questions per image; prompts.WRITE_QUESTIONS asks for so many
_EXCERPT = 300  # characters of the rejected piece that are kept
_CUT_OFF, _NO_ANSWER, _SEVERAL = "cut off at the token limit", "no answer line", "more than one answer"


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


_EMPHASIS = re.compile(r"(?<![\w*])\*\*(?=\S)(.+?)(?<=\S)\*\*")  # not 2**3
_STARTS_BOLD = re.compile(r"^(?:#+\s*)?(?:[(（]?\d{1,3}\s*[.):．）：、]\s*|#\s*)?(?:\*\*(?=\S).*\*\*)|^#+\s")
_NUMBERED = re.compile(r"^[(（]?(?P<number>\d{1,3})\s*[.):．）：、](?!\d)\s*(?P<text>.*)$")  # not "3.5 grams"
_NAMED = re.compile(
    r"^(?:question|问题)\s*(?:no\.?|#)?\s*(?P<number>\d{1,3})(?!\d)\s*(?:[.):．）：、–-]\s*|\s|$)(?P<text>.*)$"
    r"|^q\s*(?P<short>\d{1,3})\s*[.):．）：、–-]\s*(?P<rest>.*)$",
    re.IGNORECASE,
)
_OPTION = re.compile(r"^(?:[-*•+]\s+)?[(（]?(?P<letter>[A-Z])[).:．）：、]\s*(?P<text>.*)$")
_SMALL_OPTION = re.compile(r"^(?:[-*•+]\s+)?[(（]?(?P<letter>[a-z])[).．）]\s+(?P<text>.*)$")
_LABEL = re.compile(r"^(?:answer\s+)?(?:options|choices|选项)\s*[:：]?$", re.IGNORECASE)
_ANSWER = re.compile(
    r"^(?:[-*•+>]\s*)?(?:the\s+)?(?:correct\s+|right\s+|正确)?(?:answer|答案)"
    r"(?:\s*[:：]|\s+is\b\s*:?|\s*$|(?=\s+[(（]?[A-Z][).:．）：]))\s*(?P<value>.*)$",
    re.IGNORECASE,
)
_ANSWER_VALUE = re.compile(
    r"^(?:option\s+)?[(（]?(?:(?P<letter>[A-Za-z])[).:．）：、]+|(?P<alone>[A-Za-z])$)\s*(?P<text>.*)$", re.IGNORECASE
)
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
    """A heading and the lines up to the next one. problem: of the first line that is out of place."""

    number: int | None
    question: str
    bold: bool = True
    lines: list[str] = field(default_factory=list)
    options: list[tuple[str, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    problem: str | None = None

    @property
    def text(self) -> str:
        """The piece as it was written."""
        return "\n".join([self.question, *self.lines])

    def is_prose(self) -> bool:
        """Whether it is no question at all, but a part of an introduction, a title or an explanation."""
        return not self.options and not self.answers and not (self.bold and self.number and _asks(self.question))

    def ends_before(self, other: _Block) -> bool:
        """Whether another heading starts a question of its own, and is no line of this one (a list of statements)."""
        if self.answers or self.options or (self.number is None and not self.question):
            return other.bold or bool(self.answers)
        if other.number is None or not other.bold:
            return False
        prose = not (self.bold and _asks(self.question)) and (_asks(other.question) or not other.question)
        return self.number is None or prose or (other.number > self.number and not self.problem)

    def add(self, raw: str, line: str) -> None:
        """Take a line that is no heading. line: as `raw`, without its marks of emphasis."""
        self.lines.append(raw)
        if match := _ANSWER.match(line):
            self.answers.append(match["value"].strip("* "))
        elif self.answers and not self.answers[-1] and _option(line):
            self.answers[-1] = line
        elif (match := _option(line)) and not (self.answers and match["letter"].islower()):
            if self.answers:
                self.problem = self.problem or "options after the answer"
            self.options.append((match["letter"].upper(), " ".join(match["text"].split())))
        elif not self.question and not self.options:
            self.question = line
        elif not self.answers and not _LABEL.match(line):  # what follows the answer is a remark
            self.problem = self.problem or "a line that is neither option nor answer"


def _asks(text: str) -> bool:
    return text.rstrip(" \"'”’)）*").endswith(("?", "？", "؟"))


def _option(line: str) -> re.Match[str] | None:
    return _OPTION.match(line) or _SMALL_OPTION.match(line)


def extract(text: str, finish_reason: str = "stop") -> tuple[list[Question], list[Rejection]]:
    """The questions in a text, a rejection for each piece that is none. finish_reason: "length" where it was cut."""
    questions: list[Question] = []
    rejected: list[Rejection] = []
    numbers, statements = set[int](), set[str]()

    def reject(reason: str, number: int | None, piece: str) -> None:
        excerpt = piece[:_EXCERPT].encode("utf-8", "replace").decode()
        rejected.append(Rejection(reason=reason, number=number, text=excerpt))

    blocks, cut = _blocks(text), finish_reason == "length"
    blocks = [b for b in blocks if not b.is_prose() or (cut and b is blocks[-1] and b.number)]
    if not blocks:
        reject("no numbered bold question in the text" if text.strip() else "empty text", None, text)
    for block in blocks:
        last = cut and block is blocks[-1]
        found = _question(block, numbers, whole=not last)
        if isinstance(found, str):
            reject(_CUT_OFF if last else found, block.number, block.text)
        elif (statement := text_key(found.question)) in statements:
            reject("same question twice", block.number, block.text)
        else:
            questions.append(found)
            statements.add(statement)
        if block.number is not None and block.bold:
            numbers.add(block.number)
    return questions, rejected


def _blocks(text: str) -> list[_Block]:
    """The pieces; each starts with what may start a question: a numbered line, or one that is bold as a whole."""
    blocks: list[_Block] = []
    for raw in map(str.strip, text.splitlines()):
        if not raw or _RULE.match(raw):
            continue
        whole, bold, heading = raw.lstrip("#").strip(), bool(_STARTS_BOLD.match(raw)), None
        line = _EMPHASIS.sub(r"\1", whole).strip()
        if _option(line) or _ANSWER.match(line) or _LABEL.match(line):
            pass
        elif match := _NUMBERED.match(line):
            heading = _Block(int(match["number"]), match["text"].strip(), bold)
        elif match := _NAMED.match(line):
            named = (match["text"] or match["rest"] or "").strip()
            heading = _Block(int(match["number"] or match["short"]), named, bold)
        elif whole.startswith("**") and whole.endswith("**") and whole != line:
            heading = _Block(None, line)
        if heading and (not blocks or blocks[-1].ends_before(heading)):
            blocks.append(heading)
        elif blocks:
            blocks[-1].add(raw, line)
    return blocks


def _question(block: _Block, numbers: set[int], whole: bool) -> Question | str:
    """The block as a question, or why it is none. numbers: of the blocks before it. whole: text follows, so that a
    letter alone is an answer.
    """
    letters, options = [letter for letter, _ in block.options], [text for _, text in block.options]
    keys, value = [text_key(text) for text in options], block.answers[0] if block.answers else ""
    match = _ANSWER_VALUE.match(value)
    letter, text = ((match["letter"] or match["alone"]).upper(), match["text"]) if match else ("", "")
    named = dict(zip(LETTERS, keys, strict=False)).get(letter)
    checks = [
        (not block.bold, "question not bold"),
        (block.number is None, "question without number"),
        (block.number in numbers, "number used twice"),
        (block.number not in range(1, NUM_QUESTIONS + 1), "more questions than asked for"),
        (not block.question, "empty question"),
        (_UNREADABLE.search(block.text), "characters that are no text"),
        (block.problem, block.problem),
        (not block.answers, _NO_ANSWER),
        (len(block.answers) > 1, _SEVERAL),
        (len(set(letters)) < len(letters), "option letter used twice"),
        (len(letters) < len(LETTERS), "fewer than four options"),
        (len(letters) > len(LETTERS), "more than four options"),
        (letters != [*LETTERS], "option letters out of order"),
        (not all(keys), "empty option"),
        (len(set(keys)) < len(keys), "two options with the same text"),
        # it would change its meaning when options are shuffled
        (any(map(_REFERS.search, options)), "option that refers to other options"),
        (not value, _NO_ANSWER),
        (_TWO_LETTERS.match(value) and text_key(value) not in keys, _SEVERAL),
        (match is None, "answer text without letter"),
        (letter not in LETTERS, "answer letter is no option"),
        (not text and not whole, _CUT_OFF),
        (text and text_key(text) != named, "answer text is not that of its letter"),
    ]
    if reason := next((reason for is_so, reason in checks if is_so), None):
        return reason
    question = " ".join(block.question.split())
    return Question(question=question, options=tuple(options), answer=letter, number=block.number)
