"""The policy to train: which of its parts move, and how many parameters that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.paths import resolve_model
from caprl_utils.rl.experiment import Training
from caprl_utils.schema import ModelConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, ProcessorMixin

PROJECTORS = ("visual.merger", "visual.deepstack_merger_list", "multi_modal_projector")
VISION_TOWERS = ("visual", "vision_tower")
PARTS = ("vision_tower", "projector", "language_model")


def part_of(name: str) -> str:
    """Which part a parameter belongs to, by its name in Qwen2.5-VL, Qwen3-VL, InternVL or LLaVA."""
    dotted = f".{name}."
    if any(f".{prefix}." in dotted for prefix in PROJECTORS):
        return "projector"
    return "vision_tower" if any(f".{prefix}." in dotted for prefix in VISION_TOWERS) else "language_model"


def load_policy(config: ModelConfig, training: Training) -> PreTrainedModel:
    """The policy in float32, with the parts that do not train frozen."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        resolve_model(config.path), dtype=torch.float32, revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    freeze(model, training)
    return model


def load_processor(config: ModelConfig) -> ProcessorMixin:
    """The policy's processor with the profile's pixel limits, padding on the left as generation needs it."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(
        resolve_model(config.path), revision=config.revision, trust_remote_code=config.trust_remote_code,
        truncation_side="left", padding_side="left",
    )  # fmt: skip
    for key, value in (("shortest_edge", config.min_pixels), ("longest_edge", config.max_pixels)):
        if value is not None:
            processor.image_processor.size[key] = value
    return processor


def freeze(model: PreTrainedModel, training: Training) -> None:
    """Freeze the parts that `training` switches off. Raises UserError when nothing is left or a part is
    missing.
    """
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        found[part] += 1
        parameter.requires_grad_(getattr(training, part))
    off = [part for part in PARTS if not getattr(training, part)]
    if missing := [part for part in off if not found[part]]:
        raise UserError(f"training.{missing[0]} is false, but {type(model).__name__} has no such part")
    if len(off) == len(PARTS):
        raise UserError(
            "training switches off vision_tower, projector and language_model: nothing would train"
        )


def lora_config(training: Training) -> LoraConfig | None:
    """Adapters on every linear layer of the parts that train; None for full fine-tuning."""
    if training.lora is None:
        return None
    from peft import LoraConfig

    excluded = [part for part in PARTS if not getattr(training, part)]
    patterns = {
        "vision_tower": r"visual\.(?!merger)|vision_tower",
        "projector": r"visual\.merger|multi_modal_projector",
        "language_model": r"language_model",
    }
    exclude = rf".*({'|'.join(patterns[part] for part in excluded)}).*" if excluded else None
    return LoraConfig(
        r=training.lora.rank, lora_alpha=training.lora.alpha, lora_dropout=training.lora.dropout,
        target_modules="all-linear", exclude_modules=exclude, task_type="CAUSAL_LM",
    )  # fmt: skip


def counts(model: Any) -> dict[str, dict[str, int]]:
    """{part: {"trainable": n, "all": n}} in parameters, adapters counted with the part they sit in."""
    table = {part: {"trainable": 0, "all": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        part = table[part_of(name)]
        part["all"] += parameter.numel()
        part["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return table


def save_final(model: Any, processor: ProcessorMixin, folder: Path) -> None:
    """Write a whole model folder that from_pretrained loads, adapters merged; it appears at once or not at
    all.
    """
    import os
    import shutil

    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    merged = model.merge_and_unload() if hasattr(model, "peft_config") else model
    merged.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
