"""Qwen2.5 + the vision tower of a Qwen2.5-VL, as Qwen2_5_VLForConditionalGeneration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.schema import Assembly
from caprl_utils.vlm_init.donors import fast_tokenizer, language_facts, require

if TYPE_CHECKING:
    import torch

    from caprl_utils.vlm_init.donors import Tensors

CLASS = "Qwen2_5_VLForConditionalGeneration"
STORED = {"model.visual.": "visual.", "model.language_model.": "model."}  # as the hub's checkpoints are named
IMAGE_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_OF_THE_LANGUAGE_MODEL = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_dropout",
    "initializer_range", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip


def combined(setting: Assembly, language: dict[str, Any], vision: dict[str, Any]) -> tuple[Any, list[str]]:
    """The vision donor's config with everything of the language model from the language donor's, and notes.

    language, vision: their config.json. Raises UserError for other classes and for differences that are not accepted.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2Config

    for donor, raw, name in ((setting.language, language, "qwen2"), (setting.vision, vision, "qwen2_5_vl")):
        kind = raw.get("model_type")
        require(kind == name, f"{donor.path} is a {kind!r} model; this setting needs {name!r} here")
    text, frame = Qwen2Config.from_dict(language), Qwen2_5_VLConfig.from_dict(vision)
    accepted = setting.accepted_differences
    ours, theirs = language_facts(text), language_facts(frame.text_config)
    theirs["tie_word_embeddings"] = frame.tie_word_embeddings  # the hub's configs tie the head at the root
    unknown = ", ".join(sorted(set(accepted) - set(ours)))
    require(not unknown, f"accepted_differences: {unknown} is not compared; known: {', '.join(ours)}")
    differing = [key for key in ours if ours[key] != theirs[key]]
    refused = "; ".join(f"{k} {ours[k]!r} and {theirs[k]!r}" for k in differing if k not in accepted)
    require(not refused, f"{setting.language.path} and the language model inside {setting.vision.path} do not fit "
            f"together: {refused}. Take the vision tower from the Qwen2.5-VL whose language model has the donor's size"
            )  # fmt: skip
    sections = list(frame.text_config.rope_parameters["mrope_section"])
    values = {key: getattr(text, key) for key in _OF_THE_LANGUAGE_MODEL}
    config = Qwen2_5_VLConfig(
        text_config=values | {"rope_parameters": {**text.rope_parameters, "mrope_section": sections}},
        vision_config=frame.vision_config.to_dict() | {"out_hidden_size": text.hidden_size},
        tie_word_embeddings=text.tie_word_embeddings,  # at the root: older readers do not look further down
        **{key: getattr(frame, key) for key in IMAGE_TOKENS},
    )
    notes = [f"{k} is the language model's {ours[k]!r}; the vision donor's own has {theirs[k]!r}" for k in differing]
    return config, [*notes, "embeddings of the vision special tokens are the language model's own, untrained there"]


def processor(setting: Assembly, config: Any, language: Path, vision: Path) -> tuple[Any, int]:
    """Processor of the vision donor (its chat template knows images) with the setting's limits, and most image tokens.

    Raises UserError where the language donor's tokenizer lacks tokens of the vision donor's, or gives other ids.
    """
    from transformers import Qwen2_5_VLProcessor

    ours, theirs = (fast_tokenizer(folder).get_vocab() for folder in (language, vision))
    wrong = sorted(token for token, number in theirs.items() if ours.get(token) != number)
    told = ", ".join(f"{token!r} ({ours.get(token)} and {theirs[token]})" for token in wrong[:5])
    require(not wrong, f"the tokenizers of {setting.language.path} and {setting.vision.path} do not fit together: "
            f"{len(wrong)} tokens have other ids, or none in the first: {told}")  # fmt: skip
    made = Qwen2_5_VLProcessor.from_pretrained(vision)
    images = made.image_processor
    low = setting.min_pixels or images.size["shortest_edge"]
    high = setting.max_pixels or images.size["longest_edge"]
    require(low <= high, f"min_pixels {low} is above max_pixels {high}")
    images.size = dict(images.size) | {"shortest_edge": low, "longest_edge": high}
    return made, high // (images.patch_size * images.merge_size) ** 2


def tensors(config: Any, language: Tensors, vision: Tensors) -> dict[str, torch.Tensor]:
    """All tensors of both donors under the new model's stored names."""
    tower = {f"visual.{n.partition('visual.')[2]}": tensor for n, tensor in vision.items() if "visual." in n}
    return {**language, **tower}
