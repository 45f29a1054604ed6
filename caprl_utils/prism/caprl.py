"""Scoring "caprl": the verdict of the authors' Prism scorer, quirk by quirk, with math-verify 0.8.0.

Where this departs from the released script, on purpose: the branch follows the benchmark's key, never the path of its
file (Q25); a gold that reads as a list is a literal, never run as code (Q16); where the script stops (no alternatives,
or such as are no text) this scores; the limit of 5 s counts CPU time, so that a busy machine changes no verdict. Kept:
tolerance relative to the prediction (Q1), scale search (Q2), golds that cannot be parsed score 1 (Q7), swapped
arguments of verify (Q22), math-verify's version (12% against 12 changes in 0.9.0). Main thread only: signals (Q26).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from caprl_utils.prism.metrics import ANLS_THRESHOLD, Score, anls_distance, as_list, relaxed_match

Branch = Literal["chart", "info", "symbolic"]

SCALES = (1, 0.01, 100)  # Q2
LIMIT_SEC = 5.0  # math-verify's default, per parse and per comparison
MATH_VERIFY_VERSION = "0.8.0"  # the last release before the paper (July 2025)
_START = re.compile(r"</think>\s*<answer>")
_BOX = "\\boxed{"

GOLD_UNPARSED = "the gold cannot be parsed, which scores 1 for every answer (Q7)"
NO_ANSWER = "no answer: the layout </think><answer>...\\boxed{...}...</answer> was not found"


def score(completion: str, gold: Any, branch: Branch) -> Score:
    """The authors' score of a reader's complete text."""
    answer = extract(completion)
    value, answer_text, gold_parsed = symbolic_verdict(answer or "", str(gold))
    if branch != "symbolic" and value < 1.0:
        value = max(value, chart_score(answer_text, str(gold), similarity=branch == "info"))
    if not gold_parsed:
        return Score(value, answer, GOLD_UNPARSED)
    return Score(value, answer, NO_ANSWER if answer is None else None)


def extract(completion: str) -> str | None:
    """What the authors' greedy pattern captures, from the first box after the answer tag to the last closing brace with
    a closing answer tag behind it (Q23, Q24), None where it finds nothing; in linear time, also of a loop.
    """
    start = _START.search(completion)
    box = completion.find(_BOX, start.end()) if start else -1
    if box < 0:
        return None
    content = box + len(_BOX)
    closing_brace = completion.rfind("}", content, max(completion.rfind("</answer>"), content))
    return completion[content:closing_brace] if closing_brace >= 0 else None


@lru_cache(maxsize=100_000)
def symbolic_verdict(answer: str, gold: str) -> tuple[float, str, bool]:
    """By math-verify: an extracted answer's symbolic score, its normalised text, and whether the gold parsed."""
    gold_parsed, parsed = list(_parse(f"${gold}$")), list(_parse(f"${answer}$"))
    answer_text = str(parsed[-1]) if parsed else ""
    if not gold_parsed:
        return 1.0, answer_text, False
    try:
        hit = _verify(answer, gold_parsed) or _verify(parsed, gold_parsed)
    except Exception:  # the authors' scorer turns every error of the comparison into 0
        hit = False
    return float(hit), answer_text, True


def chart_score(answer_text: str, gold: str, *, similarity: bool) -> float:
    """Relaxed accuracy over scales and alternatives; with `similarity` (InfoVQA) the larger of it and ANLS."""
    listed = as_list(gold)
    alternatives = [gold] if listed is None else listed
    if not alternatives:
        return 0.0
    try:
        candidates = [str(scale * float(answer_text)) for scale in SCALES]
    except ValueError:
        candidates = [answer_text]
    # Q1: the gold is the candidate here and the answer the reference.
    relaxed = max(float(relaxed_match(text.strip(), item)) for text in candidates for item in alternatives)
    if not similarity:
        return relaxed
    best = 1 - min(anls_distance(item, answer_text) for item in alternatives)
    return max(relaxed, 0.0 if best < ANLS_THRESHOLD else best)


# --- the calls to math-verify as the authors' scorer makes them, but for the clock of their time limit ---


@lru_cache(maxsize=4096)  # one gold is compared with the answers from several captions
def _parse(text: str) -> tuple[Any, ...]:
    """First LaTeX match of `text`: [expression, normalised text], [normalised text] or []."""
    from math_verify import LatexExtractionConfig, parse

    how = {"extraction_mode": "first_match", "parsing_timeout": None}
    return tuple(_limited(lambda: parse(text, [LatexExtractionConfig()], **how), []))


def _verify(answer: Any, gold: list[Any]) -> bool:
    """math-verify's comparison with the answer in first place, as the authors call it (Q22)."""
    from math_verify import verify

    return _limited(lambda: verify(answer, gold, timeout_seconds=None), False)


def _limited(work: Callable[[], Any], otherwise: Any) -> Any:
    """work(), under math-verify's limit of 5 s on CPU time instead of the clock: a gold whose parse is stopped scores 1
    for every answer (Q7). The exception is math-verify's own, handled where its alarm would be, or just after, here.
    """
    from math_verify import grader, parser
    from math_verify.errors import TimeoutException

    grader.TIMEOUT_WARNING_SHOWN = parser.TIMEOUT_WARNING_SHOWN = True  # of the clock's limit being off

    def stop(*_: Any) -> None:
        raise TimeoutException("Operation timed out!")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_SEC)
    try:
        return work()
    except TimeoutException:
        return otherwise
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
