"""What a training needs before anybody rents a machine: steps, tokens, memory, GPU-hours, each with its formula.

Estimates, good to a factor of two: they say whether a run fits and what it costs, not when it will be done. Paid for in
tokens; the reader's and judges' servers run on GPUs of their own and are counted apart.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import gpus, paths
from caprl_utils.config import load_experiment, read_yaml
from caprl_utils.models.weights import weights_in
from caprl_utils.rl import nodes
from caprl_utils.rl.ablations import MAIN, planned
from caprl_utils.rl.arguments import GPU_MICRO_BATCH, policy_server
from caprl_utils.schema import Experiment, Profile

CAPTION_TOKENS = 800  # ours: mean caption after training; the limit counts where it is lower
IMAGE_TOKENS = 1300  # ours: an image of a million pixels (28 x 28 pixels a token)
QUESTION_TOKENS = 80
LORA_SHARE = 0.03  # ours: rank 64 on all linear layers of a 3B model
GRADIENTS_AND_ADAM = 12  # bytes a trainable weight: float32 gradient and two moments
FLOAT32 = 4


@dataclass(frozen=True)
class Size:
    """Weights and shape of a model; shape None where only the files are known."""

    weights: float
    layers: int | None = None
    hidden: int | None = None


SIZES = {  # from the models' published configs
    "Qwen/Qwen2.5-VL-3B-Instruct": Size(3.75e9, 36, 2048),
    "Qwen/Qwen2.5-VL-7B-Instruct": Size(8.29e9, 28, 3584),
    "Qwen/Qwen2.5-VL-72B-Instruct": Size(73.4e9, 80, 8192),
    "Qwen/Qwen2.5-3B-Instruct": Size(3.09e9, 36, 2048),
    "internlm/CapRL-Eval-3B": Size(3.09e9, 36, 2048),
    "CodeGoat24/UnifiedReward-2.0-qwen-3b": Size(3.75e9, 36, 2048),
}


def size_of(path: str) -> Size | None:
    """Size of a known hub model, or of a folder by the heads of its safetensors; None when neither is at hand."""
    if path in SIZES:
        return SIZES[path]
    folder = paths.zoo_folder(path) if path.startswith(paths.ZOO_PREFIX) else Path(path)
    files = list(folder.glob("*.safetensors"))
    if not files:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    return Size(sum(map(weights_in, files)), text.get("num_hidden_layers"), text.get("hidden_size"))


def plan_rl(profile: Profile, experiment: str | None = None) -> list[dict[str, Any]]:
    """Rows {part, item, value, unit, formula} for one training of a profile, and for all of them.

    experiment: by default the main one. value is None where a model's size
    is not known.
    """
    experiment = experiment or MAIN
    loaded, resolved = load_experiment(experiment, profile.name)
    rl, policy = resolved.rl, size_of(resolved.models.policy.path)
    reader = size_of(resolved.models[loaded.reward.role].path)
    captions = rl.prompts_per_step * rl.group_size
    length = min(CAPTION_TOKENS, rl.max_completion_tokens)
    rows = [
        _row("experiment", experiment, "", ""),
        _row("steps", rl.steps, "", "rl.steps"),
        _row("passes over the images", rl.steps * rl.prompts_per_step / rl.num_images, "",
             "rl.steps x rl.prompts_per_step / rl.num_images"),
        _row("captions a step", captions, "", "rl.prompts_per_step x rl.group_size"),
        _row("tokens a caption, with its image", length + IMAGE_TOKENS, "tokens",
             f"min({CAPTION_TOKENS}, rl.max_completion_tokens) + {IMAGE_TOKENS}"),
        *_memory(resolved, loaded, policy, length + IMAGE_TOKENS),
        *_commands(resolved, loaded),
        *_hours(resolved, policy, reader, captions, length),
    ]  # fmt: skip
    one = next(row["value"] for row in rows if row["item"] == "GPU-hours of the training")
    steps = [load_experiment(p.experiment, profile.name)[1].rl.steps for p in planned(resolved)]
    every = None if one is None else one * sum(steps) / rl.steps
    rows.append(
        _row(f"GPU-hours of all {len(steps)} trainings", every, "h", "one training x sum of steps / rl.steps")
    )
    return rows


def _commands(profile: Profile, experiment: Experiment) -> list[dict[str, Any]]:
    """What to type on each node, where several train together."""
    config = experiment.training.accelerate_config
    rows = []
    if experiment.training.rollout == "vllm_server":
        rows = [
            _row(
                "command of the policy's server", policy_server(profile, experiment), "", "TRL's own options"
            )
        ]
    count = 1 if config is None else read_yaml(paths.CONFIGS / "accelerate" / config)["num_machines"]
    if count == 1:
        return rows
    variables = f"MASTER_ADDR=HOST_0 MASTER_PORT={nodes.PORT}"
    # all trainings, as the other nodes follow all
    runner = f".venv/bin/python -m caprl_utils.runner --profile {profile.name}"
    first = f"NODE_RANK=0 {variables} {runner} 03_caprl_rl_training:with_ablations=True"
    rest = f".venv/bin/{nodes.FOLLOW} --profile {profile.name}"
    return [
        *rows,
        _row("command on node 0", first, "", "runs/ has to be on a file system that all nodes see"),
        *(
            _row(f"command on node {rank}", f"NODE_RANK={rank} {variables} {rest}", "", "follows node 0")
            for rank in range(1, count)
        ),
    ]


def _memory(
    profile: Profile, experiment: Experiment, policy: Size | None, tokens: int
) -> list[dict[str, Any]]:
    training, beta, scorer = experiment.training, profile.rl.beta, profile.models[experiment.reward.role]
    processes, zero = _layout(training.accelerate_config)
    formula = (
        "float32 weights 4P (sharded by ZeRO-3) + gradients and Adam 12 x trainable (sharded by ZeRO-2 and 3) + "
        "KL reference 4P (rl.beta > 0, no adapters) + activations micro batch x tokens x hidden x (2 layers + 68) + "
        "reader or judge 2P where it is in this process + training.vllm_memory_share of the GPU for vLLM colocated"
    )
    if policy is None or policy.layers is None:
        return [_row("memory of a GPU", None, "GB", formula)]
    trainable = policy.weights * (LORA_SHARE if training.lora else 1)
    weights = FLOAT32 * policy.weights / (processes if zero == 3 else 1)
    state = GRADIENTS_AND_ADAM * trainable / (processes if zero >= 2 else 1)
    reference = weights if beta > 0 and not training.lora else 0.0
    micro = training.micro_batch_size or GPU_MICRO_BATCH
    activations = micro * tokens * policy.hidden * (2 * policy.layers + 68)
    reader = size_of(scorer.path) if scorer.backend == "local" else None
    sampler = training.vllm_memory_share * gpus.GB if training.rollout == "vllm_colocate" else 0.0
    total = (
        weights + state + reference + activations + (2 * reader.weights if reader else 0)
    ) / 1e9 + sampler
    note = "fits" if total < 0.9 * gpus.GB else "does not fit: training.lora, more GPUs, or ZeRO-3"
    return [
        _row("processes", processes, "", f"training.accelerate_config, ZeRO stage {zero}"),
        _row("memory of a GPU", total, "GB", formula),
        _row(f"on a GPU of {gpus.GB:.0f} GB", note, "", "below 90 % of it"),
    ]


def _layout(config: str | None) -> tuple[int, int]:
    """(processes, ZeRO stage) of an accelerate config; one process without one."""
    if config is None:
        return 1, 0
    values = read_yaml(paths.CONFIGS / "accelerate" / config)
    return values["num_processes"], values["deepspeed_config"]["zero_stage"]


def _hours(
    profile: Profile, policy: Size | None, reader: Size | None, captions: int, length: int
) -> list[dict[str, Any]]:
    rl = profile.rl
    passes = 8 + 2 * (rl.beta > 0)  # forward and backward 6, log-probabilities 2, reference 2
    train = "(8 + 2 if rl.beta) P x captions x tokens"
    formulas = {
        "training": f"steps x {train} / ({gpus.PEAK_FLOPS:.3g} x {gpus.TRAIN_USE})",
        "sampling captions": f"steps x 2P x captions x tokens / ({gpus.PEAK_FLOPS:.3g} x {gpus.GENERATE_USE})",
        "reward": "steps x 2P(reader) x captions x (caption + rounds x "
        f"{QUESTION_TOKENS}) / ({gpus.PEAK_FLOPS:.3g} x {gpus.READ_USE})",
    }
    tokens = captions * (length + IMAGE_TOKENS)
    hours: dict[str, float | None] = dict.fromkeys(formulas)
    if policy is not None:
        hours["training"] = gpus.hours(rl.steps * passes * policy.weights * tokens, gpus.TRAIN_USE)
        hours["sampling captions"] = gpus.hours(rl.steps * 2 * policy.weights * tokens, gpus.GENERATE_USE)
    if reader is not None:
        read = captions * (
            length + rl.rounds * QUESTION_TOKENS
        )  # one pass over the caption serves all questions
        hours["reward"] = gpus.hours(rl.steps * 2 * reader.weights * read, gpus.READ_USE)
    rows = [_row(f"GPU-hours, {name}", hours[name], "h", formula) for name, formula in formulas.items()]
    known = [value for value in hours.values() if value is not None]
    total = sum(known) if len(known) == len(hours) else None
    return [*rows, _row("GPU-hours of the training", total, "h", "sum of the three")]


def _row(item: str, value: Any, unit: str, formula: str) -> dict[str, Any]:
    return {"part": "RL", "item": item, "value": value, "unit": unit, "formula": formula}
