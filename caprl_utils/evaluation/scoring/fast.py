"""Verdicts of math-verify that can be known without calling it.

math-verify takes 2 to 60 ms an answer, nearly all of it for answers whose verdict is plain: the same
text, another letter, another number, another word. A shortcut is taken only where the outcome follows
from what math-verify does (0.8.0):

* Equal texts: both parse to the same list, whose last item is the same non-empty text, and equal texts
  verify. Score 1.
* No answer: an empty text parses to nothing and verifies with nothing. Score 0.
* Different values: if the texts parse at all, they parse to numbers, or to a number times a product of
  one-letter (sometimes two-letter) symbols. Two such products can only be equal if they hold the same
  letters and the same factor; if letters differ, or factors by more than the rounding to six places,
  no comparison of math-verify can call them equal. Score 0.

Everything else (equal value in another writing, anagrams, units, sets, LaTeX, what cannot be parsed)
goes to math-verify. The differential test compares the two on generated answers.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from caprl_utils.evaluation.scoring.caprl import Verdict

CACHE_SIZE = 100_000  # texts; a shape takes well under a kilobyte
MAX_LENGTH = 60  # longer texts are rare and gain least

# One math region, nothing that opens another: the whole text is what math-verify extracts.
_SAFE = re.compile(r"[A-Za-z0-9 .,%/\-]+|\\[dt]?frac\{-?\d{1,6}\}\{\d{1,6}\}")
_NUMBER = re.compile(r"(-?\d{1,9}(?:\.\d{1,6})?)(%?)")
_GROUPED = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3}){1,3}")
_FRACTION = re.compile(r"\\frac\{(-?\d{1,6})\}\{(\d{1,6})\}")
_RANGE = re.compile(r"(\d{1,6})-(\d{1,6})")
_FACTOR = re.compile(r"\d{1,8}|\d{1,5}\.\d{1,3}")
_LETTER_TOKENS = frozenset({"LETTER_NO_E", "EXP_E", "E_NOTATION_E", "DIFFERENTIAL"})
_MARGIN = Fraction(1, 10**5)  # math-verify rounds to six places; nearer values are left to it


@dataclass(frozen=True, slots=True)
class Shape:
    """What a text is if math-verify can parse it: `factor` times the product of `letters`.

    text: math-verify's normalised text, never empty.
    letters: the letters, lower case, with their counts; empty for a plain number.
    constant: letters are only e and i, which may be numbers (Euler's, the imaginary unit).
    """

    text: str
    factor: Fraction
    letters: frozenset[tuple[str, int]]
    constant: bool

    @property
    def is_number(self) -> bool:
        return self.constant or not self.letters


def known_verdict(answer: str, gold: str) -> Verdict | None:
    """The verdict if it can be known without math-verify, else None."""
    reference = shape(gold)
    if reference is None:
        return None
    if answer == gold:
        return Verdict(1.0, reference.text, True)
    if not answer:
        return Verdict(0.0, "", True)
    given = shape(answer)
    if given is None or answer.strip() == reference.text or not _differ(given, reference):
        return None
    return Verdict(0.0, given.text, True)


def _differ(left: Shape, right: Shape) -> bool:
    if left.text == right.text:
        return False
    if left.letters == right.letters:
        return not left.constant and abs(left.factor - right.factor) > _MARGIN
    # e and i may be numbers, so against a number or each other they are left to math-verify; any other
    # letter makes two products unlike.
    return not (left.is_number and right.is_number)


@lru_cache(maxsize=CACHE_SIZE)
def shape(raw: str) -> Shape | None:
    """The shape of a text as it stands between dollar signs, None if it is not of a known kind."""
    if len(raw) > MAX_LENGTH or not _SAFE.fullmatch(raw):
        return None
    text = _normalise(raw)
    if not text:
        return None
    value = _value(text)
    if value is not None:
        return Shape(text, value, frozenset(), False)
    return _product(text)


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


def _product(text: str) -> Shape | None:
    """Letters with at most one number among them, each token a symbol or the number."""
    tokens = _tokens(text)
    if len(tokens) == 1 and tokens[0][0] == "DIFFERENTIAL":
        return None  # a two-letter symbol alone is compared letter by letter with products
    factor: Fraction | None = None
    letters: Counter[str] = Counter()
    for kind, token in tokens:
        if kind in _LETTER_TOKENS:
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
    if not all("a" <= letter <= "z" for letter in folded):
        return None
    constant = not set(folded) - {"e", "i"}
    return Shape(text, factor or Fraction(1), frozenset(folded.items()), constant)


def _tokens(text: str) -> tuple[tuple[str, str], ...]:
    from antlr4 import InputStream, Token
    from latex2sympy2_extended.antlr_parser import PSLexer, PSParser

    lexer = PSLexer(InputStream(text))
    lexer.removeErrorListeners()
    tokens = []
    while (token := lexer.nextToken()).type != Token.EOF:
        tokens.append((PSParser.symbolicNames[token.type], token.text))
    return tuple(tokens)
