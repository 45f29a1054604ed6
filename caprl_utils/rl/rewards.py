"""What a caption is rewarded for: the weighted sum of terms (`reward.terms` of an experiment), each one function.

A new reward is a function over a `Rollout`, its line in TERMS, and a YAML in configs/experiments. A term that could not
be computed is None, and so is the caption's reward: it is left out of its group (the author code scores it 0). What a
term is worth of a caption that says nothing is no failure: 0. No term looks at the known facts of rendered pictures.

The term `qa` is the QA reward (paper, equations 1-3). How it departs from paper and released code, each on purpose:
1. `qa_expected` takes the expectation over the reader's sampled letter instead of one draw of it (ours).
2. The extra option carries the letter after the last option (E after four); the author code skips to F.
3. Draws and shuffles are a function of (seed, step, image, caption, round), so a resumed run repeats them.
"""

from __future__ import annotations

import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from caprl_utils import prompts
from caprl_utils.answers import first_capital, split_sentences
from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.hashing import derive_seed
from caprl_utils.models.base import Backend, Request, Sampling, open_backend
from caprl_utils.records import Question
from caprl_utils.rl.readers import Reader, open_reader
from caprl_utils.schema import RL, ModelConfig, Profile, Reward

MIN_MASS = 0.5
"""Ours: below it the letters (or digits) that are asked about do not say what a model would answer."""
SCORES = (1, 2, 3, 4, 5)
UNIFIED_MAX_TOKENS = 512
LENGTH_SHARES = (0.5, 0.75)
"""CapRL++ (2606.09393): tau1 and tau2, 2048 and 3072 of 4096 tokens."""


@dataclass(frozen=True)
class Rollout:
    """Captions of one step with their tokens. rows: column of the data set -> one value per caption: "id", "image"
    (pixels), "questions" (of `records.Question`, as dictionaries). key: (seed of the training, step).
    """

    captions: Sequence[str]
    num_tokens: Sequence[int]
    rows: Mapping[str, Sequence[Any]]
    key: tuple[int, int] = (0, 0)


@dataclass
class RewardBatch:
    """Rewards in the order of the captions (None: not computed), what was seen on the way, requests to models."""

    rewards: list[float | None]
    metrics: dict[str, float] = field(default_factory=dict)
    calls: int = 0


