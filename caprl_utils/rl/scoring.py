"""The reward as GRPOTrainer calls it: once a rollout, with captions that may fail, and a limit to how many."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from accelerate.utils import gather_object

from caprl_utils.errors import UserError
from caprl_utils.models.base import open_backend
from caprl_utils.records import Question
from caprl_utils.rl.judges import unified_rewards, vlm_rewards
from caprl_utils.rl.readers import Reader, open_reader
from caprl_utils.rl.rewards import CaptionTask, RewardBatch, length_term, qa_rewards, repeated_share
from caprl_utils.schema import RL, Experiment, Length, Profile

Rows = Mapping[str, Sequence[Any]]  # column name -> one value per caption
Score = Callable[[Sequence[str], Rows, int], RewardBatch]  # of (captions, rows, step)


class RewardsFailedError(UserError):
    """More rewards failed than rl.max_failed_share allows."""


class CaptionReward:
    """The reward of an experiment. Stops training when too many captions could not be scored."""

    def __init__(self, name: str, score: Score, rl: RL, length: Length | None):
        """name: after which TRL names its metrics."""
        self.__name__ = name
        self.score, self.rl, self.length = score, rl, length
        self._pool = ThreadPoolExecutor(1, "caprl-reward")
        self._begun: tuple[list[str], int, Future] | None = None  # captions, step, their batch

    def begin(self, completions: Sequence[Any], rows: Rows, step: int) -> None:
        """Start to score a rollout; the call that follows waits for what is left of it."""
        captions = _texts(completions)
        self._begun = (captions, step, self._pool.submit(self._scored, captions, rows, step))

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], trainer_state: Any,
        log_extra: Any, log_metric: Any, **columns: Any,
    ) -> list[float | None]:  # fmt: skip
        """As TRL calls it; `columns` are the data set's. Raises RewardsFailedError."""
        captions, step = _texts(completions), trainer_state.global_step
        begun, self._begun = self._begun, None
        ahead = begun is not None and begun[:2] == (captions, step)
        batch, reason = begun[2].result() if ahead else self._scored(captions, columns, step)
        self._check(batch, reason)
        lengths = [len(ids) for ids in completion_ids]
        if self.length is not None:
            terms = [length_term(n, self.length, self.rl.max_completion_tokens) for n in lengths]
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
        found = gather_object([(sum(r is None for r in batch.rewards), len(batch.rewards), reason)])
        failed, total = (sum(part[i] for part in found) for i in (0, 1))
        if failed > self.rl.max_failed_share * total:
            reasons = sorted({reason for _, _, reason in found if reason})
            hint = "is the reader's or judge's server up, and are the captions within its context?"
            raise RewardsFailedError(
                f"{failed} of {total} captions could not be scored (rl.max_failed_share is "
                f"{self.rl.max_failed_share}): {'; '.join(reasons) or hint}. Nothing was learned from them; run again "
                "to go on from the last checkpoint."
            )


def _texts(completions: Sequence[Any]) -> list[str]:
    return [completion[0]["content"] for completion in completions]


def qa_score(captions: Sequence[str], rows: Rows, step: int, reader: Reader, settings: RL, seed: int) -> RewardBatch:
    """See `qa_rewards`; draws derive from the training's seed, the step, the image and the caption's number."""
    seen: Counter[str] = Counter()
    tasks = []
    for caption, name, questions in zip(captions, rows["id"], rows["questions"], strict=True):
        key = (seed, step, name, seen[name])
        tasks.append(CaptionTask(caption, [Question(**question) for question in questions], key))
        seen[name] += 1
    return qa_rewards(tasks, reader, settings)


def open_reward(profile: Profile, experiment: Experiment, seed: int) -> CaptionReward:
    """The reward that the experiment asks for, with its reader or judge (paper, Figure 1c)."""
    kind, model = experiment.reward.judge, profile.models[experiment.reward.role]
    if kind == "qa":
        score = partial(qa_score, reader=open_reader(model, profile), settings=profile.rl, seed=seed)
    else:
        judge, rate = open_backend(model, profile), vlm_rewards if kind == "vlm" else unified_rewards

        def score(captions: Sequence[str], rows: Rows, step: int) -> RewardBatch:
            return rate(captions, rows["image"], rows["id"], judge)

    return CaptionReward(kind, score, profile.rl, experiment.reward.length)
