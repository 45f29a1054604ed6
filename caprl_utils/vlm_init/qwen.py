"""Qwen2.5 + the vision tower of a Qwen2.5-VL, as Qwen2_5_VLForConditionalGeneration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.schema import Assembly
from caprl_utils.vlm_init.donors import fast_tokenizer, language_facts, require

if TYPE_CHECKING:
    import torch

CLASS = "Qwen2_5_VLForConditionalGeneration"
STORED = {"model.visual.": "visual.", "model.language_model.": "model."}  # as the hub's checkpoints are named
PREFIXES = (("model.", "lm_head."), ("visual.", "model.visual."))  # of what the two donors give
IMAGE_TOKENS = {
    "<|image_pad|>": "image_token_id", "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id", "<|vision_end|>": "vision_end_token_id",
}  # fmt: skip
_OF_THE_LANGUAGE_MODEL = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_dropout",
    "initializer_range", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip


def combined(setting: Assembly, language: dict[str, Any], vision: dict[str, Any]) -> tuple[Any, list[str]]:
    """The vision donor's config with everything of the language model from the language donor's, and notes.

    language, vision: the donors' config.json. Raises UserError when one is of another class, or hyperparameters that
    must agree do not.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2Config

    for donor, raw, name in ((setting.language, language, "qwen2"), (setting.vision, vision, "qwen2_5_vl")):
        kind = raw.get("model_type")
        require(kind == name, f"{donor.path} is a {kind!r} model; this setting needs {name!r} here")
    text, frame = Qwen2Config.from_dict(language), Qwen2_5_VLConfig.from_dict(vision)
    notes = _agreement(setting, text, frame)
    sections = frame.text_config.rope_parameters.get("mrope_section")
    head_dim = text.hidden_size // text.num_attention_heads
    require(sections is not None and 2 * sum(sections) == head_dim,
            f"mrope_section {sections} of the vision donor does not add up to half of head_dim {head_dim}")  # fmt: skip
    values = {key: getattr(text, key) for key in _OF_THE_LANGUAGE_MODEL}
    return Qwen2_5_VLConfig(
        text_config=values | {"rope_parameters": dict(text.rope_parameters) | {"mrope_section": list(sections)}},
        vision_config=frame.vision_config.to_dict() | {"out_hidden_size": text.hidden_size},
        tie_word_embeddings=text.tie_word_embeddings,  # at the root: older readers do not look further down
        **{key: getattr(frame, key) for key in IMAGE_TOKENS.values()},
    ), notes  # fmt: skip


def _agreement(setting: Assembly, text: Any, frame: Any) -> list[str]:
    """Compare the language model with the vision donor's own; notes on accepted differences.

    Raises UserError listing every other difference, and for an accepted name that is no hyperparameter.
    """
    ours = language_facts(text)
    # the hub's configs tie the head at the root
    theirs = language_facts(frame.text_config) | {"tie_word_embeddings": frame.tie_word_embeddings}
    accepted = setting.accepted_differences
    if unknown := sorted(set(accepted) - set(ours)):
        raise UserError(
            f"accepted_differences: {', '.join(unknown)} is not compared; known: {', '.join(ours)}"
        )
    differing = [key for key in ours if ours[key] != theirs[key]]
    if refused := [key for key in differing if key not in accepted]:
        raise UserError(
            f"{setting.language.path} and the language model inside {setting.vision.path} do not fit together: "
            + "; ".join(f"{key} {ours[key]!r} and {theirs[key]!r}" for key in refused)
            + ". Take the vision tower from the Qwen2.5-VL whose language model has the donor's size"
        )
    untrained = "embeddings of the vision special tokens are the language model's own, untrained there"
    return [
        *(
            f"{k} is the language model's {ours[k]!r}; the vision donor's own has {theirs[k]!r}"
            for k in differing
        ),
        untrained,
    ]


def processor(setting: Assembly, config: Any, language: Path, vision: Path) -> tuple[Any, int]:
    """Processor of the vision donor (its chat template knows images) with the setting's limits, and most image tokens.

    Raises UserError unless both tokenizers give the same ids and the image tokens have those that the config names.
    """
    from transformers import Qwen2_5_VLProcessor

    _same_ids(setting, fast_tokenizer(language), fast_tokenizer(vision))
    tokenizer = fast_tokenizer(language)
    for token, key in IMAGE_TOKENS.items():
        found, named = tokenizer.convert_tokens_to_ids(token), getattr(config, key)
        require(found == named, f"{token} has id {found} in the tokenizer of {setting.language.path}, but {key} is "
                f"{named} in {setting.vision.path}")  # fmt: skip
    made = Qwen2_5_VLProcessor.from_pretrained(vision)
    images = made.image_processor
    low = setting.min_pixels or images.size["shortest_edge"]
    high = setting.max_pixels or images.size["longest_edge"]
    require(low <= high, f"min_pixels {low} is above max_pixels {high}")
    images.size = dict(images.size) | {"shortest_edge": low, "longest_edge": high}
    return made, high // (images.patch_size * images.merge_size) ** 2


def _same_ids(setting: Assembly, language: Any, vision: Any) -> None:
    """Raise UserError unless every token of both has the same id in both, and the vision donor adds none."""
    ours, theirs = language.get_vocab(), vision.get_vocab()
    if moved := [token for token, number in theirs.items() if ours.get(token, number) != number]:
        token = min(moved)
        raise UserError(
            f"the tokenizers of {setting.language.path} and {setting.vision.path} do not fit together: {len(moved)} "
            f"tokens have other ids, {token!r} for one ({ours[token]} and {theirs[token]})"
        )
    if added := sorted(theirs.keys() - ours.keys()):
        raise UserError(
            f"{setting.vision.path} has {len(added)} tokens that {setting.language.path} lacks "
            f"({', '.join(map(repr, added[:5]))}); the language model would have no embedding for them"
        )


def tensors(
    config: Any, language: Mapping[str, torch.Tensor], vision: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All tensors of both donors under the new model's stored names."""
    tower = {f"visual.{name.partition('visual.')[2]}": tensor for name, tensor in vision.items()}
    return {**language, **tower}