def _average(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _chances(rows: Mapping[Any, Sequence[float] | None], temperature: float = 1.0) -> tuple[dict, dict]:
    """Of each row of log-probabilities that is there: how likely the choices are among themselves at a temperature,
    where they hold MIN_MASS of the probability; and their mass.
    """
    known = {key: row for key, row in rows.items() if row is not None}
    masses, chances = {key: sum(map(math.exp, row)) for key, row in known.items()}, {}
    for key, row in known.items():
        if masses[key] >= MIN_MASS:
            top = max(row)
            weights = [math.exp((value - top) / temperature) for value in row]
            total_weight = sum(weights)
            chances[key] = [weight / total_weight for weight in weights]
    return chances, masses


# The QA reward


class CaptionTask(NamedTuple):
    """One caption to score, the questions of its image, and the names its random draws derive from."""

    caption: str
    questions: Sequence[Question]
    key: tuple[str | int, ...]  # (seed, step, image id, caption index)


class Round(NamedTuple):
    """One question as the reader gets it."""

    request: Request
    gold: str  # the letter of the right option after shuffling
    letters: str  # all letters of this question, the extra option's last
    question: str


Scores = tuple[list[float | None], dict[str, float]]  # of each round, and what was seen on the way


def qa(rollout: Rollout, reader: Reader, settings: RL) -> RewardBatch:
    """Share of questions that the reader answers rightly (`qa_rewards`); draws derive from key, image and number."""
    seen, tasks = Counter(), []
    rows = zip(rollout.captions, rollout.rows["id"], rollout.rows["questions"], strict=True)
    for caption, name, questions in rows:
        asked = [Question(**question) for question in questions]
        tasks.append(CaptionTask(caption, asked, (*rollout.key, name, seen[name])))
        seen[name] += 1
    return qa_rewards(tasks, reader, settings)


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
    rewards = [None if None in part else sum(part) / len(part) for part in grouped]
    return RewardBatch(rewards, metrics, round(len(scores) * (1 + metrics.get("fallback", 0.0))))


def draw_rounds(task: CaptionTask, rounds: int, draw: str, words: str = "short") -> list[Round]:
    """N questions of the image, each with its options shuffled and the extra option last. draw: "replacement" (author
    code) or "stratified" (ours): every question once before any is asked again. words: see `prompts.reward_question`.
    """
    count, rng = len(task.questions), random.Random(derive_seed(*task.key, "draw", bits=64))
    if draw == "replacement":
        drawn = [rng.randrange(count) for _ in range(rounds)]
    else:
        drawn = [i for _ in range(math.ceil(rounds / count)) for i in rng.sample(range(count), count)][:rounds]
    found = []
    for number, index in enumerate(drawn):
        question, name = task.questions[index], "/".join(map(str, (*task.key, number)))
        order = list(range(len(question.options)))
        random.Random(derive_seed(name, bits=64)).shuffle(order)
        options = [*(question.options[i] for i in order), prompts.CANNOT_ANSWER]
        prompt = prompts.reward_question(task.caption, question.question, options, words)
        gold = prompts.LETTERS[order.index(prompts.LETTERS.index(question.answer))]
        request = Request(name, prompt, prefill=prompts.ANSWER_PREFILL)
        found.append(Round(request, gold, prompts.LETTERS[: len(options)], question.question))
    return found


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
    whose letters hold less than MIN_MASS of the probability is sampled instead (`fallback`).
    """
    widest = max((r.letters for r in rounds), key=len)
    logprobs = reader.letter_logprobs([r.request for r in rounds], widest)
    known = {i: row[: len(rounds[i].letters)] for i, row in enumerate(logprobs) if row is not None}
    chances, masses = _chances(known, settings.reader_temperature)
    low = [i for i in known if i not in chances]
    scores = {i: row[rounds[i].letters.index(rounds[i].gold)] for i, row in chances.items()}
    metrics = {
        "letter_mass": _average(masses.values()), "fallback": len(low) / len(rounds),
        "cannot_answer": _average([row[-1] for row in chances.values()]),
    }  # fmt: skip
    if low:
        drawn, more = sampled_scores([rounds[i] for i in low], reader, settings)
        scores |= zip(low, drawn, strict=True)
        metrics["unparsed"] = more["unparsed"] * len(low) / len(rounds)
    return [scores.get(i) for i in range(len(rounds))], metrics


# Judges, what the paper compares the QA reward with (Figure 1c): both rate from 1 to 5 and give (score - 1) / 4


def vlm(rollout: Rollout, judge: Backend, settings: RL) -> RewardBatch:
    """A vision-language model's expected score over the digits 1 to 5, by one forward pass (ours; the paper does not
    say how the score is read). `score_mass` is their probability; a caption with less than MIN_MASS has None.
    """
    requests = _about_images(rollout, prompts.RATE, prompts.SCORE_PREFILL)
    try:
        rows = judge.choice_logprobs(requests, [f" {score}" for score in SCORES])
    except UserError:  # " 1" is no single token: Qwen has the space as a token of its own
        spaced = [replace(request, prefill=f"{request.prefill} ") for request in requests]
        rows = judge.choice_logprobs(spaced, [str(score) for score in SCORES])
    chances, masses = _chances(dict(enumerate(rows)))
    rewards = {i: _scaled(sum(s * p for s, p in zip(SCORES, row, strict=True))) for i, row in chances.items()}
    return RewardBatch([*map(rewards.get, range(len(rows)))], {"score_mass": _average(masses.values())}, len(rows))


def unified(rollout: Rollout, judge: Backend, settings: RL) -> RewardBatch:
    """UnifiedReward's contract (its repository's point_score_image_understanding): an explanation, then a number after
    "Final Score:", here on the paper's scale. None where the judge failed or gave none (`unparsed`).
    """
    answers = judge.generate(_about_images(rollout, prompts.UNIFIED), Sampling(UNIFIED_MAX_TOKENS))
    rewards = [None if answer.text is None else final_score(answer.text) for answer in answers]
    read = [reward is None for reward, answer in zip(rewards, answers, strict=True) if answer.text is not None]
    return RewardBatch(rewards, {"unparsed": _average(read)}, len(answers))


def final_score(text: str) -> float | None:
    """The last final score of an answer, scaled to 0 to 1; None without one on the scale."""
    found = re.findall(r"Final Score:\s*\**\s*([0-9]+(?:\.[0-9]+)?)", text)
    score = float(found[-1]) if found else math.nan
    return _scaled(score) if SCORES[0] <= score <= SCORES[-1] else None


def _scaled(score: float) -> float:
    return (score - SCORES[0]) / (SCORES[-1] - SCORES[0])


def _about_images(rollout: Rollout, template: str, prefill: str = "") -> list[Request]:
    texts = [template.format(question=prompts.CAPTION, caption=caption) for caption in rollout.captions]
    rows = enumerate(zip(texts, rollout.rows["image"], rollout.rows["id"], strict=True))
    return [Request(f"{name}/{i}", text, image, prefill=prefill) for i, (text, image, name) in rows]


# Correctness: a model that looks at the image checks every sentence


def correct(rollout: Rollout, verifier: Backend, settings: RL) -> RewardBatch:
    """Mean chance that a caption's sentences, each once, are true of the image (CCCaption, 2602.21655; there queries on
    sub-captions). A sentence that was cut off is checked as well: an endless one would go unchecked. Without any: 0.
    """
    told, asked = [], {}
    for caption, image, name in zip(rollout.captions, rollout.rows["image"], rollout.rows["id"], strict=True):
        told.append([(name, sentence) for sentence in sentences_of(caption)])
        asked |= dict.fromkeys(told[-1], image)
    chances, mass = chances_true(asked, verifier)
    found = [[chances[one] for one in own] for own in told]
    rewards = [None if None in own else sum(own) / len(own) if own else 0.0 for own in found]
    return RewardBatch(rewards, {"verifier_mass": mass}, len(asked))


def sentences_of(caption: str) -> list[str]:
    """The different sentences of a caption."""
    return list(dict.fromkeys(filter(None, split_sentences(caption.strip()))))


def chances_true(asked: Mapping[tuple[str, str], Any], verifier: Backend) -> tuple[dict, float]:
    """(image id, sentence) -> the verifier's chance of "Yes" by one forward pass, None where it failed or both letters
    hold less than MIN_MASS; and their mean mass. asked: the same -> pixels.
    """
    requests = [
        Request("/".join(key), prompts.VERIFY.format(sentence=key[1]), image, prefill=prompts.ANSWER_PREFILL)
        for key, image in asked.items()
    ]
    rows = verifier.choice_logprobs(requests, [" A", " B"]) if requests else []  # yes and no
    chances, masses = _chances(dict(zip(asked, rows, strict=True)))
    return dict.fromkeys(asked) | {key: row[0] for key, row in chances.items()}, _average(masses.values())


# Against a reference caption (BalCapRL, 2605.07394, where an LLM compares atomic claims; words are ours: no model more)


class References:
    """Greedy captions of the strong captioner: each image is described once, its caption is kept."""

    def __init__(self, captioner: ModelConfig, profile: Profile):
        self._captioner, self._kept = open_backend(captioner, profile), {}

    def of(self, rollout: Rollout, max_tokens: int) -> tuple[list[str | None], int]:
        """A reference for each caption, None where the captioner failed; and how many were made for it."""
        images = dict(zip(rollout.rows["id"], rollout.rows["image"], strict=True))
        new = [Request(name, prompts.CAPTION, image) for name, image in images.items() if name not in self._kept]
        made = self._captioner.generate(new, Sampling(max_tokens)) if new else []
        self._kept |= {answer.id: answer.text for answer in made if answer.text}
        return [self._kept.get(name) for name in rollout.rows["id"]], len(new)


def precision(rollout: Rollout, references: References, settings: RL) -> RewardBatch:
    """Share of a caption's different words that its reference has (BalCapRL: of its claims that are right)."""
    return _shared_words(rollout, references, settings, 0)


