"""MATH-Vision's equality and MathVista's typed comparison."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rapidfuzz.distance import Levenshtein

from caprl_utils.answers import final_answer, has_answer_mark, read_letter
from caprl_utils.prism.scoring.choices import letters_for
from caprl_utils.prism.scoring.types import Score

DECIMALS = 2  # MATH-Vision's official rounding
MAX_SHORT_WORDS = 8  # ours: a MathVista answer of more words needs the judge's extraction

_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"([+-]?\d+)/(\d+)")


def mathvision_accuracy(prediction: str, gold: Any, options: Sequence[str] | None) -> Score:
    """MATH-Vision: the letter or the option's text for choices, else equality rounded to two decimals."""
    answer = final_answer(prediction)
    if not answer:
        return Score(0.0, None, "empty answer")
    gold = str(gold).strip()
    accepted = [gold]
    if options:
        letters = letters_for(options)
        reading = read_letter(answer, letters)
        if reading.letter is not None:
            return Score(float(reading.letter == gold), reading.letter)
        if gold in letters:
            accepted.append(options[letters.index(gold)])
    return Score(float(any(math_equal(answer, text) for text in accepted)), answer)


def math_equal(answer: str, gold: str) -> bool:
    """Equal as cleaned text, item by item in tuples, or as numbers rounded to two decimals.

    LaTeX is evaluated with latex2sympy2-extended. As in the official code, what holds a root, pi or a
    variable is not turned into a decimal: it equals only the same text.
    """
    answer, gold = _clean(answer), _clean(gold)
    if not answer or not gold:
        return False
    if answer == gold:
        return True
    pair = (_items(answer), _items(gold))
    if pair[0] and pair[1]:
        return (
            len(pair[0]) == len(pair[1])
            and answer[0] == gold[0]
            and all(left == right or _equal_numbers(left, right) for left, right in zip(*pair, strict=True))
        )
    return _equal_numbers(answer, gold)


def _equal_numbers(answer: str, gold: str) -> bool:
    left, right = _value(answer), _value(gold)
    return left is not None and right is not None and round(left, DECIMALS) == round(right, DECIMALS)


def _items(text: str) -> list[str] | None:
    if len(text) > 2 and text[0] + text[-1] in ("()", "[]") and "," in text:
        return text[1:-1].split(",")
    return None


def _clean(text: str) -> str:
    """Lower case; what follows the last equals or approximation sign; without degrees, units, spaces."""
    text = text.lower().strip().rstrip(".").lstrip(":")
    text = text.split("=")[-1].split("\\approx")[-1]
    text = text.replace("\u221e", "\\infty").replace("\u00b0", "")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\(?:left|right|,|!|;)|\\?\$|\\%|\\text|\\mbox", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(?:\{m\}|m)\^3|\{units\}|units|\{km\}|km", "", text)
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"^[({]([a-e])[)}]$", r"\1", text)
    return _GROUPED.sub("", text) if not text.startswith(("(", "[")) else text


@lru_cache(maxsize=20_000)
def _value(text: str) -> float | None:
    """The number that `text` writes, None where the official code would not get one."""
    text = text.strip()
    if _PLAIN_NUMBER.fullmatch(text):
        return float(text)
    if (fraction := _FRACTION.fullmatch(text)) and int(fraction[2]):
        return int(fraction[1]) / int(fraction[2])
    if len(text) > 200 or not re.search(r"\d", text):
        return None
    return _latex_value(text)


def _latex_value(text: str) -> float | None:
    from latex2sympy2_extended import latex2sympy
    from sympy import Rational

    try:
        expression = latex2sympy(text, convert_degrees=False).doit()
        if expression.is_Float or expression.is_Rational:
            return float(Rational(expression))
    except Exception:  # the parser raises many types; the official code takes any error as "not equal"
        return None
    return None


def mathvista_match(
    prediction: str,
    gold: Any,
    *,
    question_type: str | None,
    answer_type: str | None,
    choices: Sequence[str] | None,
    precision: float | None,
    extracted: bool,
) -> Score:
    """MathVista's typed comparison of an extracted answer with the gold.

    The judge's part is only the extraction. A short or marked answer needs none; a longer text without
    one gives no score.

    Args:
        precision: decimals of float answers; stored as 1.0 in the data, used as an integer.
        extracted: True when a judge has extracted `prediction` already.
    """
    answer = prediction.strip() if extracted else final_answer(prediction)
    if not extracted and not has_answer_mark(prediction) and len(answer.split()) > MAX_SHORT_WORDS:
        return Score(None, None, "no judge: a MathVista answer in a sentence needs one to extract it")
    if not answer:
        return Score(0.0, None, "empty answer")
    if question_type == "multi_choice" and choices:
        value: str | None = _nearest_choice(answer, list(choices))
    else:
        value = _typed(answer, answer_type, precision)
    if value is None:
        return Score(0.0, None, f"not read as {answer_type}")
    return Score(float(value.strip() == str(gold).strip()), value)


def _nearest_choice(answer: str, choices: list[str]) -> str:
    letters = letters_for(choices)
    marked = re.findall(r"\(([a-zA-Z])\)", answer)
    letter = marked[0].upper() if marked else answer
    if len(letter) == 1 and letter in letters:
        return choices[letters.index(letter)]
    distances = [Levenshtein.distance(letter, choice) for choice in choices]
    return choices[distances.index(min(distances))]


def _typed(answer: str, answer_type: str | None, precision: float | None) -> str | None:
    try:
        if answer_type == "integer":
            return str(int(float(answer)))  # truncates; a thousands separator is not a number
        if answer_type == "float":
            return str(round(float(answer), int(precision if precision is not None else 0)))
    except (ValueError, OverflowError):
        return None
    return answer
