"""GRPO on captions: TRL's GRPOTrainer with an exact resume, an exact data order, and rewards that may be missing.

How it departs from TRL 1.16, each on purpose:
1. `_load_from_checkpoint` goes through from_pretrained, then loads strictly. TRL's own looks for names that the file
   does not have (huggingface/transformers#43701): it loads nothing, warns, and trains on from the initial weights.
2. The data order is a function of (seed, step) alone; TRL's repeats its first pass after a resume in a later one.
3. A checkpoint is marked whole after its last file.
4. Captions are scored while the KL reference reads them; "seconds/reward" is what training waits for.
5. No value that decides the method is left to a default: TRL's would take the loss dapo, weight the KL term by the
   importance ratio, and drop whole captions of vLLM by a sequence mask.
6. vLLM in this process gets an image's place once: TRL's prompts hold its tokens, and vLLM puts them in again
   (huggingface/trl#6294). What it read has to equal what is trained on.
7. An image is opened once a rollout, transformers samples a part of a rollout at a time on a GPU, and every forward
   pass is cut to its own longest prompt and caption; TRL pads all to the rollout's longest. On a CPU the captions of
   an image lie side by side behind one prompt.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer

from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.models.local import SHARED_FAMILIES, process_once
from caprl_utils.paths import shown
from caprl_utils.rl import policy
from caprl_utils.rl.data import data_file, load_data
from caprl_utils.rl.experiments import batch_layout
from caprl_utils.rl.packed import packed_logps
from caprl_utils.rl.rewards import RewardBatch, Rollout, open_models, repeated_share, total
from caprl_utils.schema import RL, Experiment, Profile, Reward

GPU_ROLLOUT_ROWS = 128
"""Ours: captions that transformers samples together. A step takes as long for few as for many; keys, values and the
first pass over 128 prompts of 1,300 tokens take some 30 GB beside a 3B model in bfloat16 (estimated)."""


def grpo_arguments(
    profile: Profile, experiment: Experiment, seed: int, output_dir: Path, num_processes: int, on_gpu: bool
) -> dict[str, Any]:
    """Keyword arguments of GRPOConfig, for one optimizer step per rollout. Raises UserError as `batch_layout`."""
    rl, training = profile.rl, experiment.training
    sizes = (rl.prompts_per_step, rl.group_size, training.micro_batch_size)
    micro, accumulation = batch_layout(*sizes, num_processes, on_gpu)
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
        "gradient_checkpointing": on_gpu,
        # what is kept and shown
        "save_strategy": "steps", "save_steps": rl.save_every, "save_total_limit": 2,
        "logging_steps": 1, "logging_nan_inf_filter": False, "disable_tqdm": True,
        "report_to": "none",  # ours: the monitor writes the TensorBoard files
        "log_completions": False, "log_multimodal": False,
        "use_vllm": training.rollout != "transformers", "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": training.vllm_memory_share, "vllm_enable_sleep_mode": training.vllm_sleep,
        "vllm_tensor_parallel_size": training.vllm_tensor_parallel,
        # one ratio per caption drifts past its limit on long captions and drops them: cut single tokens instead
        "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 3.0,
    }  # fmt: skip


@dataclass(eq=False)
class StepSampler(Sampler):
    """Rows for every step of a training: `prompts` images, each `group` times, the whole `repeats` times. Passes over
    the data are permutations seeded by (seed, pass), put end to end, so no image is left out. `repeats` is TRL's number
    of micro-batches per rollout: it hands the rollout's rows to each of them.
    """

    num_rows: int
    steps: int
    prompts: int
    group: int
    repeats: int
    seed: int

    def __iter__(self) -> Iterator[int]:
        passes = (torch.Generator().manual_seed(self.seed * 1_000_003 + number) for number in count())
        images = (row for one in passes for row in torch.randperm(self.num_rows, generator=one).tolist())
        for _ in range(self.steps):
            yield from [row for row in islice(images, self.prompts) for _ in range(self.group)] * self.repeats

    def __len__(self) -> int:
        return self.steps * self.prompts * self.group * self.repeats


class CaptionReward:
    """The reward of a training as GRPOTrainer calls it, once a rollout that was begun. reward, models: see
    `rewards.total`.
    """

    def __init__(self, reward: Reward, models: Mapping[str, Any], rl: RL, seed: int):
        self.__name__ = "+".join(reward.terms)  # TRL names its metrics after it
        self.reward, self.models, self.rl, self.seed = reward, models, rl, seed
        self._pool = ThreadPoolExecutor(1, "caprl-reward")

    def begin(self, completions: Sequence[Any], completion_ids: Sequence[Any], rows: Mapping, step: int) -> None:
        """Start to score a rollout; the call that follows waits for what is left of it."""
        captions = [completion[0]["content"] for completion in completions]
        rollout = Rollout(captions, [len(ids) for ids in completion_ids], rows, (self.seed, step))
        self._begun = rollout, self._pool.submit(self.score, rollout)

    def score(self, rollout: Rollout) -> tuple[RewardBatch, str]:
        """The batch, and why it failed as a whole: a process whose servers are gone must not leave the others alone."""
        try:
            return total(self.reward, self.models, rollout, self.rl), ""
        except UserError as error:
            return RewardBatch([None] * len(rollout.captions)), str(error)

    def __call__(self, log_extra: Any, log_metric: Any, **unused: Any) -> list[float | None]:
        """As TRL calls it. Raises UserError, in every process, when of all their captions too many failed."""
        rollout, future = self._begun
        batch, reason = future.result()
        found = gather_object([(batch.rewards.count(None), len(batch.rewards), reason)])  # of all processes
        failed, asked = (sum(part[i] for part in found) for i in (0, 1))
        if failed > self.rl.max_failed_share * asked:
            reasons = sorted({why for _, _, why in found if why})
            hint = "is the reader's or judge's server up, and are the captions within its context?"
            raise UserError(
                f"{failed} of {asked} captions could not be scored (rl.max_failed_share is "
                f"{self.rl.max_failed_share}): {'; '.join(reasons) or hint}. Nothing was learned from them; run again "
                "to go on from the last checkpoint."
            )
        log_extra("image_id", list(rollout.rows["id"]))
        log_extra("num_tokens", list(rollout.num_tokens))
        share = batch.rewards.count(None) / len(batch.rewards)
        repetition = sum(map(repeated_share, rollout.captions)) / len(rollout.captions)
        for name, value in {"failed_share": share, "repetition": repetition, **batch.metrics}.items():
            if not math.isnan(value):
                log_metric(name, value)
        return batch.rewards


class CaptionTrainer(GRPOTrainer):
    """GRPO on captions; see the module's docstring. Use `fit`, not `train`. pictures: opens the data set's images.
    rollout_rows: captions that transformers samples together, all by default. positions_of: the `get_rope_index` of a
    model whose captions are scored side by side.
    """

    pictures: Callable[[Any], Any]
    rollout_rows: int | None = None
    positions_of: Callable[..., tuple] | None = None

    def fit(self, checkpoint: Path | None) -> bool:
        """Train to the last step, or on from a checkpoint. False when a signal stopped it (a checkpoint is there).
        Raises UserError when too many rewards failed: nothing is learned from them.
        """
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return self.state.global_step >= self.state.max_steps

    def _get_train_sampler(self, dataset: Any = None) -> list[int]:
        args, group = self.args, self.num_generations
        repeats = self.num_iterations * args.steps_per_generation
        sizes = (args.max_steps, args.generation_batch_size // group, group, repeats)
        return StepSampler(len(self.train_dataset), *sizes, args.seed)

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        images = {row["id"]: row["image"] for row in inputs}
        opened = {name: self.pictures(image) for name, image in images.items()}
        inputs = [{**row, "image": opened[row["id"]]} for row in inputs]
        self._columns = {name: [row[name] for row in inputs] for name in inputs[0]}
        with process_once(self.processing_class):
            return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(
        self, prompt_ids: list, images: list, fields: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple:
        size = len(prompt_ids) if self.use_vllm else self.rollout_rows or len(prompt_ids)
        parts = []
        for start in range(0, len(prompt_ids), size):
            some, rows = rows_of(fields, start, start + size), slice(start, start + size)
            parts.append(super()._generate_single_turn(prompt_ids[rows], images[rows], some, *args, **kwargs))
        return parts[0] if len(parts) == 1 else ([ids for captions, _ in parts for ids in captions], None)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int,
        batch_size: int | None = None, compute_entropy: bool = False, compute_aux_loss: bool = False,
        **fields: Any,
    ) -> tuple:  # fmt: skip
        """As TRL's, each batch without the columns that are padding in all of its rows (0 stands there); where the
        model allows it, each prompt once.
        """
        size, width, found = batch_size or len(input_ids), input_ids.shape[1], []
        for start in range(0, len(input_ids), size):
            rows, some = slice(start, start + size), rows_of(fields, start, start + size)
            if self.positions_of is not None:
                batch = input_ids[rows], attention_mask[rows], logits_to_keep
                found.append(packed_logps(model, self.positions_of, *batch, some))
                continue
            used = attention_mask[rows].any(0).nonzero().flatten().tolist()
            columns, cut = slice(used[0], used[-1] + 1), width - used[-1] - 1
            for name, value in some.items():
                if name.endswith("token_type_ids") and value is not None:
                    some[name] = value[:, columns]
            *values, _ = super()._get_per_token_logps_and_entropies(
                model, input_ids[rows, columns], attention_mask[rows, columns], logits_to_keep - cut,
                compute_entropy=compute_entropy, **some,
            )  # fmt: skip
            found.append([None if v is None else torch.nn.functional.pad(v, (0, cut)) for v in values])
        logps, entropies = zip(*found, strict=True)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _generate(self, prompts: list) -> tuple:
        with self._timed("seconds/generate"):
            result = super()._generate(prompts)
        for reward in self.reward_funcs:
            reward.begin(result[3], result[1], self._columns, self.state.global_step)
        return result

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._timed("seconds/reward"):
            return super()._calculate_rewards(*args, **kwargs)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._metrics["train"][name].append(time.perf_counter() - start)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # these have loaders of their own
            return
        model = model or self.model
        options = {"dtype": model.dtype, "output_loading_info": True}
        loaded, report = type(model).from_pretrained(resume_from_checkpoint, **options)
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
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            for file in filter(Path.is_file, folder.rglob("*")):
                with open(file, "rb") as handle:
                    os.fsync(handle)
            write_json(folder / policy.WHOLE, {})


# several processes on a CPU load their checkpoints to "cpu:<process>", which torch does not know
torch.serialization.register_package(
    50, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


def rows_of(fields: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """What a processor gave for some of the prompts, one image each; Qwen's patches of all images lie end to end."""
    found = {name: None if value is None else value[start:stop] for name, value in fields.items()}
    if (grid := found.get("image_grid_thw")) is not None:
        before, own = (int(part.prod(-1).sum()) for part in (fields["image_grid_thw"][:start], grid))
        found["pixel_values"] = fields["pixel_values"][before : before + own]
    return found


