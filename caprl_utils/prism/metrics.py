"""Verdicts on one answer: the benchmarks' own metrics (`METRICS`), and that of the authors' scorer (`by_authors`).

Sources: ChartQA (arXiv 2203.10244, section 5.1), ChartQAPro's published evaluation script, the ANLS definition of the
DocVQA challenge, the official code of MMMU, MATH-Vision and MathVista, each as lmms-eval and VLMEvalKit compute it.
"""

from __future__ import annotations

import ast
import math
import re
import signal
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import zip_longest
from string import ascii_uppercase
from typing import Any, Literal

from rapidfuzz.distance import Levenshtein

from caprl_utils.answers import ABCD, Letter, final_answer, read_letter, short_answer, unframed, unwrap_commands
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.records import Sample

Metric = Callable[[Sample, str], "Score"]


@dataclass(frozen=True, slots=True)
class Score:
    """One verdict. value: 0 to 1; None when the sample could not be scored (no judge). parsed: the answer that was
    compared; None when the text has none (it scores 0). reason: why there is no value or answer, or by which detour.
    """

    value: float | None
    parsed: str | None
    reason: str | None = None


def as_list(value: Any) -> list[str] | None:
    """The items of a list, or of one that a text writes out (a literal, never code, Q16), as texts; else None."""
    kinds = list if isinstance(value, str) else (list, tuple)
    value = _literal(value) if isinstance(value, str) else value
    return [str(item) for item in value] if isinstance(value, kinds) else None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _scored(value: float, answer: str) -> Score:
    return Score(value, answer or None, None if answer.strip() else "empty answer")


SHORT = {"relaxed_accuracy", "relaxed_accuracy_pro", "anls", "exact_match", "letter_or_exact_match"}


def prediction(sample: Sample, text: str) -> str:
    """What the metric gets of an answer as it was generated; the metrics themselves are the peers' (ours). Where a word
    or a number is asked for: the answer out of its sentence, without its full stop. For MMMU's own search, which reads
    several sentences: the letter that is clearly stated, what follows "the answer is", or one sentence so.
    """
    metric = get_benchmark(sample.benchmark).metric
    if metric != "mmmu_accuracy":
        return short_answer(text) if metric in SHORT else text
    options, said = sample.options, unframed(final_answer(text))
    if options and (letter := read_letter(text, letters_for(options), options).letter):
        return Letter(letter)
    return said if re.search(r"\. |\n", said) else short_answer(said)


def _text(metric: Callable[[str, Any], float]) -> Metric:
    """A metric on final answer and gold. A plain short answer keeps its outer spaces: ANLS counts them (toolkits)."""

    def run(sample: Sample, text: str) -> Score:
        answer = final_answer(text)
        answer = text if text.strip() == answer else answer
        return _scored(metric(answer, _unwrapped(sample.gold)), answer)

    return run


def _unwrapped(gold: Any) -> Any:
    r"""A gold without `\text{...}` and its like, which the answer has lost too."""
    if isinstance(gold, (list, tuple)):
        return [_unwrapped(item) for item in gold]
    return unwrap_commands(gold) if isinstance(gold, str) else gold


RELATIVE_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5


def relaxed_match(reference: str, candidate: str) -> bool:
    """ChartQA's test: |candidate - reference| / |reference| <= 0.05 in plain floating point (1.05 misses 1), a trailing
    percent sign divides by 100; else, and for a zero reference, equal text without case.
    """
    read = [(text, _float(text.rstrip("%"))) for text in (candidate, reference)]
    number, base = (value / 100.0 if value is not None and text.endswith("%") else value for text, value in read)
    if number is not None and base:
        return abs(number - base) / abs(base) <= RELATIVE_TOLERANCE
    return candidate.lower() == reference.lower()


def relaxed_accuracy(prediction: str, gold: Any) -> float:
    """ChartQA. A gold that is a list is a set of alternatives; bracketed text stays text (VLMEvalKit reads it)."""
    golds = gold if isinstance(gold, (list, tuple)) else [gold]
    return float(any(relaxed_match(str(item), prediction) for item in golds))


