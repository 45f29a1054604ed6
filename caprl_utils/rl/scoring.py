"""The reward as GRPOTrainer calls it: one call with all captions of a rollout."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.models import Backend, open_backend
from caprl_utils.rl.data import parse_questions
from caprl_utils.rl.judges import unified_rewards, vlm_rewards
from caprl_utils.rl.reader import Reader, open_reader
from caprl_utils.rl.rewards import CaptionTask, QASettings, RewardBatch, qa_rewards
from caprl_utils.rl.trainer import RewardsFailedError
from caprl_utils.schema import RL, Experiment, Length, Profile

_GRAM = 4
Rows = Mapping[str, Sequence[Any]]  # column name -> one value per caption


def qa_settings(rl: RL, experiment: Experiment) -> QASettings:
    """The QA reward's settings of a run."""
    mass = experiment.reward.min_letter_mass
    return QASettings(rl.reward, rl.rounds, rl.question_draw, rl.reader_temperature, mass)


def length_term(num_tokens: int, length: Length, limit: int) -> float:
    """`weight` up to `full_share` of `limit` tokens, 0 from `zero_share` on, linear between (CapRL++, arXiv
    2606.09393).
    """
    full, zero = length.full_share * limit, length.zero_share * limit
    return length.weight * min(1.0, max(0.0, (zero - num_tokens) / max(1.0, zero - full)))


def repeated_share(text: str) -> float:
    """Share of the text's runs of four words that occurred before in it; 0 for a short text."""
    words = text.split()
    grams = [tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _texts(completions: Sequence[Any]) -> list[str]:
    return [completion[0]["content"] for completion in completions]


_questions = lru_cache(maxsize=4096)(parse_questions)


class CaptionReward:
    """Scores a rollout's captions, and stops training when too many could not be scored."""

    def __init__(self, rl: RL, experiment: Experiment):
        self.length, self.limit = experiment.reward.length, rl.max_completion_tokens
        self.max_failed_share = rl.max_failed_share
        self._pool = ThreadPoolExecutor(1, "caprl-reward")
        self._begun: tuple[list[str], int, Future] | None = None  # captions, step, their batch

    def score(self, captions: Sequence[str], rows: Rows, step: int) -> RewardBatch:
        """One reward per caption, None where it could not be computed."""
        raise NotImplementedError

    def begin(self, completions: Sequence[Any], rows: Rows, trainer_state: Any) -> None:
        """Start to score a rollout; the call that follows waits for what is left of it."""
        captions, step = _texts(completions), trainer_state.global_step
        self._begun = (captions, step, self._pool.submit(self._scored, captions, rows, step))

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        trainer_state: Any,
        log_extra: Any,
        log_metric: Any,
        **columns: Any,
    ) -> list[float | None]:
        """As TRL calls it; `columns` are the data set's. Raises RewardsFailedError."""
        captions, step = _texts(completions), trainer_state.global_step
        begun, self._begun = self._begun, None
        ahead = begun is not None and begun[:2] == (captions, step)
        batch, reason = begun[2].result() if ahead else self._scored(captions, columns, step)
        self._check(batch, reason)
        lengths = [len(ids) for ids in completion_ids]
        if self.length is not None:
            terms = [length_term(n, self.length, self.limit) for n in lengths]
            batch.rewards = [None if r is None else r + t for r, t in zip(batch.rewards, terms, strict=True)]
        log_extra("image_id", list(columns["id"]))
        log_extra("num_tokens", lengths)
        log_metric("failed_share", batch.failed_share)
        log_metric("repetition", sum(map(repeated_share, captions)) / len(captions))
        for name, value in batch.metrics.items():
            if not math.isnan(value):
                log_metric(name, value)
        return batch.rewards

    def _scored(self, captions: Sequence[str], rows: Rows, step: int) -> tuple[RewardBatch, str]:
        """The batch, and why it failed as a whole: a process whose servers are gone must not leave the others alone."""
        try:
            return self.score(captions, rows, step), ""
        except UserError as error:
            return RewardBatch([None] * len(captions)), str(error)

    def _check(self, batch: RewardBatch, reason: str) -> None:
        """Raise RewardsFailedError in every process when too many rewards of all processes together failed."""
        from accelerate.utils import gather_object

        found = gather_object([(sum(r is None for r in batch.rewards), len(batch.rewards), reason)])
        failed, total = sum(f[0] for f in found), sum(f[1] for f in found)
        if failed > self.max_failed_share * total:
            reasons = sorted({reason for _, _, reason in found if reason})
            hint = "is the reader's or judge's server up, and are the captions within its context?"
            raise RewardsFailedError(
                f"{failed} of {total} captions could not be scored (rl.max_failed_share is "
                f"{self.max_failed_share}): {'; '.join(reasons) or hint}"
            )


class QAReward(CaptionReward):
    """The QA reward (paper, equations 1-3)."""

    __name__ = "qa"  # TRL names its metrics after it

    def __init__(self, reader: Reader, rl: RL, experiment: Experiment, seed: int):
        super().__init__(rl, experiment)
        self.reader, self.settings, self.seed = reader, qa_settings(rl, experiment), seed

    def score(self, captions: Sequence[str], rows: Rows, step: int) -> RewardBatch:
        """See `qa_rewards`; draws derive from the run's seed, the step, the image and the caption's
        number.
        """
        seen: Counter[str] = Counter()
        tasks = []
        for caption, name, text in zip(captions, rows["id"], rows["questions"], strict=True):
            tasks.append(CaptionTask(caption, _questions(text), (self.seed, step, name, seen[name])))
            seen[name] += 1
        return qa_rewards(tasks, self.reader, self.settings)


class JudgeReward(CaptionReward):
    """A judge's score (paper, Figure 1c)."""

    __name__ = "judge"

    def __init__(self, judge: Backend, rl: RL, experiment: Experiment):
        super().__init__(rl, experiment)
        self.judge = judge
        self.rate = vlm_rewards if experiment.reward.judge == "vlm" else unified_rewards

    def score(self, captions: Sequence[str], rows: Rows, step: int) -> RewardBatch:
        """See `judges`."""
        return self.rate(captions, rows["image"], rows["id"], self.judge)


def open_reward(profile: Profile, experiment: Experiment, seed: int) -> CaptionReward:
    """The reward that the experiment asks for, with its reader or judge."""
    model = profile.models[experiment.reward.role]
    if experiment.reward.judge == "qa":
        return QAReward(open_reader(model, profile), profile.rl, experiment, seed)
    return JudgeReward(open_backend(model, profile), profile.rl, experiment)
