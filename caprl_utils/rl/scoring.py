"""The reward as GRPOTrainer calls it: one call with all captions of a rollout."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from caprl_utils.rl.data import parse_questions
from caprl_utils.rl.experiment import Experiment, Length
from caprl_utils.rl.reader import Reader
from caprl_utils.rl.rewards import CaptionTask, QASettings, RewardBatch, qa_rewards
from caprl_utils.rl.trainer import RewardsFailedError
from caprl_utils.schema import RL

_GRAM = 4


def qa_settings(rl: RL, experiment: Experiment) -> QASettings:
    """The QA reward's settings of a run."""
    mass = experiment.reward.min_letter_mass
    return QASettings(rl.reward, rl.rounds, rl.question_draw, rl.reader_temperature, mass)


def length_term(num_tokens: int, length: Length) -> float:
    """`weight` up to `full_tokens`, 0 from `zero_tokens` on, linear between (CapRL++, arXiv 2606.09393)."""
    span = max(1, length.zero_tokens - length.full_tokens)
    return length.weight * min(1.0, max(0.0, (length.zero_tokens - num_tokens) / span))


def repeated_share(text: str) -> float:
    """Share of the text's runs of four words that occurred before in it; 0 for a short text."""
    words = text.split()
    grams = [tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_questions = lru_cache(maxsize=4096)(parse_questions)


class QAReward:
    """Scores a rollout's captions with the QA reward, and stops training when too many could not be
    scored.
    """

    __name__ = "qa"  # TRL names its metrics after it

    def __init__(self, reader: Reader, rl: RL, experiment: Experiment, seed: int):
        self.reader, self.settings, self.seed = reader, qa_settings(rl, experiment), seed
        self.length = experiment.reward.length
        self.max_failed_share = rl.max_failed_share

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        id: Sequence[str],
        questions: Sequence[str],
        trainer_state: Any,
        log_extra: Any,
        log_metric: Any,
        **unused: Any,
    ) -> list[float | None]:
        """One reward per completion; None where it could not be computed. Raises RewardsFailedError."""
        captions = [completion[0]["content"] for completion in completions]
        batch = self.score(captions, id, questions, trainer_state.global_step)
        self._check(batch)
        lengths = [len(ids) for ids in completion_ids]
        if self.length is not None:
            terms = [length_term(n, self.length) for n in lengths]
            batch.rewards = [None if r is None else r + t for r, t in zip(batch.rewards, terms, strict=True)]
        log_extra("image_id", list(id))
        log_extra("num_tokens", lengths)
        log_metric("failed_share", batch.failed_share)
        log_metric("repetition", sum(map(repeated_share, captions)) / len(captions))
        for name, value in batch.metrics.items():
            if not math.isnan(value):
                log_metric(name, value)
        return batch.rewards

    def score(
        self, captions: Sequence[str], ids: Sequence[str], questions: Sequence[str], step: int
    ) -> RewardBatch:
        """QA rewards of captions of the images `ids`; `questions` is the data set's column of that name."""
        seen: Counter[str] = Counter()
        tasks = []
        for caption, name, text in zip(captions, ids, questions, strict=True):
            tasks.append(CaptionTask(caption, _questions(text), (self.seed, step, name, seen[name])))
            seen[name] += 1
        return qa_rewards(tasks, self.reader, self.settings)

    def _check(self, batch: RewardBatch) -> None:
        from accelerate.utils import gather_object

        counts = gather_object([sum(r is None for r in batch.rewards), len(batch.rewards)])
        failed, total = sum(counts[0::2]), sum(counts[1::2])
        if failed > self.max_failed_share * total:
            raise RewardsFailedError(
                f"{failed} of {total} captions could not be scored by the reader (rl.max_failed_share is "
                f"{self.max_failed_share}); is its server up, and are the captions within its context?"
            )