def anls_distance(gold: str, prediction: str) -> float:
    """Edit distance of lower-cased, space-collapsed texts over the longer length in upper case (as the toolkits)."""
    distance = Levenshtein.distance(" ".join(gold.lower().split()), " ".join(prediction.lower().split()))
    return distance / max(len(gold.upper()), len(prediction.upper()), 1)


def anls(prediction: str, gold: Any) -> float:
    """Best similarity over the accepted answers (a text is one, that of a list is the list); below 0.5 it is 0. Exactly
    0.5 is kept, as in both toolkits; the original definition drops it.
    """
    golds = as_list(gold) or [str(gold)]
    similarity = 1 - min(anls_distance(item, prediction) for item in golds)
    return 0.0 if similarity < ANLS_THRESHOLD else similarity


def exact_match(prediction: str, gold: Any) -> float:
    """GQA: equal without case and punctuation (lmms-eval; VLMEvalKit keeps punctuation)."""
    table = str.maketrans("", "", string.punctuation)
    return float(prediction.strip().lower().translate(table) == str(gold).lower().translate(table))


def relaxed_accuracy_pro(sample: Sample, text: str) -> Score:
    """ChartQAPro: items by position, mean over them; missing and extra items score 0.

    Follows the official script and VLMEvalKit: the exact-match switch for Multi Choice and Fact Checking, which they
    compute and never use, is not applied (lmms-eval applies it). The gold of a conversation is that of its last turn.
    meta.year: "YES"/"NO" flags; one serves all items, a conversation counts its last only.
    """
    answer, gold, year = final_answer(text), _unwrapped(sample.gold), sample.meta.get("year")
    target = str(gold[-1] if isinstance(gold, (list, tuple)) else gold)
    target, said = (text.strip().strip(".").strip("\n") for text in (target, answer))
    if inner := re.match(r"^\[(.*)\]$", target.strip()):  # "[Yes, No]" becomes "['Yes', 'No']", which reads as a list
        repaired = "[" + re.sub(r"(?<!['\w])(\w[^,]*?)(?!['\w])", r"'\1'", inner[1]) + "]"
        target = repaired if _literal(repaired) is not None else target
    wanted, given = ([item.strip(" '") for item in as_list(text) or ()] or [text] for text in (target, said))
    flags = [str(flag).upper() == "YES" for flag in ([year] if isinstance(year, str) else year or [])]
    if sample.meta.get("question_type") == "Conversational":
        flags = flags[-1:]
    if 0 < len(flags) < len(wanted):
        flags = flags * len(wanted)
    items = list(zip_longest(wanted, given))
    scores = [_pro_item(*item, year) for item, year in zip_longest(items, flags[: len(items)])]
    return _scored(sum(scores) / len(scores), answer)


def _pro_item(gold: str | None, prediction: str | None, year: bool | None) -> float:
    if gold is None or prediction is None:
        return 0.0
    if year:
        return float(gold.strip().lower() == prediction.strip().lower())
    gold, prediction = (text.strip().strip("%").strip() for text in (gold, prediction))
    base, number = _float(gold), _float(prediction)
    if base is not None and number is not None:
        return float(abs(number - base) / abs(base) <= RELATIVE_TOLERANCE if base else number == 0.0)
    distance = anls_distance(gold, prediction)
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0  # strict: exactly 0.5 scores 0


# --- letters ---


def letters_for(options: Sequence[str] | None, default: str = ABCD) -> str:
    """The letters that exist: as many as there are options, or `default` when the options are not known."""
    return ascii_uppercase[: len(options)] if options else default


def gold_letter(gold: Any) -> str:
    """A gold letter; a position counted from 0 (AI2D) becomes its letter."""
    text = str(gold).strip()
    if text.isdigit() and int(text) < len(ascii_uppercase):
        return ascii_uppercase[int(text)]
    bare = text.strip("().")
    return bare.upper() if len(bare) == 1 else text


