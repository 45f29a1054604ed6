"""The QA reward (paper, equations 1-3), pure and batched: captions in, rewards out.

How it departs from the paper and the released code, each on purpose:
1. `qa_expected` takes the expectation over the reader's sampled letter instead of one draw of it (ours).
2. The extra option carries the letter after the last option (E after four); the author code skips to F.
3. A reward that could not be computed is None and is left out of its group; the author code scores it 0.
4. Draws and shuffles are a function of (seed, step, image, caption, round), so a resumed run repeats them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from caprl_utils import prompts
from caprl_utils.answers import first_capital
from caprl_utils.hashing import derive_seed
from caprl_utils.models.base import Request
from caprl_utils.records import Question
from caprl_utils.rl.readers import Reader
from caprl_utils.schema import RL, Length

MIN_LETTER_MASS = 0.5
"""Ours: below it the option letters do not say what the reader would answer."""


@dataclass(frozen=True)
class CaptionTask:
    """One caption to score, the questions of its image, and the names its random draws derive from."""

    caption: str
    questions: Sequence[Question]
    key: tuple[str | int, ...]  # (seed, step, image id, caption index)


@dataclass(frozen=True)
class Round:
    """One question as the reader gets it."""

    request: Request
    gold: str  # the letter of the right option after shuffling
    letters: str  # all letters of this question, the extra option's last
    question: str


Scores = tuple[list[float | None], dict[str, float]]  # of each round, and what was seen on the way


@dataclass
class RewardBatch:
    """Rewards in the order of the captions (None where one could not be computed), and what was seen on the way."""

    rewards: list[float | None]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def failed_share(self) -> float:
        """Share of captions without a reward."""
        return sum(r is None for r in self.rewards) / max(1, len(self.rewards))


def qa_rewards(tasks: Sequence[CaptionTask], reader: Reader, settings: RL) -> RewardBatch:
    """Mean share of right answers of each caption over its rounds.

    qa_sampled: r(c) = 1/N sum_i [LLM(c, q_i) = a_i]            (paper, equations 1-3)
    qa_expected: r(c) = 1/N sum_i p(a_i), p = softmax(log p / T) over the letters of q_i   (ours)

    An answer without a letter is wrong and counted (`unparsed`); a caption with a round that the reader
    could not answer has reward None.
    """
    rounds = [draw_rounds(task, settings.rounds, settings.question_draw, reader.words) for task in tasks]
    score = sampled_scores if settings.reward == "qa_sampled" else expected_scores
    scores, metrics = score([r for rows in rounds for r in rows], reader, settings)
    parts = iter(scores)
    grouped = [[next(parts) for _ in rows] for rows in rounds]
    return RewardBatch([None if None in part else sum(part) / len(part) for part in grouped], metrics)


def draw_rounds(task: CaptionTask, rounds: int, draw: str, words: str = "short") -> list[Round]:
    """N questions of the image, each with its options shuffled and the extra option last. draw: "replacement" (author
    code) or "stratified" (ours): every question once before any is asked again. words: see `prompts.reward_question`.
    """
    count, rng = len(task.questions), _random(*task.key, "draw")
    if draw == "replacement":
        drawn = [rng.randrange(count) for _ in range(rounds)]
    else:
        passes = [rng.sample(range(count), count) for _ in range(math.ceil(rounds / count))]
        drawn = [index for one_pass in passes for index in one_pass][:rounds]
    return [_ask(task, task.questions[index], number, words) for number, index in enumerate(drawn)]


def _ask(task: CaptionTask, question: Question, number: int, words: str) -> Round:
    name = "/".join(map(str, (*task.key, number)))
    order = list(range(len(question.options)))
    _random(name).shuffle(order)
    options = [*(question.options[i] for i in order), prompts.CANNOT_ANSWER]
    prompt = prompts.reward_question(task.caption, question.question, options, words)
    gold = prompts.LETTERS[order.index(prompts.LETTERS.index(question.answer))]
    request = Request(name, prompt, prefill=prompts.ANSWER_PREFILL)
    return Round(request, gold, prompts.LETTERS[: len(options)], question.question)


def _random(*names: str | int) -> random.Random:
    return random.Random(derive_seed(*names, bits=64))


def sampled_scores(rounds: Sequence[Round], reader: Reader, settings: RL) -> Scores:
    """1 or 0 per round from one sampled answer; None where the reader failed."""
    texts = reader.answers([r.request for r in rounds], settings.reader_temperature)
    letters = {i: first_capital(text) for i, text in enumerate(texts) if text is not None}
    scores = [float(letters[i] == r.gold) if i in letters else None for i, r in enumerate(rounds)]
    return scores, {
        "unparsed": _average([letter is None for letter in letters.values()]),
        "cannot_answer": _average([letter == rounds[i].letters[-1] for i, letter in letters.items()]),
    }


def expected_scores(rounds: Sequence[Round], reader: Reader, settings: RL) -> Scores:
    """Probability of the right letter per round at the reader's temperature; None where the reader failed. A round
    whose letters hold less than MIN_LETTER_MASS of the probability is sampled instead (`fallback`): there the letters
    do not say what the reader would answer.
    """
    widest = max((r.letters for r in rounds), key=len)
    logprobs = reader.letter_logprobs([r.request for r in rounds], widest)
    known = {i: row[: len(rounds[i].letters)] for i, row in enumerate(logprobs) if row is not None}
    masses = {i: sum(map(math.exp, row)) for i, row in known.items()}
    low = [i for i, mass in masses.items() if mass < MIN_LETTER_MASS]
    chances = {i: _softmax(known[i], settings.reader_temperature) for i in known if masses[i] >= MIN_LETTER_MASS}
    scores = {i: row[rounds[i].letters.index(rounds[i].gold)] for i, row in chances.items()}
    metrics = {
        "letter_mass": _average(masses.values()),
        "fallback": len(low) / len(rounds),
        "cannot_answer": _average([row[-1] for row in chances.values()]),
    }
    if low:
        drawn, more = sampled_scores([rounds[i] for i in low], reader, settings)
        scores |= zip(low, drawn, strict=True)
        metrics["unparsed"] = more["unparsed"] * len(low) / len(rounds)
    return [scores.get(i) for i in range(len(rounds))], metrics


def _softmax(logprobs: Sequence[float], temperature: float) -> list[float]:
    top = max(logprobs)
    weights = [math.exp((value - top) / temperature) for value in logprobs]
    total = sum(weights)
    return [weight / total for weight in weights]


def _average(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def length_term(num_tokens: int, length: Length, limit: int) -> float:
    """`weight` up to `full_share` of `limit` tokens, 0 from `zero_share` on, linear between (CapRL++, 2606.09393)."""
    full, zero = length.full_share * limit, length.zero_share * limit
    return length.weight * min(1.0, max(0.0, (zero - num_tokens) / max(1.0, zero - full)))


def repeated_share(text: str) -> float:
    """Share of the text's runs of four words that occurred before in it; 0 for a short text."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
