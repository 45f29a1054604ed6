"""InternLM2.5 (or another Llama-like model) + CLIP, as LlavaForConditionalGeneration.

Choices that the paper leaves open, all ours: features of CLIP's last layer but one without the class token and a
projector of two layers with GELU (LLaVA-1.5); pictures padded to a square, because CLIP's own centre crop cuts off the
sides of charts and documents; ``<image>`` and the chat marks on reserved rows of the embedding, so that none is added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.schema import Assembly
from caprl_utils.vlm_init import internlm
from caprl_utils.vlm_init.agreement import language_facts, require
from caprl_utils.vlm_init.checkpoint import Checkpoint
from caprl_utils.vlm_init.donors import donor_folder, read_config
from caprl_utils.vlm_init.plan import Part, Plan, Take, expected_shapes, unused
from caprl_utils.vlm_init.tokens import fast_tokenizer, renamed

CHAT_TEMPLATE = Path(__file__).with_name("llava_chatml.jinja")
# Names as the hub's checkpoints have them: vLLM 0.31 reads a CLIP tower under `vision_model.` only, and a model that
# transformers built itself is saved without that level.
RENAMED = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
TOWER_FIRST = "embeddings.class_embedding"
TOWER_PREFIXES = ("", "vision_model.", "vision_tower.vision_model.", "vision_tower.", "model.vision_tower.")
LANGUAGE_CLASSES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "mistral": "MistralConfig"}


def make_plan(setting: Assembly) -> Plan:
    """Open and check both donors. Raises UserError for whatever keeps them from fitting together."""
    language = donor_folder(setting.language, ["model.", "lm_head.", "output."])
    parts = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
    vision = donor_folder(setting.vision, [p + q for p in TOWER_PREFIXES for q in parts])
    raw = read_config(language)
    text = _text_config(setting, raw)
    tokenizer = renamed(fast_tokenizer(language), setting.rename_tokens)
    config = _config(
        setting, text, _tower_config(setting, read_config(vision)), _image_id(setting, tokenizer, text)
    )
    donors: dict[Part, Checkpoint] = {
        "language model": Checkpoint(language),
        "vision tower": Checkpoint(vision),
    }
    fused = raw["model_type"] == "internlm2"
    takes = _takes(config, donors["vision tower"], text if fused else None)
    notes = [
        f"{old} of the tokenizer is now {new}: its embedding is an unused row of the language model"
        for old, new in setting.rename_tokens.items()
    ]
    if fused:
        notes.append(
            "InternLM2's fused wqkv is split into Llama's q, k and v; dynamic rope scaling is left out"
        )
    groups = {"text_model.": "CLIP's text half", "language_model.": "the donor's language model"}
    return Plan(
        config=config,
        takes=takes,
        donors=donors,
        save_processor=lambda folder: _save_processor(
            setting, tokenizer, vision, config.vision_config, folder
        ),
        agreed=language_facts(text),
        notes=notes,
        left_out=unused(donors["vision tower"], takes, groups),
    )


def combined(
    setting: Assembly, language: dict[str, Any], vision: dict[str, Any], image_id: int = 0
) -> tuple[Any, list[str]]:
    """The new model's config from both config.json. Raises UserError for classes that do not belong here."""
    return _config(setting, _text_config(setting, language), _tower_config(setting, vision), image_id), []


def _image_id(setting: Assembly, tokenizer: Any, text: Any) -> int:
    vocabulary = tokenizer.get_vocab()
    require(
        setting.image_token in vocabulary,
        f"image_token {setting.image_token!r} is not in the tokenizer of {setting.language.path}; give a reserved "
        "token that name by rename_tokens",
    )
    require(
        max(vocabulary.values()) < text.vocab_size,
        f"the tokenizer of {setting.language.path} has ids beyond vocab_size {text.vocab_size}",
    )
    return vocabulary[setting.image_token]


def _text_config(setting: Assembly, raw: dict[str, Any]) -> Any:
    """Config of a native class, also of InternLM2's layout."""
    import transformers

    kind = raw.get("model_type")
    if kind == "internlm2":
        return internlm.llama_config(raw)
    require(
        kind in LANGUAGE_CLASSES,
        f"{setting.language.path} is a {kind!r} model; a LLaVA takes internlm2, {', '.join(LANGUAGE_CLASSES)}",
    )
    return getattr(transformers, LANGUAGE_CLASSES[kind]).from_dict(raw)