def recall(rollout: Rollout, references: References, settings: RL) -> RewardBatch:
    """Share of the reference's different words that the caption has (BalCapRL: of the reference's claims)."""
    return _shared_words(rollout, references, settings, 1)


def _shared_words(rollout: Rollout, references: References, settings: RL, whole: int) -> RewardBatch:
    texts, calls = references.of(rollout, settings.max_completion_tokens)
    rewards: list[float | None] = []
    for pair in zip(rollout.captions, texts, strict=True):
        own, other = words = [{*re.findall(r"\w+", (text or "").lower())} for text in pair]
        rewards.append(len(own & other) / max(1, len(words[whole])) if other else None)
    return RewardBatch(rewards, calls=calls)


# Terms of the caption alone


def length(rollout: Rollout, model: None, settings: RL) -> RewardBatch:
    """1 up to half of the token limit, 0 from three quarters of it on, linear between (LENGTH_SHARES; CapRL++)."""
    full, zero = (share * settings.max_completion_tokens for share in LENGTH_SHARES)
    return RewardBatch([min(1.0, max(0.0, (zero - n) / max(1.0, zero - full))) for n in rollout.num_tokens])


def within_length(rollout: Rollout, model: None, settings: RL) -> RewardBatch:
    """1 up to three quarters of the token limit, else 0 (LENGTH_SHARES; BalCapRL's length-conditional mask)."""
    return RewardBatch([float(n <= LENGTH_SHARES[1] * settings.max_completion_tokens) for n in rollout.num_tokens])


