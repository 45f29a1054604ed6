"""Verdicts of math-verify that can be known without calling it.

math-verify takes 2 to 100 ms an answer, nearly all of it for answers whose verdict is plain: the same
text, another letter, another number, another word. A shortcut is taken only where the outcome follows
from what math-verify 0.8.0 does. Each text parses to [expression, normalised text], or to the normalised
text alone; expressions are compared with expressions, texts with texts, and one hit is enough. So:

* Same normalised text (or the raw answer is the gold's normalised text): texts agree. Score 1.
* No answer: an empty text parses to nothing and verifies with nothing. Score 0.
* One side cannot be parsed, because its lexer rejects a character or a full stop is left over, which no
  rule of the grammar takes: only texts are compared. Score 0 if they differ.
* Different values: if the texts parse at all, they parse to numbers, or to a number times a product of
  symbols of one or two letters. Such products can only be equal if they hold the same letters and the
  same factor; where letters differ, or factors by more than the rounding to six places, no comparison of
  math-verify can call them equal. Score 0.

Everything else (equal value in another writing, anagrams, units in one of the two, sets, LaTeX) goes to
math-verify. A differential test compares the two on generated answers.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any, Literal

from caprl_utils.prism.scoring.caprl import Verdict

CACHE_SIZE = 100_000  # texts; a shape takes well under a kilobyte
MAX_LENGTH = 100  # texts of plain characters this long parse in well under a second, far from the time limit

# What could start or end a math region of its own, or be found with a higher priority than the whole text.
_PARTIAL = re.compile(r"[$\n\[\]]|\\[()]|\\$|boxed|fbox|answer", re.IGNORECASE)
_PLAIN = re.compile(r"[^\\{}()\[\]^_|&$<>=~!*+#@\n]+")
_ASCII = re.compile(r"[A-Za-z0-9 .,%/\-]+|\\[dt]?frac\{-?\d{1,6}\}\{\d{1,6}\}")
_NUMBER = re.compile(r"(-?\d{1,9}(?:\.\d{1,6})?)(%?)")
_GROUPED = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3}){1,3}")
_FRACTION = re.compile(r"\\frac\{(-?\d{1,6})\}\{(\d{1,6})\}")
_RANGE = re.compile(r"(\d{1,6})-(\d{1,6})")
_FACTOR = re.compile(r"\d{1,8}|\d{1,5}\.\d{1,3}")
_LETTER_TOKENS = frozenset({"LETTER_NO_E", "EXP_E", "E_NOTATION_E", "DIFFERENTIAL"})
_MARGIN = Fraction(1, 10**5)  # math-verify rounds to six places; nearer values are left to it

Kind = Literal["product", "unparsable", "unknown"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What math-verify makes of a text.

    text: its normalised text, never empty.
    kind: "product" (if it parses at all: `factor` times the product of `letters`, no letters for a
        plain number), "unparsable" (it never parses), or "unknown".
    letters: lower case, with their counts.
    """

    text: str
    kind: Kind
    factor: Fraction = Fraction(1)
    letters: frozenset[tuple[str, int]] = frozenset()

    @property
    def is_number(self) -> bool:
        """A number, or letters that may be numbers: e (Euler's) and i (the imaginary unit)."""
        return all(letter in "ei" for letter, _ in self.letters)


def known_verdict(answer: str, gold: str) -> Verdict | None:
    """The verdict if it can be known without math-verify, else None."""
    reference = shape(gold)
    if reference is None:
        return None
    if not answer:
        return None if reference.kind == "unknown" else Verdict(0.0, "", True)
    given = shape(answer)
    if given is None:
        return None
    if given.text == reference.text or answer.strip() == reference.text:
        return Verdict(1.0, given.text, True)
    if "unparsable" in (given.kind, reference.kind):
        return None if "unknown" in (given.kind, reference.kind) else Verdict(0.0, given.text, True)
    return Verdict(0.0, given.text, True) if _differ(given, reference) else None


def _differ(left: Shape, right: Shape) -> bool:
    if left.kind != "product" or right.kind != "product":
        return False
    if left.letters == right.letters:
        constant = bool(left.letters) and left.is_number
        return not constant and abs(left.factor - right.factor) > _MARGIN
    # Two numbers are left to math-verify; a letter that only one of the two holds makes them unlike.
    return not (left.is_number and right.is_number)


@lru_cache(maxsize=CACHE_SIZE)
def shape(raw: str) -> Shape | None:
    """The shape of a text as it stands between dollar signs; None if math-verify may take a part of it."""
    if not raw or len(raw) > MAX_LENGTH or _PARTIAL.search(raw):
        return None
    text = _normalise(raw)
    if not text:
        return None
    if _ASCII.fullmatch(raw) and (value := _value(text)) is not None:
        return Shape(text, "product", value)
    if not _PLAIN.fullmatch(text) or not _PLAIN.fullmatch(raw):
        return Shape(text, "unknown")
    tokens = _tokens(text)
    if tokens is None or any(kind == "PERIOD" for kind, _ in tokens):
        return Shape(text, "unparsable")
    return _product(text, tokens) or Shape(text, "unknown")


def _normalise(raw: str) -> str:
    from latex2sympy2_extended.latex2sympy2 import normalize_latex

    return normalize_latex(raw, _normalization())


@cache
def _normalization() -> Any:
    from math_verify import LatexExtractionConfig

    return LatexExtractionConfig().normalization_config


def _value(text: str) -> Fraction | None:
    if match := _NUMBER.fullmatch(text):
        return Fraction(match[1]) / (100 if match[2] else 1)
    if _GROUPED.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if (match := _FRACTION.fullmatch(text)) and int(match[2]):
        return Fraction(int(match[1]), int(match[2]))
    if match := _RANGE.fullmatch(text):  # evaluated as a difference (Q8)
        return Fraction(int(match[1]) - int(match[2]))
    return None


def _product(text: str, tokens: tuple[tuple[str, str], ...]) -> Shape | None:
    """Letters with at most one number among them, each token a symbol or the number."""
    if len(tokens) == 1 and tokens[0][0] == "DIFFERENTIAL":
        return None  # a two-letter symbol alone is compared letter by letter with products
    factor: Fraction | None = None
    letters: Counter[str] = Counter()
    for kind, token in tokens:
        if kind in _LETTER_TOKENS and re.fullmatch("[A-Za-z ]+", token):
            letters.update(token.replace(" ", ""))
        elif kind == "NUMBER" and factor is None and _FACTOR.fullmatch(token) and float(token):
            factor = Fraction(token)
        else:
            return None
    if letters["I"] > 1 or not letters:  # a product of imaginary units is a number
        return None
    folded: Counter[str] = Counter()
    for letter, count in letters.items():
        folded[letter.lower()] += count
    return Shape(text, "product", factor or Fraction(1), frozenset(folded.items()))


def _tokens(text: str) -> tuple[tuple[str, str], ...] | None:
    """The lexer's tokens; None if it rejects a character, which ends the parse."""
    from antlr4 import InputStream, Token
    from antlr4.error.ErrorListener import ErrorListener
    from latex2sympy2_extended.antlr_parser import PSLexer, PSParser

    class Reject(ErrorListener):
        def syntaxError(self, *details: Any) -> None:
            raise ValueError("not a token")

    lexer = PSLexer(InputStream(text))
    lexer.removeErrorListeners()
    lexer.addErrorListener(Reject())
    tokens = []
    try:
        while (token := lexer.nextToken()).type != Token.EOF:
            tokens.append((PSParser.symbolicNames[token.type], token.text))
    except ValueError:
        return None
    return tuple(tokens)
