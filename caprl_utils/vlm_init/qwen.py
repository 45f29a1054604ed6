"""Qwen2.5 + the vision tower of a Qwen2.5-VL, as Qwen2_5_VLForConditionalGeneration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caprl_utils.schema import Assembly
from caprl_utils.vlm_init.agreement import language_facts, require, require_same
from caprl_utils.vlm_init.checkpoint import Checkpoint
from caprl_utils.vlm_init.donors import donor_folder, read_config
from caprl_utils.vlm_init.plan import Part, Plan, Take, expected_shapes, unused
from caprl_utils.vlm_init.tokens import fast_tokenizer, same_ids

MERGER = "visual.merger."
IMAGE_TOKENS = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
RENAMED = {
    "model.visual.": "visual.",
    "model.language_model.": "model.",
}  # as the hub's checkpoints are named


def make_plan(setting: Assembly) -> Plan:
    """Open and compare both donors. Raises UserError for whatever keeps them from fitting together."""
    language = donor_folder(setting.language, ["model.", "lm_head."])
    vision = donor_folder(setting.vision, ["visual.", "model.visual."])
    config, notes = combined(setting, read_config(language), read_config(vision))
    _check_tokens(setting, config, language, vision)
    donors: dict[Part, Checkpoint] = {
        "language model": Checkpoint(language),
        "vision tower": Checkpoint(vision, ["visual.", "model.visual."]),
    }
    deep = "model." if any(n.startswith("model.visual.") for n in donors["vision tower"].tensors) else ""
    sources = {"language model": "", "vision tower": deep}
    takes = [
        Take(target, part, shape, None if part == "projector" else sources[part] + target)
        for target, part, shape in targets(config)
    ]
    groups = {f"{deep}{MERGER}": "the vision donor's own patch merger"}
    return Plan(
        config=config,
        takes=takes,
        donors=donors,
        save_processor=lambda folder: _save_processor(setting, vision, folder),
        agreed=language_facts(config.text_config),
        notes=[
            *notes,
            "embeddings of the vision special tokens are the language model's own, untrained there",
        ],
        left_out=unused(donors["vision tower"], takes, groups),
    )


def combined(setting: Assembly, language: dict[str, Any], vision: dict[str, Any]) -> tuple[Any, list[str]]:
    """The new model's config from both config.json, and notes on accepted differences.

    Raises UserError when a config is of another class, or hyperparameters that must agree do not.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2Config

    for donor, raw, name in ((setting.language, language, "qwen2"), (setting.vision, vision, "qwen2_5_vl")):
        require(
            raw.get("model_type") == name,
            f"{donor.path} is a {raw.get('model_type')!r} model; this setting needs {name!r} here",
        )
    text, frame = Qwen2Config.from_dict(language), Qwen2_5_VLConfig.from_dict(vision)
    accepted = require_same(
        language_facts(text),
        language_facts(frame.text_config)
        | {"tie_word_embeddings": frame.tie_word_embeddings},  # the hub: at the root
        (setting.language.path, f"the language model inside {setting.vision.path}"),
        setting.accepted_differences,
        "Take the vision tower from the Qwen2.5-VL whose language model has the donor's size",
    )
    notes = [
        f"{key} is the language model's {ours!r}; the vision donor's own has {theirs!r}"
        for key, (ours, theirs) in accepted.items()
    ]
    return _config(frame, text), notes


def targets(config: Any) -> list[tuple[str, Part, tuple[int, ...]]]:
    """(name in the checkpoint, part, shape) of every tensor of the new model."""
    found: list[tuple[str, Part, tuple[int, ...]]] = []
    for name, shape in expected_shapes(config).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = next((name.replace(a, b, 1) for a, b in RENAMED.items() if name.startswith(a)), name)
        part: Part = "vision tower" if target.startswith("visual.") else "language model"
        found.append((target, "projector" if target.startswith(MERGER) else part, shape))
    return found


def _check_tokens(setting: Assembly, config: Any, language: Path, vision: Path) -> None:
    """Both tokenizers give the same ids, and the image tokens those that the config names."""
    tokenizer = fast_tokenizer(language)
    same_ids(tokenizer, fast_tokenizer(vision), setting.language.path, setting.vision.path)
    for token, key in IMAGE_TOKENS.items():
        found, named = tokenizer.convert_tokens_to_ids(token), getattr(config, key)
        require(
            found == named,
            f"{token} has id {found} in the tokenizer of {setting.language.path}, but {key} is {named} in "
            f"{setting.vision.path}",
        )


def _config(frame: Any, text: Any) -> Any:
    """The vision donor's config with everything of the language model taken from the language donor."""
    from transformers import Qwen2_5_VLConfig

    sections = frame.text_config.rope_parameters.get("mrope_section")
    head_dim = text.hidden_size // text.num_attention_heads
    require(sections is not None and 2 * sum(sections) == head_dim,
            f"mrope_section {sections} of the vision donor does not add up to half of head_dim {head_dim}")  # fmt: skip
    taken = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_dropout",
             "initializer_range", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers",
             "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    values = {key: getattr(text, key) for key in taken}
    vision = frame.vision_config.to_dict() | {"out_hidden_size": text.hidden_size}
    return Qwen2_5_VLConfig(
        text_config=values | {"rope_parameters": dict(text.rope_parameters) | {"mrope_section": list(sections)},
                              "tie_word_embeddings": text.tie_word_embeddings},
        vision_config=vision,
        tie_word_embeddings=text.tie_word_embeddings,  # at the root: older readers do not look further down
        **{key: getattr(frame, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id",
                                                "vision_end_token_id")},
    )  # fmt: skip


def _save_processor(setting: Assembly, vision: Path, folder: Path) -> dict[str, Any]:
    """Processor of the vision donor (its chat template knows images), with the setting's image size limits."""
    from transformers import Qwen2_5_VLProcessor

    processor = Qwen2_5_VLProcessor.from_pretrained(vision)
    size = dict(processor.image_processor.size)
    size["shortest_edge"] = setting.min_pixels or size["shortest_edge"]
    size["longest_edge"] = setting.max_pixels or size["longest_edge"]
    require(size["shortest_edge"] <= size["longest_edge"],
            f"min_pixels {size['shortest_edge']} is above max_pixels {size['longest_edge']}")  # fmt: skip
    processor.image_processor.size = size
    processor.save_pretrained(folder)
    per_token = (processor.image_processor.patch_size * processor.image_processor.merge_size) ** 2
    return {
        "min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"],
        "max_image_tokens": size["longest_edge"] // per_token, "image_token": processor.image_token,
    }  # fmt: skip