def letter_accuracy(sample: Sample, text: str) -> Score:
    """1 for the gold letter; an unclear answer is 0 and unparsed. `scores` makes more of We-Math's and MMBench's."""
    letters = letters_for(sample.options, get_benchmark(sample.benchmark).letters or ABCD)
    reading = read_letter(text, letters, sample.options)
    if reading.letter is None:
        return Score(0.0, None, reading.reason)
    reason = "read from the option's text, not from a letter" if reading.source == "option_text" else None
    return Score(float(reading.letter == gold_letter(sample.gold)), reading.letter, reason)


def letter_or_short(sample: Sample, text: str) -> Score:
    """RealWorldQA: letter accuracy where the gold is a letter, else equal without case and one trailing full stop."""
    if re.fullmatch(r"[A-Z]", str(sample.gold).strip()):
        return letter_accuracy(sample, text)
    answer, gold = final_answer(text), unwrap_commands(str(sample.gold))
    left, right = (item.lower().strip().removesuffix(".").strip() for item in (answer, gold))
    return _scored(float(left == right), answer)


def all_rotations(scores: Sequence[Score]) -> Score:
    """MMBench: 1 only if every rotation of the question is answered right; of one answer its own score."""
    if len(scores) == 1:
        return scores[0]
    unread = sum(score.parsed is None for score in scores)
    parsed = None if unread else " ".join(str(score.parsed) for score in scores)
    reason = f"no clear letter in {unread} of {len(scores)} rotations" if unread else None
    return Score(float(all(score.value == 1.0 for score in scores)), parsed, reason)


# --- MMMU: the benchmark's own parser, without its random draw ---

_OPEN_MARKERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER_PATTERNS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_accuracy(sample: Sample, text: str) -> Score:
    """MMMU and open questions by its own rules; no letter counts as wrong (the official code draws one)."""
    answer, gold = final_answer(text), _unwrapped(sample.gold)
    golds = as_list(gold) or [gold]
    if sample.options and sample.meta.get("question_type") != "open":
        letter = str(text) if isinstance(text, Letter) else mmmu_letter(answer, sample.options)
        unread = None if letter else "no letter: counted as wrong, not drawn at random"
        return Score(float(letter in golds), letter, unread)
    return _scored(float(mmmu_open(answer, golds)), answer)


def mmmu_letter(response: str, options: Sequence[str]) -> str | None:
    """MMMU's search: "(A)", "A ", "A.", option texts in longer answers; the last hit. None where its code draws one."""
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    letters = letters_for(options)
    for form, where in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if hits := [letter for letter in letters if form.format(letter) in response]:
            return max(hits, key=lambda letter: response.rfind(where.format(letter)))
    places = [response.lower().rfind(option.lower()) for option in options]
    return letters[places.index(max(places))] if len(response.split()) > 5 and max(places) >= 0 else None


def mmmu_open(response: str, golds: Sequence[str]) -> bool:
    """MMMU's open questions: a gold number (two decimals) among those of the key parts, or a gold text in one."""
    response, parts = response.strip().strip(".").lower(), []
    sentences = response.split("\n")  # the official split at ". " wants a capital, here is none
    for number, sentence in enumerate(sentences, 1):
        shortest = ""
        for marker in _OPEN_MARKERS + (("=",) if number == len(sentences) else ()):
            tail = sentence.split(marker)[-1].strip()
            if marker in sentence and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in set(":,.!?;'"):
            parts.append(shortest)
    parts = parts or [response]
    numbers = [hit for part in parts for pattern in _NUMBER_PATTERNS for hit in re.findall(pattern, part)]
    wanted = [key for gold in golds for key in _mmmu_keys(str(gold))]
    texts = [gold for gold in wanted if isinstance(gold, str)]
    found = [key for text in (*parts, *numbers) for key in _mmmu_keys(text)]
    return any(any(text in key for text in texts) if isinstance(key, str) else key in wanted for key in found)


def _mmmu_keys(text: str) -> list[str | float]:
    text = text.strip().lower()
    if (number := _float(text.replace(",", ""))) is not None:
        return [round(number, 2)]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


# --- mathematics ---

DECIMALS = 2  # MATH-Vision's official rounding
_SAID = re.compile(r"the (?:final |correct )?answer (?:is|should be)", re.IGNORECASE)


