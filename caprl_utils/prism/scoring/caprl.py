"""Mode `caprl`: the verdict of the authors' Prism scorer, quirk by quirk.

Where this departs from the released script, on purpose:

1. The branch follows the benchmark key, never the path of the data file (Q25).
2. A gold that reads as a list is parsed as a literal, never evaluated as code. Equal on every literal
   list; a gold like "list(range(3))" or "exit()" stays text here (Q16).
3. An empty list of alternatives, on which the script stops, leaves the symbolic score alone.
4. Items of a gold list that are not text are compared as text by the similarity too (the script stops).
5. math-verify's limit of 5 s counts CPU time, not the clock, so that a busy machine changes no verdict.

Everything else is kept, the surprising parts included: tolerance relative to the prediction (Q1),
scale search (Q2), golds that cannot be parsed score 1 (Q7), swapped arguments of verify (Q22).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from caprl_utils.prism.scoring import symbolic
from caprl_utils.prism.scoring.text import ANLS_THRESHOLD, anls_distance, literal_list, relaxed_match
from caprl_utils.prism.scoring.types import Score

Branch = Literal["chart", "info", "symbolic"]

SCALES = (1, 0.01, 100)  # Q2
_ANSWER_START = re.compile(r"</think>\s*<answer>")
_BOX = "\\boxed{"
_ANSWER_END = "</answer>"

GOLD_UNPARSED = "the gold cannot be parsed, which scores 1 for every answer (Q7)"
NO_ANSWER = "no answer: the layout </think><answer>...\\boxed{...}...</answer> was not found"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the symbolic part gives: its score, the answer's normalised text, whether the gold parsed."""

    symbolic: float
    answer_text: str
    gold_parsed: bool


def extract(completion: str) -> str | None:
    """The text that the authors' greedy pattern captures; None where it finds nothing.

    From the first box after the answer tag to the last closing brace that still has a closing answer
    tag behind it (Q23, Q24). Written as searches instead of a pattern, so that a completion stuck in
    a loop costs linear time.
    """
    start = _ANSWER_START.search(completion)
    if start is None:
        return None
    box = completion.find(_BOX, start.end())
    if box < 0:
        return None
    content = box + len(_BOX)
    closing_tag = completion.rfind(_ANSWER_END)
    closing_brace = completion.rfind("}", content, max(closing_tag, content))
    return completion[content:closing_brace] if closing_brace >= 0 else None


def reference_verdict(answer: str, gold: str, *, remember: bool = True) -> Verdict:
    """The symbolic score by math-verify alone.

    Args:
        answer: the extracted text, "" where nothing was extracted.
        remember: keep parsed texts for the next call; changes the time, never the verdict.
    """
    parse = symbolic.parse_math_once if remember else symbolic.parse_math
    gold_parsed = parse(f"${gold}$")
    parsed = parse(f"${answer}$")
    answer_text = str(parsed[-1]) if parsed else ""
    if not gold_parsed:
        return Verdict(1.0, answer_text, False)
    try:
        hit = symbolic.verify_math(answer, gold_parsed) or symbolic.verify_math(parsed, gold_parsed)
    except Exception:  # the authors' scorer turns every error of the comparison into 0
        hit = False
    return Verdict(float(hit), answer_text, True)


def chart_score(answer_text: str, gold: str, *, similarity: bool) -> float:
    """Relaxed accuracy over scales and alternatives; with `similarity` (InfoVQA) the larger of it and ANLS.

    Args:
        answer_text: the normalised text of the answer's parse, "" if there is none.
    """
    listed = literal_list(gold)
    alternatives = [gold] if listed is None else [str(item) for item in listed]
    if not alternatives:
        return 0.0
    try:
        number = float(answer_text)
        candidates = [str(scale * number) for scale in SCALES]
    except ValueError:
        candidates = [answer_text]
    # Q1: the gold is the candidate here and the answer the reference.
    relaxed = max(float(relaxed_match(text.strip(), item)) for text in candidates for item in alternatives)
    if not similarity:
        return relaxed
    best = 1 - min(anls_distance(item, answer_text) for item in alternatives)
    return max(relaxed, 0.0 if best < ANLS_THRESHOLD else best)


def combine(answer: str | None, gold: Any, branch: Branch, verdict: Verdict) -> Score:
    """The sample's score from its symbolic verdict and, in the chart and info branches, the chart score."""
    value = verdict.symbolic
    if branch != "symbolic" and value < 1.0:
        value = max(value, chart_score(verdict.answer_text, str(gold), similarity=branch == "info"))
    if not verdict.gold_parsed:
        return Score(value, answer, GOLD_UNPARSED)
    return Score(value, answer, NO_ANSWER if answer is None else None)
