"""Metrics for multiple choice: letters, MMMU's own parser, MMBench's circles, We-Math's four dimensions."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from caprl_utils.answers import DEFAULT_LETTERS, final_answer, read_letter
from caprl_utils.prism.scoring.text import short_match
from caprl_utils.prism.scoring.types import Score

OPTION_TEXT = "read from the option's text, not from a letter"
NO_LETTER = "counted as wrong, not drawn at random"


def letters_for(options: Sequence[str] | None, default: str = DEFAULT_LETTERS) -> str:
    """The letters that exist: as many as there are options, or `default` when the options are not known."""
    return ascii_uppercase[: len(options)] if options else default


def as_options(value: Any) -> list[str] | None:
    """Options as a list; MMMU stores them as the text of a list, read as a literal, never evaluated."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return None
    return [str(option) for option in value] if isinstance(value, (list, tuple)) and value else None


def gold_letter(gold: Any) -> str:
    """A gold letter; a position counted from 0 (AI2D) becomes its letter."""
    text = str(gold).strip()
    if text.isdigit() and int(text) < len(ascii_uppercase):
        return ascii_uppercase[int(text)]
    return text.strip("().").upper() if len(text.strip("().")) == 1 else text


def letter_accuracy(prediction: str, gold: Any, options: Sequence[str] | None, letters: str) -> Score:
    """1 if the answer states the gold letter; an unclear answer scores 0 and is counted as unparsed."""
    reading = read_letter(final_answer(prediction), letters_for(options, letters), options=options)
    if reading.letter is None:
        return Score(0.0, None, reading.reason)
    reason = OPTION_TEXT if reading.source == "option_text" else None
    return Score(float(reading.letter == gold_letter(gold)), reading.letter, reason)


def letter_or_short(prediction: str, gold: str, options: Sequence[str] | None, letters: str) -> Score:
    """RealWorldQA: letter accuracy where the gold is a letter, else equal short text."""
    if re.fullmatch(r"[A-Z]", str(gold).strip()):
        return letter_accuracy(prediction, gold, options, letters)
    answer = final_answer(prediction)
    return Score(short_match(answer, str(gold)), answer or None, None if answer else "empty answer")


def circular_accuracy(
    predictions: Sequence[str],
    golds: Sequence[Any],
    options: Sequence[str] | None,
    rotations: Sequence[Sequence[str]] | None = None,
) -> Score:
    """MMBench: 1 only if every rotation of the question is answered right.

    options: of one rotation, only their number is used. rotations: the options of each, in their order, so
    that an answer in an option's words can be read.
    """
    if len(predictions) != len(golds) or not golds or (rotations and len(rotations) != len(golds)):
        return Score(None, None, f"{len(predictions)} answers for {len(golds)} rotations of one question")
    each = rotations or [None] * len(golds)
    letters = letters_for(options)
    scores = [
        letter_accuracy(prediction, gold, own, letters)
        for prediction, gold, own in zip(predictions, golds, each, strict=True)
    ]
    unread = sum(score.parsed is None for score in scores)
    return Score(
        float(all(score.value == 1.0 for score in scores)),
        None if unread else " ".join(str(score.parsed) for score in scores),
        f"no clear letter in {unread} of {len(scores)} rotations" if unread else None,
    )


# --- MMMU: the benchmark's own parser, without its random draw ---

