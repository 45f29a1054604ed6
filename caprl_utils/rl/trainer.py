"""TRL's GRPOTrainer with an exact resume, an exact data order, and rewards that may be missing.

How it departs from TRL 1.16, each on purpose:
1. `_load_from_checkpoint` goes through from_pretrained and then loads strictly. TRL's own does a non-strict
   load of a file whose names differ from the model's (huggingface/transformers#43701): it loads nothing,
   says so in two warnings, and training goes on from the initial weights. The KL reference still comes from
   the base model.
2. The data order is a function of (seed, step) alone, over any number of passes; TRL's sampler repeats its
   first pass after a resume in a later one.
3. A checkpoint is marked whole after its last file.
4. When too many rewards fail, training stops with a checkpoint of the last finished step.
5. Captions are scored while the KL reference reads them; "seconds/reward" is what training waits for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from trl import GRPOTrainer

from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.rl import checkpoints
from caprl_utils.rl.vision import process_once


class RewardsFailedError(UserError):
    """More rewards failed than rl.max_failed_share allows."""


class StepSampler(Sampler):
    """Rows for every step of a training: `prompts` images, each `group` times, the whole `repeats` times.

    Passes over the data are permutations seeded by (seed, pass), put end to end, so no image is left out.
    `repeats` is TRL's number of micro-batches per rollout: it hands the rollout's rows to each of them.
    """

    def __init__(self, num_rows: int, steps: int, prompts: int, group: int, repeats: int, seed: int):
        self.num_rows, self.steps, self.prompts = num_rows, steps, prompts
        self.group, self.repeats, self.seed = group, repeats, seed

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
        """Train to the last step, or on from a checkpoint. False when a signal stopped it (a checkpoint is
        there).

        Raises UserError when too many rewards failed, after saving the last finished step.
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
        rows = self.train_dataset if dataset is None else dataset
        return StepSampler(
            num_rows=len(rows),
            steps=self.args.max_steps,
            prompts=self.args.generation_batch_size // self.num_generations,
            group=self.num_generations,
            repeats=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

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
            reward.begin(completions, self._columns, self.state)
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
            checkpoints.mark_complete(self._checkpoint_folder())

    def _checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _save_last_step(self) -> str | None:
        """A checkpoint as it would have been saved at the end of the last finished step."""
        folder = self._checkpoint_folder()
        if self.state.global_step == 0:
            return None
        if not (folder / checkpoints.MARKER).is_file():
            self.model.zero_grad()
            _restore_random_state(self._step_start)
            self._save_checkpoint(self.model, trial=None)
        return shown(folder)


def _restore_on_cpu(storage: Any, location: str) -> Any:
    """Several processes on a CPU load their checkpoints to "cpu:<process>", which torch does not know."""
    return storage if location.startswith("cpu:") else None


torch.serialization.register_package(50, lambda storage: None, _restore_on_cpu)


def _random_state() -> tuple:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore_random_state(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state_all(state[3])
