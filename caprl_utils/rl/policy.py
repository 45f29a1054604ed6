"""The policy to train: which of its parts move, how many parameters that is, and where it is kept."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig
from PIL.Image import Image
from safetensors import safe_open
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.models.base import PARTS, part_of
from caprl_utils.models.local import share_images
from caprl_utils.paths import resolve_model, shown
from caprl_utils.rl.data import Refusal
from caprl_utils.schema import ModelConfig, Training

WHOLE = "complete.json"  # written last into a checkpoint
MAX_PROMPT_TOKENS = 4096  # author script: prompt, image tokens included


def load_policy(config: ModelConfig, training: Training, on_gpu: bool = False) -> hf.PreTrainedModel:
    """The policy, the parts that do not train frozen. In float32: bfloat16 weights do not move at a learning rate of
    1e-6. Under adapters, which are float32 themselves, a GPU holds them in bfloat16, else rollouts would run in
    float32. Raises UserError for settings that do not work together.
    """
    if training.lora is not None and is_deepspeed_zero3_enabled():
        raise UserError(
            "training.lora with ZeRO-3: adapters cannot be merged into weights that lie in parts. Use ZeRO-2 "
            "(training.accelerate_config: one_node.yaml); adapters leave room for it."
        )
    options = {"dtype": torch.bfloat16 if training.lora and on_gpu else torch.float32, "revision": config.revision}
    model = hf.AutoModelForImageTextToText.from_pretrained(resolve_model(config.path), **options)
    freeze(model, training)
    read_alike(model, on_gpu)
    return model


def read_alike(model: hf.PreTrainedModel, on_gpu: bool) -> None:
    """Let a model, policy or reference, encode each image of a batch once, and its windows together."""
    share_images(model)
    if on_gpu:
        windows_together(model)


def load_processor(config: ModelConfig) -> hf.ProcessorMixin:
    """The policy's processor, padding on the left as generation needs it; pictures come scaled (`data.load_data`)."""
    path, sides = resolve_model(config.path), {"truncation_side": "left", "padding_side": "left"}
    return hf.AutoProcessor.from_pretrained(path, revision=config.revision, **sides)


def longest_prompt(config: hf.PreTrainedConfig, room: int) -> int:
    """Tokens of a prompt that leave `room` for the caption."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    return min(MAX_PROMPT_TOKENS, positions - room)


def refusal_of(processor: hf.ProcessorMixin, config: hf.PreTrainedConfig, room: int) -> Refusal:
    """Says of a picture why the policy cannot caption it with `room` tokens; None when it can."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompts.CAPTION}]}
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    fixed = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) - 1  # the image's own place
    limit = longest_prompt(config, room)

    def refusal(picture: Image) -> str | None:
        try:
            found = processor._get_num_multimodal_tokens(image_sizes=[picture.size[::-1]])
        except ValueError as error:  # a form that the processor refuses
            return str(error)
        tokens = fixed + found["num_image_tokens"][0]
        return f"its prompt has {tokens} tokens, the limit is {limit}" if tokens > limit else None

    return refusal


def windows_together(model: hf.PreTrainedModel) -> None:
    """Let a Qwen2.5-VL tower attend within all windows of one size in one call. transformers calls attention once per
    window, some 2,000 times for an image of one megapixel.
    """
    if model.config.model_type != "qwen2_5_vl":
        return

    def attend(module: Any, *qkv: Any, scaling: float, cu_seq_lens_q: torch.Tensor, **more: Any) -> tuple:
        """(1, heads, T, d) three times -> (1, T, heads, d); a token sees those of its own window."""
        lengths, out = cu_seq_lens_q.diff(), torch.empty_like(qkv[0].transpose(1, 2))
        for length in lengths.unique().tolist():
            starts = cu_seq_lens_q[:-1][lengths == length]
            places = starts[:, None] + torch.arange(length, device=starts.device)  # (windows, length)
            parts = (tensor[0][:, places].transpose(0, 1) for tensor in qkv[:3])
            seen = torch.nn.functional.scaled_dot_product_attention(*parts, scale=scaling)
            out[0, places] = seen.transpose(1, 2)
        return out, None

    name = "flash_windows"  # a name with "flash" is given the windows' places instead of one at a time
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    model.model.visual.config._attn_implementation = name


def freeze(model: hf.PreTrainedModel, training: Training) -> None:
    """Freeze the parts that `training` switches off. Raises UserError when nothing is left or a part is missing."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(training, part_of(name)))
    off = [part for part in PARTS if not getattr(training, part)]
    if missing := sorted({*off} - {part_of(name) for name, _ in model.named_parameters()}):
        raise UserError(f"training.{missing[0]} is false, but {type(model).__name__} has no such part")
    if len(off) == len(PARTS):
        raise UserError(f"training switches off {', '.join(PARTS)}: nothing would train")


def lora_config(training: Training, model: hf.PreTrainedModel) -> LoraConfig | None:
    """Adapters on every linear layer of the parts of `model` that train; None for full fine-tuning."""
    if training.lora is None:
        return None
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return LoraConfig(
        r=training.lora.rank, lora_alpha=training.lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM",
        lora_dropout=0.0,  # ours: keeps the policy equal to its rollouts
        exclude_modules=[name for name in layers if not getattr(training, part_of(name))] or None,
    )  # fmt: skip


def counts(model: Any) -> dict[str, dict[str, int]]:
    """{part: {"trainable": n, "all": n}} in parameters, adapters counted with the part they sit in."""
    table = {part: {"trainable": 0, "all": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        table[part_of(name)]["all"] += _size(parameter)
        table[part_of(name)]["trainable"] += _size(parameter) * parameter.requires_grad
    return table


def _size(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor and the size


def save_final(
    model: Any, processor: hf.ProcessorMixin, folder: Path, start: ModelConfig,
    state_dict: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a whole model folder that from_pretrained loads, adapters merged; it appears at once or not at all. start:
    what was trained; the weights get the dtype that it has on disk, so both caption alike. state_dict: the weights
    where the model itself holds only a part of them (ZeRO-3). Raises UserError when fewer were written than it has.
    """
    dtype = hf.AutoConfig.from_pretrained(resolve_model(start.path), revision=start.revision).dtype or torch.float32
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    merged = model.merge_and_unload() if hasattr(model, "peft_config") else model
    merged.to(dtype).save_pretrained(temporary, state_dict=state_dict)
    processor.save_pretrained(temporary)
    expected, written = sum(map(_size, merged.parameters())), 0
    for file in temporary.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            written += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    if written < expected:
        told = f"{shown(temporary)} holds {written:,} of the model's {expected:,} weights"
        raise UserError(f"{told}; the checkpoints are kept")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has its marker."""
    return (checkpoint / WHOLE).is_file()