def mathvision_accuracy(sample: Sample, text: str) -> Score:
    """MATH-Vision: the letter or the option's text for choices, else equality rounded to two decimals. The answer is
    extracted as by its code: a number behind the last "is ", else what "the answer is" is followed by.
    """
    gold, options, letters = str(sample.gold).strip(), sample.options, letters_for(sample.options)
    if options and (letter := read_letter(text, letters, options).letter):
        return Score(float(letter == gold), letter)
    answer = final_answer(text)
    number, said = answer.split("is ")[-1].rstrip("."), _SAID.split(answer)
    if _float(number) is not None:
        answer = number
    elif len(said) > 1:
        answer = said[-1].strip().split("\n")[0].split(". ")[0].strip()
    accepted = [gold, options[letters.index(gold)]] if options and gold in letters else [gold]
    return _scored(float(any(math_equal(answer, text) for text in accepted)), answer)


def math_equal(answer: str, gold: str) -> bool:
    """Equal as cleaned text, item by item in tuples, or as numbers rounded to two decimals (LaTeX by
    latex2sympy2-extended). As in the official code, what holds a root, pi or a variable equals only the same text.
    """
    answer, gold = _clean(answer), _clean(gold)
    if not answer or not gold or answer == gold:
        return bool(answer) and answer == gold
    left, right = [answer], [gold]
    if all(len(text) > 2 and text[0] + text[-1] in ("()", "[]") and "," in text for text in (answer, gold)):
        left, right = answer[1:-1].split(","), gold[1:-1].split(",")
        if len(left) != len(right) or answer[0] != gold[0]:
            return False
    for one, other in zip(left, right, strict=True):
        values = [_value(text) for text in (one, other)]
        if one != other and (None in values or round(values[0], DECIMALS) != round(values[1], DECIMALS)):
            return False
    return True


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
    return text if text.startswith(("(", "[")) else re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


@lru_cache(maxsize=20_000)
def _value(text: str) -> float | None:
    """The number that `text` writes, None where the official code would not get one."""
    if re.fullmatch(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+|\d+/\d*[1-9]\d*)", text):
        return float(Fraction(text))
    if len(text) > 200 or not re.search(r"\d", text):
        return None
    from latex2sympy2_extended import latex2sympy
    from sympy import Rational

    try:
        expression = latex2sympy(text, convert_degrees=False).doit()
        return float(Rational(expression)) if expression.is_Float or expression.is_Rational else None
    except Exception:  # the parser raises many types; the official code takes any error as "not equal"
        return None


def mathvista_match(sample: Sample, text: str, extracted: bool = False) -> Score:
    """MathVista's comparison of an answer, in the form of the gold, with it; nothing is matched by likeness. What is no
    number or choice as it stands needs a judge to extract it, whose reply is `extracted`; without one there is no
    score. meta.precision is stored as 1.0 and used as an integer.
    """
    choices, kind = as_list(sample.meta.get("choices")), sample.meta.get("answer_type")
    answer, value = short_answer(text), None
    if sample.meta.get("question_type") == "multi_choice" and choices:
        letters = letters_for(choices)
        letter, kind = read_letter(text, letters, choices).letter, "choice"
        value = choices[letters.index(letter)] if letter else None
    elif kind in ("integer", "float"):
        number = _float(answer)  # a thousands separator is not a number
        if number is not None and math.isfinite(number):
            decimals = sample.meta.get("precision") or 0
            value = str(int(number) if kind == "integer" else round(number, int(decimals)))
    elif answer and (extracted or (kind == "list" and as_list(answer))):
        value = answer
    if value is not None:
        return Score(float(value.strip() == str(sample.gold).strip()), value)
    if extracted or not final_answer(text):
        return Score(0.0, None, f"not read as {kind}")
    why = f"no judge: a MathVista answer that is not plainly a {kind} needs one to extract it"
    return Score(None, None, why)


def _judged(sample: Sample, text: str) -> Score:
    """No score, which only a judge can give; but for MathVerse equal text needs none."""
    answer = final_answer(text)
    if answer == str(sample.gold).strip() != "" and get_benchmark(sample.benchmark).metric == "mathverse_judge":
        return Score(1.0, answer, "equal text, which needs no judge")
    return Score(None, answer or None, "no judge: this benchmark's metric is a judge's verdict")


