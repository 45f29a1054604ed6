"""The one answer parser, shared by the reward, the curation filter and the evaluation.

Failure policy, the same everywhere: a text without one clear answer gives ``None``. The caller
counts it, lists it and scores it as wrong (or leaves it out, if the metric says so); nothing in
this project draws a letter at random or picks the likelier of two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DEFAULT_LETTERS = "ABCD"

_WRAPPERS = r"text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox"
_WRAPPED = re.compile(rf"\\(?:{_WRAPPERS})\s*\{{([^{{}}]*)\}}")
_BOX = re.compile(r"\\boxed\s*\{")

# A letter with a mark of its own: "(B)", "[B]", "B)", "B]".
_MARKED = re.compile(r"[(\[]\s*([A-Z])\s*[)\]]|(?<![A-Za-z0-9(\[])([A-Z])\s?[)\]]")
# "B. dog", "B: dog", "B, because", "B" at the very start.
_LEADING = re.compile(r"^([A-Z])(?:\s*[.:,;!?)\]]|\s*$|\s+(?=because|since|as|is|[-\u2013\u2014]))")
_LEADING_BARE = re.compile(r"^([B-HJ-Z])\s")  # not A and I, which are words
_BARE_OPTION = re.compile(r"^([A-Z])\s+(.+)$", re.DOTALL)
# "the answer is B", "Answer: B", "option B", "I choose B", "so B".
_CUE = re.compile(
    r"\b(?i:answers?|option|choice|letter|is|be|are|choose|chose|select|pick|so|thus|therefore|hence|with|it['\u2019]s)\b"
    r"\s*(?i:[:=]|\bis\b|\bwould\s+be\b|\bshould\s+be\b)?\s*(?i:(?:option|choice|letter|answer)\s*)?"
    r"[\"'\u201c\u2018]?([A-Z])(?![A-Za-z0-9'\u2019])(?!\s+[a-z])",
)
# A further letter tied to one that is stated: "B or C", "A and B", "A, B", "B/C".
_JOINED = re.compile(
    r"(?<![A-Za-z0-9])([A-Z])\s*(?:,|/|&|\bor\b|\band\b|,\s*or\b|,\s*and\b)\s*"
    r"(?:option\s+|choice\s+)?[(\[]?([A-Z])(?![A-Za-z0-9'\u2019])"
)
# A letter that is ruled out: "not B", "B is wrong".
_NEGATED = re.compile(
    r"\b(?i:not|isn['\u2019]t|never|neither|nor|except|cannot be|can['\u2019]t be)\s+"
    r"(?i:(?:option|choice|the)\s+)?[(\[]?([A-Z])(?![A-Za-z0-9'])"
    r"|(?<![A-Za-z0-9])([A-Z])[)\]]?\s+(?:is|are|was|seems)\s+"
    r"(?:not|never|wrong|incorrect|false)\b"
)


@dataclass(frozen=True, slots=True)
class LetterReading:
    """What a text said.

    letter: the option letter, or None when the text states none or more than one.
    source: "letter" when the letter itself was read, "option_text" when the text was exactly one of
        the options; None when nothing was read. Reports count the two apart.
    reason: why there is no letter; None when there is one.
    """

    letter: str | None
    source: Literal["letter", "option_text"] | None = None
    reason: str | None = None


def first_capital(text: str) -> str | None:
    """The first capital A to I in the text (author code of the QA reward), or None.

    Right for short completions that continue "The answer is"; wrong for free text ("Answer: B" gives A).
    """
    found = re.search(r"[A-I]", text)
    return found[0] if found else None


def read_letter(
    text: str, letters: str = DEFAULT_LETTERS, options: Sequence[str] | None = None
) -> LetterReading:
    """Read the one option letter that a text states, in one of the forms people and models use (ours).

    text: the answer, free of the reasoning before it (see `final_answer`). letters: those that exist for this
    question, e.g. "ABCDE". options: option texts without their letters, in letter order; only if given, a text that
    is exactly one of them counts as its letter.
    """
    text = text.strip()
    if not text:
        return LetterReading(None, reason="empty answer")
    if options is not None and (index := _option_index(text, options)) is not None:
        return LetterReading(letters[index], "option_text")
    return _read_stated(_plain(text), letters, options)


def _read_stated(text: str, letters: str, options: Sequence[str] | None) -> LetterReading:
    leading = _LEADING.match(text) or _LEADING_BARE.match(text)
    if leading and options is not None:
        # "B) Vitamin C": what follows the letter is an option, so its capitals are no answers.
        rest = text[leading.end() :].strip(" .:)]")
        if leading[1] in letters and _option_index(rest, options) is not None:
            return LetterReading(leading[1], "letter")
    bare = _BARE_OPTION.match(text) if options is not None else None
    if bare and bare[1] in letters and _option_index(bare[2], options) == letters.index(bare[1]):
        return LetterReading(bare[1], "letter")  # "A cat" before its own option: no article
    stated = {letter for match in _MARKED.finditer(text) for letter in match.groups() if letter}
    stated.update(match[1] for match in _CUE.finditer(text))
    if leading:
        stated.add(leading[1])
        rest = text[leading.end() :].strip(" .,:;!)]")
        if len(rest) == 1 and rest.isupper():
            stated.add(rest)
    if stated:
        stated.update(letter for match in _JOINED.finditer(text) for letter in match.groups())
    stated -= {letter for match in _NEGATED.finditer(text) for letter in match.groups() if letter}
    if not stated:
        return LetterReading(None, reason="no letter")
    if len(stated) > 1:
        return LetterReading(None, reason=f"several letters: {', '.join(sorted(stated))}")
    (letter,) = stated
    if letter not in letters:
        return LetterReading(None, reason=f"letter {letter} is not one of {letters}")
    return LetterReading(letter, "letter")


def _plain(text: str) -> str:
    """Without Markdown emphasis, quotes around the whole, boxes and text commands."""
    boxed = last_box(text) if text.startswith("\\boxed") else None
    text = unwrap_commands(text if boxed is None else boxed)
    text = re.sub(r"[*`]+|(?<!\w)_+|_+(?!\w)", "", text).replace("\uff08", "(").replace("\uff09", ")")
    return text.strip().strip("\"'\u201c\u201d\u2018\u2019$").strip()


def _option_index(text: str, options: Sequence[str]) -> int | None:
    """Position of the one option that equals `text` (case, spaces and a final full stop ignored)."""
    wanted = _option_key(text)
    hits = [index for index, option in enumerate(options) if _option_key(str(option)) == wanted]
    return hits[0] if wanted and len(hits) == 1 else None


def _option_key(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def final_answer(text: str) -> str:
    """The answer inside a completion, for the standard metrics (ours; one rule for all benchmarks).

    1. the last complete ``<answer>...</answer>`` block, else what follows the last ``</think>``,
       else the whole text;
    2. in it the last ``\\boxed{...}`` whose braces balance, if any;
    3. ``\\text{...}``-like commands are unwrapped, outer spaces dropped.

    A plain short answer comes back unchanged but for its outer spaces.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    body = text[start + len("<answer>") : end] if start >= 0 else text.rpartition("</think>")[2]
    boxed = last_box(body)
    return unwrap_commands(body if boxed is None else boxed).strip()


def has_answer_mark(text: str) -> bool:
    """Whether the completion marks its answer (an answer block or a box) rather than just talking."""
    return bool(re.search(r"<answer>.*?</answer>", text, re.DOTALL)) or last_box(text) is not None


def last_box(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` whose braces balance (the outer one if nested), or None."""
    boxes = {match.end() - 1 for match in _BOX.finditer(text)}
    if not boxes:
        return None
    open_braces: list[int] = []
    last: tuple[int, int] | None = None
    index = 0
    while index < len(text):  # one pass, so that a completion stuck in a loop costs no more than its length
        char = text[index]
        if char == "\\":
            index += 1  # an escaped brace is text
        elif char == "{":
            open_braces.append(index)
        elif char == "}" and open_braces:
            start = open_braces.pop()
            if start in boxes and (last is None or start > last[1] or start < last[0]):
                last = (start, index)
        index += 1
    return None if last is None else text[last[0] + 1 : last[1]]


def unwrap_commands(text: str) -> str:
    """``\\text{red}`` -> ``red``, also nested and for the bold, roman and italic relatives."""
    previous = None
    while previous != text:
        previous, text = text, _WRAPPED.sub(r"\1", text)
    return text
