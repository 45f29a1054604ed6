"""From our settings to TRL's GRPOConfig: every value that decides the method is set here, the optimizer's own
constants among them; none is left to a default.

Where TRL's defaults would change the method (ecosystem: TRL 1.16): loss_type is dapo, use_bias_correction_kl
weights the KL term by the importance ratio, and vLLM rollouts drop whole captions by a sequence mask.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from caprl_utils.errors import UserError
from caprl_utils.paths import resolve_model
from caprl_utils.schema import Experiment, Profile

MAX_PROMPT_TOKENS = 4096  # author script: prompt, image tokens included
GPU_MICRO_BATCH = 4
"""Ours: captions of 1-2k tokens per forward and backward of a 3B model on 80 GB, with gradient
checkpointing.
"""


def grpo_arguments(
    profile: Profile, experiment: Experiment, seed: int, output_dir: Path, num_processes: int, on_gpu: bool
) -> dict[str, Any]:
    """Keyword arguments of GRPOConfig. One optimizer step per rollout of prompts_per_step x group_size
    captions.

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
        "model_init_kwargs": {
            "dtype": "float32", "revision": profile.models.policy.revision,
            "trust_remote_code": profile.models.policy.trust_remote_code,
        },
        "trust_remote_code": profile.models.policy.trust_remote_code,
        # the method
        "num_generations": rl.group_size, "max_completion_length": rl.max_completion_tokens,
        "temperature": rl.temperature, "top_p": 1.0, "top_k": 0, "beta": rl.beta, "epsilon": rl.epsilon,
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
        **_rollout(profile, experiment),
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


def max_model_tokens(profile: Profile) -> int:
    """Longest prompt and caption together of a rollout by vLLM."""
    return MAX_PROMPT_TOKENS + profile.rl.max_completion_tokens


def policy_server(profile: Profile, experiment: Experiment) -> str:
    """Shell command of the server that `rollout: vllm_server` needs, on GPUs that training leaves alone.

    TRL's own list of options: the trainer sends weights to the server and reads its log-probabilities.
    """
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    policy, url = profile.models.policy, urlsplit(experiment.training.vllm_server_url)
    arguments = ScriptArguments(
        model=resolve_model(policy.path), revision=policy.revision, host=url.hostname, port=url.port,
        dtype="bfloat16", max_model_len=max_model_tokens(profile), trust_remote_code=policy.trust_remote_code,
    )  # fmt: skip
    words = build_command(arguments)
    return f"VLLM_SERVER_DEV_MODE=1 .venv/bin/vllm {shlex.join(words[words.index('serve') :])}"


def _rollout(profile: Profile, experiment: Experiment) -> dict[str, Any]:
    training = experiment.training
    if training.rollout == "transformers":
        return {"use_vllm": False}
    return {
        "use_vllm": True,
        "vllm_mode": training.rollout.removeprefix("vllm_"),
        "vllm_max_model_length": max_model_tokens(profile),
        "vllm_gpu_memory_utilization": training.vllm_memory_share,
        "vllm_server_base_url": training.vllm_server_url if training.rollout == "vllm_server" else None,
        # one ratio per caption drifts past its limit on long captions and drops them: cut single tokens
        # instead
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 3.0,
    }