def same_prompts(generate: Callable[..., tuple], image_token: int, prompts: list, **options: Any) -> tuple:
    """Call vLLM's `generate` with one token where each image goes; it puts in as many as the image has. Raises
    UserError when what it read is not what the trainer learns from.
    """
    single = [[b for a, b in pairwise([None, *ids]) if not a == b == image_token] for ids in prompts]
    found = generate(prompts=single, **options)
    for read, ids in zip(found[0], prompts, strict=True):
        if list(read) != list(ids):
            raise UserError(
                f"vLLM read {len(read)} tokens of a prompt that has {len(ids)} for the trainer: their image "
                "processors differ. Set training.rollout to transformers."
            )
    return found


def kept_out(config: Any) -> dict[str, Any]:
    """Options for vLLM that keep the marks of images and videos out of captions, as TRL does for transformers."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = [getattr(config, name, None) for name in names]
    return {"logit_bias": {token: -100.0 for token in ids if token is not None}}


def open_trainer(experiment: Experiment, profile: Profile, seed: int, folder: Path) -> CaptionTrainer:
    """Model, data, reward and trainer of a run that lies in `folder`, ready to `fit`."""
    rl, training, config = profile.rl, experiment.training, profile.models.policy
    num_processes, on_gpu = PartialState().num_processes, torch.cuda.is_available()
    arguments = grpo_arguments(profile, experiment, seed, folder, num_processes, on_gpu)
    reward = CaptionReward(experiment.reward, open_models(experiment.reward, profile), rl, seed)
    model, processor = policy.load_policy(config, training, on_gpu), policy.load_processor(config)
    refusal = policy.refusal_of(processor, model.config, rl.max_completion_tokens)
    limits = (rl.num_images, rl.prompts_per_step, config.max_pixels, refusal)
    data = load_data(data_file(profile, experiment.data), experiment.data, *limits)
    if training.rollout != "transformers":
        context = policy.longest_prompt(model.config, rl.max_completion_tokens) + rl.max_completion_tokens
        arguments |= {"vllm_max_model_length": context, "generation_kwargs": kept_out(model.config)}
    trainer = CaptionTrainer(
        model=model, args=GRPOConfig(**arguments), train_dataset=data.rows, reward_funcs=[reward],
        processing_class=processor, peft_config=policy.lora_config(training, model),
    )  # fmt: skip
    trainer.pictures, trainer.set_aside = data.pictures, data.set_aside
    trainer.rollout_rows = training.rollout_rows or (GPU_ROLLOUT_ROWS if on_gpu else None)
    if model.config.model_type in SHARED_FAMILIES and not on_gpu:
        trainer.positions_of = model.model.get_rope_index
    if trainer.use_vllm:
        vllm = trainer.vllm_generation
        vllm.generate = partial(same_prompts, vllm.generate, model.config.image_token_id)
    if trainer.ref_model is not None:
        policy.read_alike(trainer.accelerator.unwrap_model(trainer.ref_model), on_gpu)
    return trainer