METRICS: dict[str, Metric] = {
    "relaxed_accuracy": _text(relaxed_accuracy), "relaxed_accuracy_pro": relaxed_accuracy_pro,
    "anls": _text(anls), "exact_match": _text(exact_match),
    "letter_accuracy": letter_accuracy, "letter_or_exact_match": letter_or_short,
    "wemath_four_dimensional": letter_accuracy, "circular_accuracy": letter_accuracy,
    "mmmu_accuracy": mmmu_accuracy, "math_equality": mathvision_accuracy,
    "llm_extract_then_typed_match": mathvista_match,
    "mathverse_judge": _judged, "llm_judge": _judged, "llm_judge_graded": _judged,
}  # fmt: skip


# --- the authors' Prism scorer (scoring "caprl"), quirk by quirk, with math-verify 0.8.0 ---
# Where this departs from the released script, on purpose: the branch follows the benchmark's key, never the path of its
# file (Q25); a gold that reads as a list is a literal, never run as code (Q16); where the script stops (no
# alternatives, or such as are no text) this scores; the limit of 5 s counts CPU time, so that a busy machine changes no
# verdict. Kept: tolerance relative to the prediction (Q1), scale search (Q2), golds that cannot be parsed score 1 (Q7),
# swapped arguments of verify (Q22), math-verify's version (12% against 12 changes in 0.9.0). Main thread only: signals
# (Q26).

SCALES = (1, 0.01, 100)  # Q2
LIMIT_SEC = 5.0  # math-verify's default, per parse and per comparison
MATH_VERIFY_VERSION = "0.8.0"  # the last release before the paper (July 2025)
_START = re.compile(r"</think>\s*<answer>")
_BOX = "\\boxed{"
GOLD_UNPARSED = "the gold cannot be parsed, which scores 1 for every answer (Q7)"
NO_ANSWER = "no answer: the layout </think><answer>...\\boxed{...}...</answer> was not found"


def by_authors(completion: str, gold: Any, branch: Literal["chart", "info", "symbolic"]) -> Score:
    """The authors' score of a reader's complete text: math-verify's; for charts the larger of it and relaxed accuracy
    over scales and alternatives, for InfoVQA also of ANLS.
    """
    answer, gold = extract(completion), str(gold)
    value, answer_text, gold_parsed = _symbolic_verdict(answer or "", gold)
    listed = as_list(gold)
    golds = [gold] if listed is None else listed
    if branch != "symbolic" and value < 1.0 and golds:
        try:
            candidates = [str(scale * float(answer_text)) for scale in SCALES]
        except ValueError:
            candidates = [answer_text]
        # Q1: the gold is the candidate here and the answer the reference.
        value = float(any(relaxed_match(text.strip(), item) for text in candidates for item in golds))
        value = max(value, anls(answer_text, gold)) if branch == "info" else value
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
def _symbolic_verdict(answer: str, gold: str) -> tuple[float, str, bool]:
    """By math-verify: an extracted answer's symbolic score, its normalised text, and whether the gold parsed."""
    from math_verify import verify

    gold_parsed, parsed = list(_parse(f"${gold}$")), list(_parse(f"${answer}$"))
    answer_text = str(parsed[-1]) if parsed else ""
    if not gold_parsed:
        return 1.0, answer_text, False
    tests = (partial(verify, said, gold_parsed, timeout_seconds=None) for said in (answer, parsed))  # swapped: Q22
    try:
        hit = any(_limited(test, False) for test in tests)
    except Exception:  # the authors' scorer turns every error of the comparison into 0
        hit = False
    return float(hit), answer_text, True


@lru_cache(maxsize=4096)  # one gold is compared with the answers from several captions
def _parse(text: str) -> tuple[Any, ...]:
    """First LaTeX match of `text`: [expression, normalised text], [normalised text] or []."""
    from math_verify import LatexExtractionConfig, parse

    how = {"extraction_mode": "first_match", "parsing_timeout": None}
    return tuple(_limited(lambda: parse(text, [LatexExtractionConfig()], **how), []))


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
