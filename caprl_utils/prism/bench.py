"""Speed of scoring and of the bootstrap, for `make bench`. Wall times: say what else runs on the machine."""

from __future__ import annotations

import random
from time import perf_counter
from typing import Any

import numpy as np

from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import get_benchmark, prism_benchmarks
from caprl_utils.prism.scoring import Row, Score, batch, caprl, score_batch
from caprl_utils.prism.statistics import DRAWS, bootstrap_benchmarks, macro_average

SCORING_GOAL = 20.0  # times as fast as math-verify on every answer
BOOTSTRAP_GOAL_SEC = 5.0
CAPTIONS_PER_QUESTION = 4
NUM_MODELS = 6

_WORDS = (
    "Male Female Yes No Red Blue Green Asia Europe China India Japan Brazil Canada France Increasing "
    "Decreasing Unanswerable Apple Coffee Water Solar Wind Coal January March Urban Rural Married"
)
_PHRASES = (
    "United States|New York|South Africa|Health care|Very satisfied|Solar energy|Total sales|Middle East|"
    "Social media|Mobile phone"
)
_HARD = (
    r"\frac{1}{2}|10\sqrt{3}|60^\circ|(1,2)|x=5|3:2|5 kg|30 minutes|$30|25-34 years|Red and Blue|"
    r"St. Louis|U.S.|10:30 am|\text{red}|2\pi|Q1 2019|1.5 \times 10^3|Asia-Pacific|[12, 45]"
)


def bench_scoring(n: int = 20_000, baseline_n: int = 2_000, seed: int = 0) -> dict[str, Any]:
    """Answers per second of `score_batch` in mode caprl against math-verify called on every answer.

    The baseline is timed on a random part of the rows (it would take minutes), and every score of that
    part is compared. Nothing is remembered from earlier calls.

    Args:
        n: answers that `score_batch` gets.
        baseline_n: answers that the baseline gets; n for all.

    Raises:
        UserError: if any score differs.
    """
    rows = mixed_rows(n, seed)
    reference_score(rows[0])  # imports and warms math-verify for both
    batch.forget()
    start = perf_counter()
    ours = score_batch(rows, "caprl")
    our_sec = perf_counter() - start
    part = sorted(random.Random(seed).sample(range(n), min(n, baseline_n)))
    start = perf_counter()
    theirs = [reference_score(rows[index]) for index in part]
    base_sec = perf_counter() - start
    differing = [index for index, score in zip(part, theirs, strict=True) if ours[index] != score]
    if differing:
        row = rows[differing[0]]
        raise UserError(f"{len(differing)} of {len(part)} scores differ from math-verify, first: {row}")
    rates = n / our_sec, len(part) / base_sec
    return {
        "name": "scoring, mode caprl", "ours": rates[0], "baseline": rates[1], "ratio": rates[0] / rates[1],
        "goal": SCORING_GOAL, "unit": "answers/s", "n": n, "baseline_n": len(part),
    }  # fmt: skip


def reference_score(row: Row) -> Score:
    """One row by math-verify alone, without shortcut or memory: what the fast path must equal."""
    facts = get_benchmark(row.benchmark).caprl
    if facts is None:
        raise UserError(f"benchmark {row.benchmark!r} has no branch in the authors' scorer")
    answer = caprl.extract(row.prediction)
    verdict = caprl.reference_verdict(answer or "", str(row.gold), remember=False)
    return caprl.combine(answer, row.gold, facts.branch, verdict)


def mixed_rows(n: int, seed: int = 0) -> list[Row]:
    """`n` answers in the authors' layout: four to a question, over benchmarks of all three branches.

    Of the questions 40 % have letters, 30 % numbers, 20 % words and 10 % what needs a parser (LaTeX, units,
    ranges, sets); of the answers 55 % repeat the gold, 5 % break the layout.
    """
    generator = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < n:
        keys, make = generator.choices(
            (("mmstar seed2k mmmu wemath", _letter), ("chartqa chartqapro charxiv", _number),
             ("infovqa chartqa", _word), ("mathvision infovqa chartqapro", _hard)),
            (40, 30, 20, 10),
        )[0]  # fmt: skip
        key, gold = generator.choice(keys.split()), make(generator)
        for _ in range(min(CAPTIONS_PER_QUESTION, n - len(rows))):
            answer = gold if generator.random() < 0.55 else make(generator)
            block = f"<answer>\\boxed{{{answer}}}</answer>" if generator.random() < 0.95 else answer
            rows.append(Row(key, f"<think>From the caption.</think>\n{block}", gold))
    return rows


def _letter(generator: random.Random) -> str:
    return generator.choice("ABCDE")


def _number(generator: random.Random) -> str:
    kind = generator.random()
    if kind < 0.5:
        return str(generator.randint(0, 2500))
    if kind < 0.8:
        return f"{generator.uniform(0, 100):.{generator.randint(1, 2)}f}"
    if kind < 0.9:
        return f"{generator.randint(1, 99)}%"
    return f"{generator.randint(1_000, 90_000):,}"


def _word(generator: random.Random) -> str:
    return generator.choice(_WORDS.split() if generator.random() < 0.7 else _PHRASES.split("|"))


def _hard(generator: random.Random) -> str:
    return generator.choice(_HARD.split("|"))


def bench_bootstrap(n: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Seconds for all intervals and differences of 11 benchmarks (their real sizes) and 6 models.

    Args:
        n: bootstrap draws.
    """
    generator = np.random.default_rng(seed)
    models = [f"model {number}" for number in range(NUM_MODELS)]
    tables = {}
    for facts in prism_benchmarks():
        rows = (facts.size.rows or facts.size.about or 1000) if facts.size else 1000
        rows = min(rows, 2_000) if facts.key == "seed2k" else rows
        hits = generator.binomial(CAPTIONS_PER_QUESTION, 0.5, size=(rows, NUM_MODELS))
        tables[facts.key] = (hits / CAPTIONS_PER_QUESTION, np.arange(rows))
    start = perf_counter()
    parts = bootstrap_benchmarks(tables, models, draws=n, seed=seed)
    for table in (*parts.values(), macro_average(parts)):
        for model in models:
            table.interval(model)
            table.difference(model, models[0])
    seconds = perf_counter() - start
    return {
        "name": "bootstrap, 11 benchmarks x 6 models", "ours": seconds, "baseline": BOOTSTRAP_GOAL_SEC,
        "ratio": BOOTSTRAP_GOAL_SEC / seconds, "goal": 1.0, "unit": "s", "n": n,
    }  # fmt: skip
