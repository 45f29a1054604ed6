"""InternLM2.5 (or another Llama-like model) + CLIP, as LlavaForConditionalGeneration.

Choices that the paper leaves open, all ours: features of CLIP's last layer but one without the class token and a projector
of two layers with GELU (LLaVA-1.5); pictures padded to a square, because CLIP's own centre crop cuts off the sides of
charts and documents; ``<image>`` and the chat marks on reserved rows of the embedding, so that none is added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.vlm_init import internlm
from caprl_utils.vlm_init.agreement import language_facts, require
from caprl_utils.vlm_init.checkpoint import Checkpoint
from caprl_utils.vlm_init.donors import donor_folder, read_config
from caprl_utils.vlm_init.plan import Part, Plan, Take, expected_shapes, unused
from caprl_utils.vlm_init.settings import Assembly
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
    text, fused = _text_config(setting, language)
    tower = _vision_config(setting, vision)
    depth = tower.num_hidden_layers
    require(-depth - 1 <= setting.vision_feature_layer,
            f"vision_feature_layer {setting.vision_feature_layer}: the tower has {depth} layers")  # fmt: skip
    tokenizer = renamed(fast_tokenizer(language), setting.rename_tokens)
    image_id = tokenizer.get_vocab().get(setting.image_token)
    require(image_id is not None, f"image_token {setting.image_token!r} is not in the tokenizer of "
            f"{setting.language.path}; give a reserved token that name by rename_tokens")  # fmt: skip
    require(max(tokenizer.get_vocab().values()) < text.vocab_size,
            f"the tokenizer of {setting.language.path} has ids beyond vocab_size {text.vocab_size}")  # fmt: skip
    config = _config(setting, text, tower, image_id)
    donors: dict[Part, Checkpoint] = {
        "language model": Checkpoint(language),
        "vision tower": Checkpoint(vision),
    }
    takes = _takes(config, donors["vision tower"], text if fused else None)
    notes = [f"{old} of the tokenizer is now {new}: its embedding is an unused row of the language model"
             for old, new in setting.rename_tokens.items()]  # fmt: skip
    if fused:
        notes.append(
            "InternLM2's fused wqkv is split into Llama's q, k and v; dynamic rope scaling is left out"
        )
    groups = {"text_model.": "CLIP's text half", "language_model.": "the donor's language model"}
    left_out = unused(donors["vision tower"], takes, groups)
    return Plan(config, takes, donors, lambda folder: _save_processor(setting, tokenizer, vision, tower, folder),
                language_facts(text), notes, left_out)  # fmt: skip


def _text_config(setting: Assembly, folder: Path) -> tuple[Any, bool]:
    """(config of a native class, whether the weights are in InternLM2's layout)."""
    import transformers

    raw = read_config(folder)
    kind = raw.get("model_type")
    if kind == "internlm2":
        return internlm.llama_config(raw), True
    require(kind in LANGUAGE_CLASSES, f"{setting.language.path} is a {kind!r} model; a LLaVA takes "
            f"internlm2, {', '.join(LANGUAGE_CLASSES)}")  # fmt: skip
    return getattr(transformers, LANGUAGE_CLASSES[kind]).from_pretrained(folder), False


def _vision_config(setting: Assembly, folder: Path) -> Any:
    from transformers import CLIPVisionConfig

    raw = read_config(folder)
    values = raw if raw.get("model_type") == "clip_vision_model" else raw.get("vision_config", {})
    known = raw.get("model_type") in ("clip", "clip_vision_model") or (
        values.get("model_type") == "clip_vision_model"
    )
    require(
        known,
        f"{setting.vision.path} is a {raw.get('model_type')!r} model, not CLIP or one with a CLIP tower",
    )
    config = CLIPVisionConfig(
        **{k: v for k, v in values.items() if k not in ("model_type", "dtype", "torch_dtype")}
    )
    require(config.image_size % config.patch_size == 0,
            f"image_size {config.image_size} of {setting.vision.path} is no multiple of its patch_size "
            f"{config.patch_size}")  # fmt: skip
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


def _takes(config: Any, vision: Checkpoint, fused: Any | None) -> list[Take]:
    prefix = next((p for p in TOWER_PREFIXES if p + TOWER_FIRST in vision.tensors), None)
    require(
        prefix is not None, f"{vision.folder} has no CLIP vision tower ({TOWER_FIRST} under no known prefix)"
    )
    takes = []
    for name, shape in expected_shapes(config).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        old, new = next((a, b) for a, b in RENAMED.items() if name.startswith(a))
        target, rest = name.replace(old, new, 1), name.removeprefix(old)
        if "projector" in old:
            takes.append(Take(target, "projector", shape))
        elif "vision_tower" in old:
            takes.append(Take(target, "vision tower", shape, prefix + rest))
        else:
            own = name if name.startswith("lm_head.") else f"model.{rest}"
            source, pick = internlm.source_of(own, fused) if fused is not None else (own, None)
            takes.append(Take(target, "language model", shape, source, pick))
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
