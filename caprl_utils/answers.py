"""The one answer parser, shared by the reward, the curation filter and the evaluation.

Failure policy, the same everywhere: a text without one clear answer gives ``None``. The caller counts it, lists it and
scores it as wrong (or leaves it out, if the metric says so); nothing in this project draws a letter at random or picks
the likelier of two. How letters are read: `letters`.
"""

from __future__ import annotations

import re
import unicodedata

DEFAULT_LETTERS = "ABCD"

_WRAPPERS = r"text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox"
_WRAPPED = re.compile(rf"\\(?:{_WRAPPERS})\s*\{{([^{{}}]*)\}}")
_BOX = re.compile(r"\\boxed\s*\{")
_THOUGHT = re.compile(r"^.*</think(?:ing)?>|<think(?:ing)?>.*$", re.DOTALL | re.IGNORECASE)

_LINK = r"(?:\s*[:=]\s*|\s+[-\u2013\u2014]\s+|\s+(?:is|was|would\s+be|should\s+be|must\s+be)\b\s*:?\s*)"
# "The answer is", "So the final answer to the question is:", "Answer:"; what follows is the answer.
ANSWER_FRAME = re.compile(
    rf"\b(?:answer|ans\.?)(?:\s+(?:to|for)\s+(?:the|this)\s+question)?{_LINK}(?:that\s+)?", re.IGNORECASE
)
_PRONOUN_FRAME = re.compile(
    r"(?:it|this|that|they|these|those)(?:'s|'re|\s+(?:is|are|was|were))\s+(?=\S)", re.IGNORECASE
)
_YES_NO = re.compile(
    r"(yes|no)[,.;]?\s+(?!.*\b(?:mention|stat|sa[iy]|clear|possib|tell|told|know|inform|caption|descri|specif|sure))"
    r"(?:it|they|he|she|this|that|these|those|there|the|you|we|i|because|since)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_REASON = re.compile(r"\s*,?\s+(?:because|since)\b.*|,\s+(?:as|which|so)\s.*", re.IGNORECASE | re.DOTALL)
_SHORTENED = ("St", "Dr", "Mr", "Ms", "Mrs", "vs", "Inc", "Ltd", "Co", "Corp", "Jr", "Sr", "etc")
_ABBREVIATION = "".join(rf"(?<!\b{word})" for word in _SHORTENED)
_NEW_SENTENCE = r"(?:The|This|That|It|In|As|Because|Since|There|So)\b"
_SENTENCE_END = re.compile(
    rf"(?:(?<=[a-z0-9)\]%])|(?<=[A-Z]{{2}})){_ABBREVIATION}[.!] +(?=[A-Z])|[.!] +(?={_NEW_SENTENCE})|\n"
)
_FULL_STOP = re.compile(rf"(?:(?<=[A-Za-z]\.)|(?<!\.[A-Za-z])(?<!\.){_ABBREVIATION})\.$")
_SET_OFF = re.compile(r"([*_`\"'\u201c\u2018]+)(.*?)[*_`\"'\u201d\u2019]+", re.DOTALL)
MARKS = " *_`\"'\u201c\u201d\u2018\u2019"  # what is put around words to set them off


class Letter(str):
    """An option letter that a reader chose by its probability: a typed answer, never read as text."""


def first_capital(text: str) -> str | None:
    """The first capital A to I in the text (author code of the QA reward), or None. Right for short completions that
    continue "The answer is"; wrong for free text ("Answer: B" gives A).
    """
    found = re.search(r"[A-I]", text)
    return found[0] if found else None


def after_reasoning(text: str) -> str:
    """The text without a model's reasoning: what follows the last ``</think>``, nothing of an unclosed ``<think>``."""
    return _THOUGHT.sub("", text)


def final_answer(text: str) -> str:
    """The answer inside a completion, for the standard metrics (ours; one rule for all benchmarks): of the last
    complete ``<answer>...</answer>`` block, else of the text behind the reasoning, its last ``\\boxed{...}`` with even
    braces, if any, without ``\\text{...}``-like commands and outer spaces. A plain short answer stays as it is.
    """
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    body = inside if closed and opened else after_reasoning(text)
    boxed = last_box(body)
    return unwrap_commands(body if boxed is None else boxed).strip()


def short_answer(text: str) -> str:
    """What a reader says who was asked for a word or a number and answers in a sentence (ours; nothing is guessed).
    "The answer is 42." and "It is 42." give "42", "Yes, it is." gives "Yes", "25%, because ..." gives "25%": the frame,
    what explains the answer, marks around it and the final full stop go.
    """
    answer = unframed(final_answer(text))
    yes_no = _YES_NO.fullmatch(answer)
    return yes_no[1] if yes_no else _first(answer) or answer


def unframed(text: str) -> str:
    """The answer of the last "the answer is ..." (or of one sentence "It is ..."), up to its reason; else the text."""
    text = text.strip()
    frames = list(ANSWER_FRAME.finditer(text))
    if frames:
        return _first(text[frames[-1].end() :]) or text
    frame = _PRONOUN_FRAME.match(text)
    if frame and text.endswith(".") and not _SENTENCE_END.search(text):
        return _REASON.sub("", text[frame.end() :])
    return text


def _first(text: str) -> str:
    """The first sentence without its reason, its full stop and the marks around it."""
    sentence = _SENTENCE_END.split(text.replace("**", "").lstrip(" :\n"), maxsplit=1)[0]
    answer = without_full_stop(_REASON.sub("", sentence))
    set_off = _SET_OFF.fullmatch(answer)
    return without_full_stop(set_off[2] if set_off else answer)


def without_full_stop(text: str) -> str:
    """Without the full stop of a sentence; that of an abbreviation stays ("U.S.", "Apple Inc.")."""
    return _FULL_STOP.sub("", text.strip()).strip()


def plain(text: str) -> str:
    """Compatibility forms made plain, without invisible characters, quotes, Markdown emphasis and HTML tags."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = text.translate({0x201C: None, 0x201D: None, ord('"'): None, 0x2018: "'", 0x2019: "'"})
    text = re.sub(r"</?[a-z]+\s*/?>|(?<!\w)'|'(?!\w)|\\[()\[\]]", "", text)
    return re.sub(r"[*`~]+|(?<!\w)_+|_+(?!\w)", "", text).strip()


def last_box(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` whose braces balance (the outer one if nested), or None."""
    boxes = {match.end() - 1 for match in _BOX.finditer(text)}
    open_braces: list[int] = []
    first, end = -1, -1
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # one pass, so that a loop costs its length; \{ is text
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif brace[0] == "}" and open_braces:
            start = open_braces.pop()
            if start in boxes and not first < start < end:
                first, end = start, brace.start()
    return text[first + 1 : end] if end >= 0 else None


def unwrap_commands(text: str) -> str:
    """``\\text{red}`` -> ``red``, also nested and for the bold, roman and italic relatives."""
    previous = None
    while previous != text:
        previous, text = text, _WRAPPED.sub(r"\1", text)
    return text