_OPEN_MARKERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = set(":,.!?;'")
_NUMBER_PATTERNS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_letter(response: str, options: Sequence[str]) -> str | None:
    """MMMU's letter search: "(A)", then "A ", then "A.", then option texts in longer answers; the last hit.

    The official code draws a letter where nothing is found; here that is None.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    letters = letters_for(options)
    for form, where in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        hits = [letter for letter in letters if form.format(letter) in response]
        if hits:
            return _last(hits, [response.rfind(where.format(letter)) for letter in hits])
    if len(response.split()) > 5:
        lowered = response.lower()
        texts = {letter: option.lower() for letter, option in zip(letters, options, strict=False)}
        hits = [letter for letter in letters if texts[letter] in lowered]
        if hits:
            return _last(hits, [lowered.rfind(texts[letter]) for letter in hits])
    return None


def _last(hits: list[str], positions: list[int]) -> str:
    return hits[0] if len(hits) == 1 else hits[positions.index(max(positions))]


def mmmu_open(response: str, golds: Sequence[str]) -> bool:
    """MMMU's open questions: a gold number among the numbers of the key parts (two decimals), or a gold
    text contained in a key part."""
    wanted = [key for gold in golds for key in _mmmu_keys(str(gold))]
    parts = _key_parts(response)
    numbers = [
        number for part in parts for pattern in _NUMBER_PATTERNS for number in re.findall(pattern, part)
    ]
    for found in (key for text in (*parts, *numbers) for key in _mmmu_keys(text)):
        if isinstance(found, str):
            if any(isinstance(gold, str) and gold in found for gold in wanted):
                return True
        elif found in wanted:
            return True
    return False


def _key_parts(response: str) -> list[str]:
    response = response.strip().strip(".").lower()
    # The official split at ". " wants a capital after it, but the text is lower case: only lines split.
    sentences = response.split("\n")
    parts = []
    for index, sentence in enumerate(sentences):
        markers = _OPEN_MARKERS + (("=",) if index == len(sentences) - 1 else ())
        tails = [sentence.split(marker)[-1].strip() for marker in markers if marker in sentence]
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    return parts or [response]


def _mmmu_keys(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_accuracy(
    prediction: str, gold: Any, options: Sequence[str] | None, question_type: str | None
) -> Score:
    """MMMU and open questions by its own rules; no letter counts as wrong (the official code draws one)."""
    answer = final_answer(prediction)
    golds = [gold] if isinstance(gold, str) else list(gold)
    if options and question_type != "open":
        letter = mmmu_letter(answer, options)
        return Score(float(letter in golds), letter, None if letter else f"no letter: {NO_LETTER}")
    listed = as_options(gold) if isinstance(gold, str) and gold.strip().startswith("[") else None
    return Score(
        float(mmmu_open(answer, listed or golds)), answer or None, None if answer else "empty answer"
    )


# --- We-Math ---

WEMATH_GROUPS = 525  # fixed by the official scoring; missing groups count as mastered


@dataclass(frozen=True, slots=True)
class WeMath:
    """We-Math's four outcomes (number of groups) and score in percent, strict and loose."""

    inadequate_generalization: int
    insufficient_knowledge: int
    mastery_strict: int
    mastery_loose: int
    rote_strict: int
    rote_loose: int
    score_strict: float
    score_loose: float
    groups: int


def wemath_four_dimensional(rows: Sequence[Mapping[str, Any]]) -> WeMath:
    """Group the questions of We-Math and apply its four-dimensional score over 525 groups.

    Strict mastery needs every step and the multi-step question; loose needs one step and the
    multi-step question. score = (525 - IG/2 - rote - insufficient) / 525.

    Args:
        rows: one per question: `ID` of the group, `key` ("2steps_1", ..., "3steps_multi"), `correct`.

    Raises:
        ValueError: a group without its multi-step question or without steps. The score itself means
            nothing on a subset, because absent groups count as mastered: compare `groups` with 525.
    """
    groups: dict[Any, dict[str, bool]] = {}
    for row in rows:
        groups.setdefault(row["ID"], {})[str(row["key"])] = bool(row["correct"])
    counts = dict.fromkeys(("ig", "ik", "ms", "ml", "rs", "rl"), 0)
    for name, answers in groups.items():
        multi = [right for key, right in answers.items() if key.endswith("_multi")]
        steps = [right for key, right in answers.items() if not key.endswith("_multi")]
        if len(multi) != 1 or not steps:
            raise ValueError(
                f"We-Math group {name!r} holds {sorted(answers)}: needs one *_multi and its steps"
            )
        if multi[0]:
            counts["ms" if all(steps) else "rs"] += 1
            counts["ml" if any(steps) else "rl"] += 1
        else:
            counts["ig" if all(steps) else "ik"] += 1
    lost = 0.5 * counts["ig"] + counts["ik"]
    return WeMath(
        counts["ig"],
        counts["ik"],
        counts["ms"],
        counts["ml"],
        counts["rs"],
        counts["rl"],
        100 * (WEMATH_GROUPS - lost - counts["rs"]) / WEMATH_GROUPS,
        100 * (WEMATH_GROUPS - lost - counts["rl"]) / WEMATH_GROUPS,
        len(groups),
    )
