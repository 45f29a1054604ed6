"""The policy to train: which of its parts move, how many parameters that is, and where it is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.models.local import share_images
from caprl_utils.models.weights import PARTS, part_of, weights_in
from caprl_utils.paths import resolve_model, shown
from caprl_utils.runs import checkpoints_in
from caprl_utils.schema import ModelConfig, Training

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, ProcessorMixin

COMPLETE = "complete.json"  # written last into a checkpoint: it is whole


def load_policy(config: ModelConfig, training: Training) -> PreTrainedModel:
    """The policy in float32, the parts that do not train frozen; it encodes each image of a batch once."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        resolve_model(config.path), dtype=torch.float32, revision=config.revision
    )
    freeze(model, training)
    share_images(model)
    return model


def load_processor(config: ModelConfig) -> ProcessorMixin:
    """The policy's processor with the profile's pixel limits, padding on the left as generation needs it."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(
        resolve_model(config.path), revision=config.revision, truncation_side="left", padding_side="left"
    )
    if config.max_pixels is not None:
        processor.image_processor.size["longest_edge"] = config.max_pixels
    return processor


def check_training(config: ModelConfig, training: Training) -> None:
    """Raise UserError for settings that each work, but not together."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if training.rollout != "transformers" and config.max_pixels:
        raise UserError(
            f"training.rollout {training.rollout}: vLLM takes the pixel limit from the model's folder and would "
            "see other image tokens than training does. Leave out models.policy.max_pixels and write it into the "
            "folder's preprocessor_config.json (size: longest_edge)."
        )
    if training.lora is not None and is_deepspeed_zero3_enabled():
        raise UserError(
            "training.lora with ZeRO-3: adapters cannot be merged into weights that lie in parts. Use ZeRO-2 "
            "(training.accelerate_config: one_node.yaml); adapters leave room for it."
        )


def freeze(model: PreTrainedModel, training: Training) -> None:
    """Freeze the parts that `training` switches off. Raises UserError when nothing is left or a part is missing."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(training, part_of(name)))
    off = [part for part in PARTS if not getattr(training, part)]
    if missing := sorted({*off} - {part_of(name) for name, _ in model.named_parameters()}):
        raise UserError(f"training.{missing[0]} is false, but {type(model).__name__} has no such part")
    if len(off) == len(PARTS):
        raise UserError(f"training switches off {', '.join(PARTS)}: nothing would train")


def lora_config(training: Training, model: PreTrainedModel) -> LoraConfig | None:
    """Adapters on every linear layer of the parts of `model` that train; None for full fine-tuning."""
    if training.lora is None:
        return None
    from peft import LoraConfig
    from torch.nn import Linear

    layers = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    return LoraConfig(
        r=training.lora.rank, lora_alpha=training.lora.alpha,
        lora_dropout=0.0,  # ours: keeps the policy equal to its rollouts
        target_modules="all-linear",
        exclude_modules=[name for name in layers if not getattr(training, part_of(name))] or None,
        task_type="CAUSAL_LM",
    )  # fmt: skip


def counts(model: Any) -> dict[str, dict[str, int]]:
    """{part: {"trainable": n, "all": n}} in parameters, adapters counted with the part they sit in."""
    table = {part: {"trainable": 0, "all": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        part = table[part_of(name)]
        part["all"] += _size(parameter)
        part["trainable"] += _size(parameter) if parameter.requires_grad else 0
    return table


def _size(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor and the size


def save_final(
    model: Any, processor: ProcessorMixin, folder: Path, state_dict: Mapping[str, Any] | None = None
) -> None:
    """Write a whole model folder that from_pretrained loads, adapters merged; it appears at once or not at all.

    state_dict: the weights where the model itself holds only a part of them (ZeRO-3). Raises UserError when fewer
    weights were written than the model has.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    merged = model.merge_and_unload() if hasattr(model, "peft_config") else model
    merged.save_pretrained(temporary, state_dict=state_dict)
    processor.save_pretrained(temporary)
    expected = sum(_size(parameter) for parameter in merged.parameters())
    written = sum(map(weights_in, temporary.glob("*.safetensors")))
    if written < expected:
        raise UserError(
            f"{shown(temporary)} holds {written:,} of the model's {expected:,} weights; the checkpoints are kept"
        )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def mark_complete(folder: Path) -> None:
    """Flush a checkpoint's files to disk, then write its marker."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle)
    write_json(folder / COMPLETE, {str(f.relative_to(folder)): f.stat().st_size for f in files})


def last_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Half-written ones (a kill while saving) are deleted."""
    last = None
    for checkpoint in checkpoints_in(folder):
        if (checkpoint / COMPLETE).is_file():
            last = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return last