def _tower_config(setting: Assembly, raw: dict[str, Any]) -> Any:
    from transformers import CLIPVisionConfig

    kind = raw.get("model_type")
    values = raw if kind == "clip_vision_model" else raw.get("vision_config", {})
    known = kind == "clip" or values.get("model_type") == "clip_vision_model"
    require(known, f"{setting.vision.path} is a {kind!r} model, not CLIP and none with a CLIP tower")
    drop = ("model_type", "dtype", "torch_dtype", "architectures", "transformers_version")
    config = CLIPVisionConfig(**{k: v for k, v in values.items() if k not in drop})
    require(
        config.image_size % config.patch_size == 0,
        f"image_size {config.image_size} of {setting.vision.path} is no multiple of its patch_size "
        f"{config.patch_size}",
    )
    require(
        -config.num_hidden_layers - 1 <= setting.vision_feature_layer,
        f"vision_feature_layer {setting.vision_feature_layer}: the tower of {setting.vision.path} has "
        f"{config.num_hidden_layers} layers",
    )
    return config


def _config(setting: Assembly, text: Any, tower: Any, image_id: int) -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=image_id,
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=setting.vision_feature_layer,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def targets(config: Any) -> list[tuple[str, Part, tuple[int, ...]]]:
    """(name in the checkpoint, part, shape) of every tensor of the new model."""
    parts: dict[str, Part] = {
        "model.vision_tower.": "vision tower",
        "model.multi_modal_projector.": "projector",
    }
    found: list[tuple[str, Part, tuple[int, ...]]] = []
    for name, shape in expected_shapes(config).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        old, new = next((a, b) for a, b in RENAMED.items() if name.startswith(a))
        found.append((name.replace(old, new, 1), parts.get(old, "language model"), shape))
    return found


def _takes(config: Any, vision: Checkpoint, fused: Any | None) -> list[Take]:
    """fused: the text config when the language donor has InternLM2's layout."""
    prefix = next((p for p in TOWER_PREFIXES if p + TOWER_FIRST in vision.tensors), None)
    require(
        prefix is not None, f"{vision.folder} has no CLIP vision tower ({TOWER_FIRST} under no known prefix)"
    )
    takes = []
    for target, part, shape in targets(config):
        source, pick = None, None
        if part == "vision tower":
            source = prefix + target.removeprefix("vision_tower.vision_model.")
        elif part == "language model":
            source = target.removeprefix("language_model.")
            if fused is not None:
                source, pick = internlm.source_of(source, fused)
        takes.append(Take(target, part, shape, source, pick))
    return takes


def _save_processor(
    setting: Assembly, tokenizer: Any, vision: Path, tower: Any, folder: Path
) -> dict[str, Any]:
    """Tokenizer of the language donor, and an image processor with the tower's size that pads to a square."""
    from transformers import CLIPImageProcessor, LlavaImageProcessor, LlavaProcessor

    theirs = CLIPImageProcessor.from_pretrained(vision)
    crop = theirs.crop_size["height"]
    require(crop == tower.image_size,
            f"{paths.shown(vision)}: the image processor makes {crop} pixels, the tower expects {tower.image_size}"
            )  # fmt: skip
    side = {"height": tower.image_size, "width": tower.image_size}
    images = LlavaImageProcessor(do_pad=True, size={"shortest_edge": tower.image_size}, crop_size=side,
                                 image_mean=theirs.image_mean, image_std=theirs.image_std)  # fmt: skip
    template = CHAT_TEMPLATE.read_text(encoding="utf-8").replace("IMAGE_TOKEN", setting.image_token)
    tokenizer.chat_template = template
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=tower.patch_size, chat_template=template,
        vision_feature_select_strategy="default", image_token=setting.image_token,
        num_additional_image_tokens=1,  # the class token, which "default" then leaves out
    ).save_pretrained(folder)  # fmt: skip
    pixels = tower.image_size**2
    return {"min_pixels": pixels, "max_pixels": pixels,
            "max_image_tokens": (tower.image_size // tower.patch_size) ** 2,
            "image_token": setting.image_token}  # fmt: skip
