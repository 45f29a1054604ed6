"""Metrics on text and plain numbers: relaxed accuracy, ANLS, exact match.

Sources: ChartQA (arXiv 2203.10244, section 5.1), ChartQAPro's published evaluation script, the ANLS
definition of the DocVQA challenge, each as lmms-eval and VLMEvalKit compute it. Edit distances come
from rapidfuzz.
"""

from __future__ import annotations

import ast
import math
import re
import string
from collections.abc import Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

RELATIVE_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5


def to_float(text: str) -> float | None:
    """`text` as a number; a trailing percent sign divides by 100; None if it is not a number."""
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100.0
        return float(text)
    except ValueError:
        return None


def relaxed_match(reference: str, candidate: str, tolerance: float = RELATIVE_TOLERANCE) -> bool:
    """ChartQA's test: |candidate - reference| / |reference| <= tolerance, else equal text without case.

    Plain floating point, so 1.05 misses 1 (0.050000000000000044). A zero reference switches the
    numeric test off.
    """
    number, base = to_float(candidate), to_float(reference)
    if number is not None and base:
        return abs(number - base) / abs(base) <= tolerance
    return candidate.lower() == reference.lower()


def relaxed_accuracy(prediction: str, gold: Any) -> float:
    """ChartQA. A gold that is a list in the data is a set of alternatives; bracketed text stays text,
    as in lmms-eval (VLMEvalKit reads it as a list)."""
    golds = gold if isinstance(gold, (list, tuple)) else [gold]
    return float(any(relaxed_match(str(item), prediction) for item in golds))


def anls_distance(gold: str, prediction: str) -> float:
    """Edit distance of the lower-cased, space-collapsed strings over the longer *raw* length.

    The raw length is taken in upper case, where a sharp s counts two, as in the toolkits.
    """
    distance = Levenshtein.distance(" ".join(gold.lower().split()), " ".join(prediction.lower().split()))
    length = max(len(gold.upper()), len(prediction.upper()))
    return distance / length if length else 0.0


def anls(prediction: str, golds: Sequence[str]) -> float:
    """Best similarity over the accepted answers; below 0.5 it is 0, at exactly 0.5 it is kept.

    The original definition drops 0.5 as well; both toolkits keep it and so do we.
    """
    similarity = 1 - min((anls_distance(str(gold), prediction) for gold in golds), default=1.0)
    return 0.0 if similarity < ANLS_THRESHOLD else similarity


def exact_match(prediction: str, gold: str) -> float:
    """GQA: equal without case and punctuation (lmms-eval; VLMEvalKit keeps punctuation)."""
    table = str.maketrans("", "", string.punctuation)
    return float(prediction.lower().translate(table) == gold.lower().translate(table))


def short_match(prediction: str, gold: str) -> float:
    """RealWorldQA's open answers: equal without case and one trailing full stop; number words stay words."""

    def key(text: str) -> str:
        return text.lower().strip().removesuffix(".").strip()

    return float(key(prediction) == key(gold))


_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_NUMBERS.split())}


def vqa_accuracy(prediction: str, golds: Sequence[str]) -> float:
    """VQA accuracy (VQAv2, TextVQA): an answer that three annotators gave is right.

    Mean over all sets that leave one annotator out of min(1, matching answers / 3), after lower case,
    without articles and punctuation (points inside numbers stay), number words as digits.
    """
    keys = [_vqa_key(str(gold)) for gold in golds]
    matches = sum(key == _vqa_key(prediction) for key in keys)
    if not keys:
        return 0.0
    if len(keys) == 1:
        return float(matches)
    left_out = [min(1.0, (matches - (key == _vqa_key(prediction))) / 3) for key in keys]
    return sum(left_out) / len(left_out)


def _vqa_key(text: str) -> str:
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|(?<=\d),(?=\d)", "", text.lower().strip())
    text = re.sub(r"[^\w\s.']", " ", text)
    words = (_NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def relaxed_accuracy_pro(
    prediction: str, gold: Any, year: Any = None, question_type: str | None = None
) -> float:
    """ChartQAPro: items by position, mean over them; missing and extra items score 0.

    Follows the official script and VLMEvalKit: the exact-match switch for Multi Choice and Fact
    Checking, which they compute and never use, is not applied (lmms-eval applies it).

    Args:
        gold: the gold of the last turn, or the list of all turns as the data hold it.
        year: "YES"/"NO" flags; one flag serves all items, a conversation counts its last flag only.
    """
    target = str(gold[-1] if isinstance(gold, (list, tuple)) else gold)
    target, prediction = (text.strip().strip(".").strip("\n") for text in (target, prediction))
    wanted = _as_items(_quote_items(target))
    given = _as_items(prediction)
    flags = [str(flag).upper() for flag in ([year] if isinstance(year, str) else year or [])]
    if question_type == "Conversational":
        flags = flags[-1:]
    if 0 < len(flags) < len(wanted):
        flags = flags * len(wanted)
    scores = []
    for index in range(max(len(wanted), len(given))):
        if index >= len(wanted) or index >= len(given):
            scores.append(0.0)
        elif index < len(flags) and flags[index] == "YES":
            scores.append(float(wanted[index].strip().lower() == given[index].strip().lower()))
        else:
            scores.append(_pro_item(wanted[index], given[index]))
    return sum(scores) / len(scores)


def _pro_item(gold: str, prediction: str) -> float:
    gold, prediction = (text.strip().strip("%").strip() for text in (gold, prediction))
    base, number = _bare_float(gold), _bare_float(prediction)
    if base is not None and number is not None:
        if base == 0.0:
            return float(number == 0.0)
        return float(abs(number - base) / abs(base) <= RELATIVE_TOLERANCE)
    gold, prediction = gold.lower(), prediction.lower()
    longest = max(len(gold), len(prediction))
    distance = Levenshtein.distance(gold, prediction) / longest if longest else 0.0
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0  # strict: exactly 0.5 scores 0


def _bare_float(text: str) -> float | None:
    try:
        return float(text.strip().strip("%"))
    except ValueError:
        return None


def _quote_items(text: str) -> str:
    """Repair "[Yes, No]" to "['Yes', 'No']" so that it reads as a list; other text comes back as it is."""
    if not (inner := re.match(r"^\[(.*)\]$", text.strip())):
        return text
    quoted = re.sub(r"(?<!['\w])(\w[^,]*?)(?!['\w])", r"'\1'", inner[1])
    repaired = f"[{quoted}]"
    return repaired if _literal(repaired) is not None else text


def _as_items(text: str) -> list[str]:
    value = _literal(text)
    if isinstance(value, list) and value:
        return [str(item).strip(" '") for item in value]
    return [text]


def _literal(text: str) -> Any:
    """`text` as a Python literal, None if it is none. Never evaluates anything."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def literal_list(text: str) -> list[Any] | None:
    """The list that `text` writes out, or None. Replaces the evaluation of gold strings as code (Q16)."""
    value = _literal(text)
    return value if isinstance(value, list) else None


def is_number(text: str) -> bool:
    """Whether float() reads it, infinities and NaN left out."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