def fluency(rollout: Rollout, model: None, settings: RL) -> RewardBatch:
    """1 less the share of repeated four-word runs (ours; BalCapRL asks an LLM); 0 for a caption that says nothing."""
    return RewardBatch([1 - repeated_share(c) if c.strip() else 0.0 for c in rollout.captions])


def repeated_share(text: str) -> float:
    """Share of the text's runs of four words that occurred before in it; 0 for a short text."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# Their sum


class Term(NamedTuple):
    """score(rollout, its model, section rl). role: of the profile's models, what it asks, by which prompts (they are in
    a training's key); open: how that is opened. gate: it multiplies the other terms, and its weight counts for nothing.
    """

    score: Callable[[Rollout, Any, RL], RewardBatch]
    role: str | None = None
    prompts: tuple[str, ...] = ()
    open: Callable[[ModelConfig, Profile], Any] = open_backend
    gate: bool = False


TERMS = {
    "qa": Term(qa, "reward_reader", (prompts.ANSWER_PREFILL,), open_reader),  # and the profile's words
    "vlm": Term(vlm, "vlm_judge", (prompts.RATE, prompts.SCORE_PREFILL)),
    "unified": Term(unified, "reward_judge", (prompts.UNIFIED,)),
    "correct": Term(correct, "vlm_judge", (prompts.VERIFY, prompts.ANSWER_PREFILL)),
    "precision": Term(precision, "captioner_72b", (prompts.CAPTION,), References),
    "recall": Term(recall, "captioner_72b", (prompts.CAPTION,), References),
    "fluency": Term(fluency),
    "length": Term(length),
    "within_length": Term(within_length, gate=True),
}


def roles_of(reward: Reward) -> dict[str, str]:
    """Term -> the role of the model that it asks, if one. Raises UserError for no such term, and for gates alone."""
    for name in reward.terms:
        if name not in TERMS:
            raise UserError(f"reward.terms: no term {name!r}{did_you_mean(name, TERMS)}; known: {', '.join(TERMS)}")
    if all(TERMS[name].gate for name in reward.terms):
        raise UserError(f"reward.terms: {', '.join(reward.terms)} multiplies other terms; name one beside it")
    roles = {name: reward.reader if name == "qa" else TERMS[name].role for name in reward.terms}
    return {name: role for name, role in roles.items() if role}


def open_models(reward: Reward, profile: Profile) -> dict[str, Any]:
    """Term -> its model, opened; terms that ask the same model in the same way share it."""
    asked = {name: (TERMS[name].open, role) for name, role in roles_of(reward).items()}
    opened = {(how, role): how(profile.models[role], profile) for how, role in set(asked.values())}
    return {name: opened[how] for name, how in asked.items()}


def total(reward: Reward, models: Mapping[str, Any], rollout: Rollout, settings: RL) -> RewardBatch:
    """The weighted sum of terms, each multiplied by the gates and, where the reward has them `apart`, normalised within
    its image's captions; None where a term is. models: by the terms' names. Metric "reward_calls": requests to models.
    """
    found = {name: TERMS[name].score(rollout, models.get(name), settings) for name in reward.terms}
    columns = {name: batch.rewards for name, batch in found.items()}
    for gate in [columns.pop(name) for name in reward.terms if TERMS[name].gate]:
        columns = {name: _of_each(math.prod, column, gate) for name, column in columns.items()}
    if reward.apart:
        columns = {name: within_groups(column, rollout.rows["id"]) for name, column in columns.items()}
    weights = [reward.terms[name] for name in columns]
    sums = _of_each(lambda row: sum(w * r for w, r in zip(weights, row, strict=True)), *columns.values())
    metrics = {key: value for batch in found.values() for key, value in batch.metrics.items()}
    calls = sum(batch.calls for batch in found.values())
    return RewardBatch(sums, metrics | {"reward_calls": calls})


def _of_each(combine: Callable[[Sequence[float]], float], *columns: Sequence[float | None]) -> list[float | None]:
    """One value a caption from one of each column; None where one of them is."""
    return [None if None in row else combine(row) for row in zip(*columns, strict=True)]


def within_groups(values: Sequence[float | None], groups: Sequence[str]) -> list[float | None]:
    """Values less their group's mean, over its standard deviation (n - 1): 0 where all of a group are equal, None where
    a value is (GDPO, which BalCapRL takes up: terms on other scales count alike, and a rare one is not drowned).
    """
    pairs, scales = list(zip(values, groups, strict=True)), {}
    for name in {*groups}:
        own = [value for value, group in pairs if group == name and value is not None]
        scales[name] = _average(own), (statistics.stdev(own) if len(own) > 1 else 0.0) + 1e-4  # TRL's, no zero
    return [None if v is None else (v - scales[group][0]) / scales[group][1] for v, group in pairs]
