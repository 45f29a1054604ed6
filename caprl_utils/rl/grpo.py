"""GRPO on captions: TRL's GRPOTrainer with an exact resume, an exact data order, and rewards that may be missing.

How it departs from TRL 1.16, each on purpose:
1. `_load_from_checkpoint` goes through from_pretrained and then loads strictly. TRL's own does a non-strict load of a
   file whose names differ from the model's (huggingface/transformers#43701): it loads nothing, says so in two warnings,
   and training goes on from the initial weights. The KL reference still comes from the base model.
2. The data order is a function of (seed, step) alone, over any number of passes; TRL's sampler repeats its first pass
   after a resume in a later one.
3. A checkpoint is marked whole after its last file.
4. When too many rewards fail, training stops with a checkpoint of the last finished step.
5. Captions are scored while the KL reference reads them; "seconds/reward" is what training waits for.
6. No value that decides the method is left to a default. Where TRL's would change it: loss_type is dapo,
   use_bias_correction_kl weights the KL term by the importance ratio, and vLLM rollouts drop whole captions by a
   sequence mask.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer

from caprl_utils.errors import UserError
from caprl_utils.models.base import open_backend
from caprl_utils.models.local import process_once, share_images
from caprl_utils.paths import shown
from caprl_utils.records import Question
from caprl_utils.rl.data import data_file, load_data
from caprl_utils.rl.judges import unified_rewards, vlm_rewards
from caprl_utils.rl.policy import (
    COMPLETE,
    check_training,
    load_policy,
    load_processor,
    lora_config,
    mark_complete,
)
from caprl_utils.rl.readers import Reader, open_reader
from caprl_utils.rl.rewards import CaptionTask, RewardBatch, length_term, qa_rewards, repeated_share
from caprl_utils.schema import RL, Experiment, Length, Profile

MAX_PROMPT_TOKENS = 4096  # author script: prompt, image tokens included
GPU_MICRO_BATCH = 4
"""Ours: captions of 1-2k tokens per forward and backward of a 3B model on 80 GB, with gradient checkpointing."""
Rows = Mapping[str, Sequence[Any]]  # column name -> one value per caption
Score = Callable[
    [Sequence[str], Rows, int], RewardBatch
]  # (captions, rows, step): None for what it could not score


class RewardsFailedError(UserError):
    """More rewards failed than rl.max_failed_share allows."""


def grpo_arguments(
    profile: Profile, experiment: Experiment, seed: int, output_dir: Path, num_processes: int, on_gpu: bool
) -> dict[str, Any]:
    """Keyword arguments of GRPOConfig. One optimizer step per rollout of prompts_per_step x group_size captions.

    Raises UserError when the captions of a step do not divide over the processes.
    """
    rl, training = profile.rl, experiment.training
    micro, accumulation = batch_layout(
        rl.prompts_per_step, rl.group_size, training.micro_batch_size, num_processes, on_gpu
    )
    checkpointing = on_gpu if training.gradient_checkpointing is None else training.gradient_checkpointing
    return {
        "output_dir": str(output_dir), "seed": seed, "use_cpu": not on_gpu, "bf16": on_gpu,
        # float32 master weights: bfloat16 ones do not move at a learning rate of 1e-6
        "model_init_kwargs": {"dtype": "float32", "revision": profile.models.policy.revision},
        # the method
        "num_generations": rl.group_size, "max_completion_length": rl.max_completion_tokens,
        "temperature": rl.temperature, "top_p": 1.0, "top_k": 0, "beta": rl.beta,
        "epsilon": 0.2,  # TRL's default; inert with one update per rollout
        "loss_type": rl.loss_type, "scale_rewards": rl.scale_rewards, "num_iterations": 1,
        # ours: DeepSeekMath's KL term as it stands, and cut captions learn too (author script: as the rest)
        "use_bias_correction_kl": False, "mask_truncated_completions": False, "shuffle_dataset": True,
        # the optimizer
        "max_steps": rl.steps, "learning_rate": rl.learning_rate, "warmup_steps": rl.warmup_steps,
        "lr_scheduler_type": training.lr_schedule,
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1} if training.lr_schedule == "cosine_with_min_lr" else {},
        # ours: AdamW's usual constants and GRPOTrainer's clipping; neither the paper nor the script names them
        "optim": "adamw_torch_fused", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
        "weight_decay": 0.0, "max_grad_norm": 1.0,
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": checkpointing,
        # what is kept and shown
        "save_strategy": "steps", "save_steps": rl.save_every, "save_total_limit": 2,
        "logging_steps": 1, "logging_nan_inf_filter": False, "disable_tqdm": True,
        "report_to": "none",  # ours: the monitor writes the TensorBoard files
        "log_completions": False, "log_multimodal": False,
        "use_vllm": training.rollout != "transformers", "vllm_mode": "colocate",
        "vllm_max_model_length": MAX_PROMPT_TOKENS + rl.max_completion_tokens,
        "vllm_gpu_memory_utilization": training.vllm_memory_share,
        # one ratio per caption drifts past its limit on long captions and drops them: cut single tokens instead
        "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 3.0,
    }  # fmt: skip


def batch_layout(
    prompts: int, group: int, micro: int | None, num_processes: int, on_gpu: bool
) -> tuple[int, int]:
    """(captions per forward and backward of a process, accumulation steps) of a step of `prompts` images.

    All captions of an image lie on one process: their draws are numbered there.
    """
    images, rest = divmod(prompts, num_processes)
    if rest:
        raise UserError(
            f"{prompts} images a step (rl.prompts_per_step) do not divide over {num_processes} processes; "
            "change rl.prompts_per_step or the number of processes"
        )
    share = images * group
    if micro is None:
        micro = min(GPU_MICRO_BATCH, share) if on_gpu else share
    if share % micro:
        raise UserError(
            f"training.micro_batch_size {micro} does not divide {share}, the captions a process trains a step"
        )
    return micro, share // micro


@dataclass(eq=False)
class StepSampler(Sampler):
    """Rows for every step of a training: `prompts` images, each `group` times, the whole `repeats` times.

    Passes over the data are permutations seeded by (seed, pass), put end to end, so no image is left out.
    `repeats` is TRL's number of micro-batches per rollout: it hands the rollout's rows to each of them.
    """

    num_rows: int
    steps: int
    prompts: int
    group: int
    repeats: int
    seed: int

    def images_of(self, step: int) -> list[int]:
        """Rows of the images of a step (from 0)."""
        start, stop = step * self.prompts, (step + 1) * self.prompts
        passes = range(start // self.num_rows, (stop - 1) // self.num_rows + 1)
        rows = [row for number in passes for row in self._permutation(number)]
        return rows[start - passes.start * self.num_rows :][: self.prompts]

    def _permutation(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(self.num_rows, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        for step in range(self.steps):
            rows = [row for row in self.images_of(step) for _ in range(self.group)]
            for _ in range(self.repeats):
                yield from rows

    def __len__(self) -> int:
        return self.steps * self.prompts * self.group * self.repeats


class CaptionTrainer(GRPOTrainer):
    """GRPO on captions; see the module's docstring. Use `fit`, not `train`."""

    def fit(self, checkpoint: Path | None) -> bool:
        """Train to the last step, or on from a checkpoint. False when a signal stopped it (a checkpoint is there).

        Raises RewardsFailedError when too many rewards failed, after saving the last finished step.
        """
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except RewardsFailedError as error:
            saved = self._save_last_step()
            where = f"step {self.state.global_step} is saved in {saved}; " if saved else ""
            raise RewardsFailedError(
                f"{error} Nothing was learned from them: {where}run again to go on."
            ) from error
        return self.state.global_step >= self.state.max_steps

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """All weights where each process holds a part of them (ZeRO-3), else None. Every process has to call it."""
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        return self.accelerator.get_state_dict(self.deepspeed) if is_deepspeed_zero3_enabled() else None

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        args, group = self.args, self.num_generations
        prompts, repeats = (
            args.generation_batch_size // group,
            self.num_iterations * args.steps_per_generation,
        )
        return StepSampler(len(self.train_dataset), args.max_steps, prompts, group, repeats, args.seed)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As TRL's; keeps the random state of the step's start, which a checkpoint made in mid-step needs."""
        if self._step % self.args.gradient_accumulation_steps == 0:
            self._step_start = _random_state()
        return super().training_step(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        self._columns = {name: [row[name] for row in inputs] for name in inputs[0]}
        with process_once(self.processing_class):
            return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: list) -> tuple:
        start = time.perf_counter()
        result = super()._generate(prompts)
        self._metrics["train"]["seconds/generate"].append(time.perf_counter() - start)
        completions = result[3]
        for reward in self.reward_funcs:
            reward.begin(completions, self._columns, self.state.global_step)
        return result

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        rewards = super()._calculate_rewards(*args, **kwargs)
        self._metrics["train"]["seconds/reward"].append(time.perf_counter() - start)
        return rewards

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # these have loaders of their own
            return
        model = model or self.model
        loaded, report = type(model).from_pretrained(
            resume_from_checkpoint, dtype=model.dtype, output_loading_info=True
        )
        if problems := {name: sorted(keys) for name, keys in report.items() if keys}:
            raise UserError(
                f"the checkpoint {shown(resume_from_checkpoint)} does not fit the model: {problems}. "
                "Delete it to go on from the one before, or delete the run's folder to start again."
            )
        model.load_state_dict(loaded.state_dict(), strict=True)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(self._checkpoint_folder())

    def _checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _save_last_step(self) -> str | None:
        """A checkpoint as it would have been saved at the end of the last finished step."""
        if self.state.global_step == 0:
            return None
        folder = self._checkpoint_folder()
        if not (folder / COMPLETE).is_file():
            self.model.zero_grad()
            for restore in self._step_start:
                restore()
            self._save_checkpoint(self.model, trial=None)
        return shown(folder)


def _restore_on_cpu(storage: Any, location: str) -> Any:
    """Several processes on a CPU load their checkpoints to "cpu:<process>", which torch does not know."""
    return storage if location.startswith("cpu:") else None


torch.serialization.register_package(50, lambda storage: None, _restore_on_cpu)


def _random_state() -> list[Callable[[], None]]:
    """Calls that bring back the random state of now."""
    cuda = (
        [partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())]
        if torch.cuda.is_available()
        else []
    )
    return [
        partial(random.setstate, random.getstate()), partial(np.random.set_state, np.random.get_state()),
        partial(torch.set_rng_state, torch.get_rng_state()), *cuda,
    ]  # fmt: skip


def open_trainer(experiment: Experiment, profile: Profile, seed: int, folder: Path) -> CaptionTrainer:
    """Model, data, reward and trainer of a run that lies in `folder`, ready to `fit`."""
    rl, training, config = profile.rl, experiment.training, profile.models.policy
    rows = load_data(data_file(profile, experiment.data), experiment.data, rl.num_images, rl.prompts_per_step)
    num_processes, on_gpu = PartialState().num_processes, torch.cuda.is_available()
    arguments = grpo_arguments(profile, experiment, seed, folder, num_processes, on_gpu)
    reward, policy = open_reward(profile, experiment, seed), load_policy(config, training)
    check_training(config, training)
    trainer = CaptionTrainer(
        model=policy, args=GRPOConfig(**arguments), train_dataset=rows, reward_funcs=[reward],
        processing_class=load_processor(config), peft_config=lora_config(training, policy),
    )  # fmt: skip
    if trainer.ref_model is not None:
        share_images(trainer.accelerator.unwrap_model(trainer.ref_model))
    return trainer


class CaptionReward:
    """The reward as GRPOTrainer calls it: once a rollout. Stops training when too many captions could not be scored."""

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
        failed, total = sum(f[0] for f in found), sum(f[1] for f in found)
        if failed > self.rl.max_failed_share * total:
            reasons = sorted({reason for _, _, reason in found if reason})
            hint = "is the reader's or judge's server up, and are the captions within its context?"
            raise RewardsFailedError(
                f"{failed} of {total} captions could not be scored (rl.max_failed_share is "
                f"{self.rl.max_failed_share}): {'; '.join(reasons) or hint}"
            )


def _texts(completions: Sequence[Any]) -> list[str]:
    return [completion[0]["content"] for completion in completions]


@dataclass
class QAScore:
    """The QA reward of a rollout (paper, equations 1-3)."""

    reader: Reader
    settings: RL
    seed: int

    def __call__(self, captions: Sequence[str], rows: Rows, step: int) -> RewardBatch:
        """See `qa_rewards`; draws derive from the training's seed, the step, the image and the caption's number."""
        seen: Counter[str] = Counter()
        tasks = []
        for caption, name, questions in zip(captions, rows["id"], rows["questions"], strict=True):
            key = (self.seed, step, name, seen[name])
            tasks.append(CaptionTask(caption, [Question(**question) for question in questions], key))
            seen[name] += 1
        return qa_rewards(tasks, self.reader, self.settings)


def open_reward(profile: Profile, experiment: Experiment, seed: int) -> CaptionReward:
    """The reward that the experiment asks for, with its reader or judge (paper, Figure 1c)."""
    kind, model = experiment.reward.judge, profile.models[experiment.reward.role]
    if kind == "qa":
        score = QAScore(open_reader(model, profile), profile.rl, seed)
    else:
        judge, rate = open_backend(model, profile), vlm_rewards if kind == "vlm" else unified_rewards

        def score(captions: Sequence[str], rows: Rows, step: int) -> RewardBatch:
            return rate(captions, rows["image"], rows["id"], judge)

    return CaptionReward(kind, score, profile.rl, experiment.reward.length)
