"""The small models of the zoo: real classes of transformers, a million parameters each, real processors.

Sizes follow what trying showed (reports/lab-log.md): 4 heads of 32 and untied embeddings, without which the reader's
copying circuit does not appear.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import transformers as hf
from torch import nn

from caprl_utils.mini.tokenizer import SPECIAL, build_tokenizer, shared_tokenizer

WIDTH, LAYERS, HEAD = 128, 5, 32
SIDE = 196  # pixels: 49 visual tokens
CLIP_WIDTH = 64
_IDS = {name: SPECIAL.index(token) for name, token in (
    ("bos_token_id", "<|endoftext|>"), ("eos_token_id", "<|im_end|>"), ("pad_token_id", "<|endoftext|>"))}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_IMAGES = {"size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}, "patch_size": 14, "merge_size": 2,
           "temporal_patch_size": 2}  # fmt: skip


def text_config(width: int = WIDTH, layers: int = LAYERS) -> dict:
    """Shared shape of the language models (Qwen2 and the text half of Qwen2.5-VL)."""
    return {
        "vocab_size": len(shared_tokenizer()), "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": layers, "num_attention_heads": width // HEAD, "num_key_value_heads": width // HEAD,
        "max_position_embeddings": 1024, "tie_word_embeddings": False, **_IDS,
    }  # fmt: skip


def build_language_model(seed: int, width: int = WIDTH, layers: int = LAYERS) -> hf.Qwen2ForCausalLM:
    """A Qwen2 language model with fresh weights."""
    torch.manual_seed(seed)
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**text_config(width, layers), rope_parameters=dict(_ROPE)))


def build_vlm(
    seed: int, width: int = WIDTH, layers: int = LAYERS, vision_layers: int = 6
) -> hf.Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL model with fresh weights: 196 x 196 pixels become 49 visual tokens."""
    torch.manual_seed(seed)
    vision = {
        "depth": vision_layers, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": width, "window_size": 112,
        "fullatt_block_indexes": list(range(vision_layers)),
    }  # fmt: skip
    text = text_config(width, layers) | {"rope_parameters": _ROPE | {"mrope_section": [4, 6, 6]}}
    tokens = {f"{n}_token_id": SPECIAL.index(f"<|{n}_pad|>") for n in ("image", "video")}
    tokens |= {f"vision_{n}_token_id": SPECIAL.index(f"<|vision_{n}|>") for n in ("start", "end")}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    )


@functools.lru_cache
def image_processor() -> hf.Qwen2VLImageProcessor:
    """The real image processor, at 196 x 196 pixels; one object, because lessons use it at every step."""
    return hf.Qwen2VLImageProcessor(**_IMAGES)


def build_processor() -> hf.Qwen2_5_VLProcessor:
    """The real processor, the image size fixed at 196 x 196."""
    tokenizer, videos = build_tokenizer(), hf.Qwen2VLVideoProcessor(**_IMAGES)
    return hf.Qwen2_5_VLProcessor(
        image_processor=image_processor(), video_processor=videos, tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip


def prepare_generation(model) -> None:
    """Generation defaults that serving and training read: end of turn, padding, plain sampling."""
    ends = [_IDS["eos_token_id"], _IDS["pad_token_id"]]
    model.generation_config.update(**_IDS | {"eos_token_id": ends})


class ClipReader(nn.Module):
    """A CLIP vision tower (the part of CLIP-ViT-L) and a projector into a language model's (frozen) embeddings.

    Class token, one patch per grid cell, features taken before the last layer, as LLaVA does. The projector is thrown
    away.
    """

    def __init__(self, seed: int, words: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(
            hidden_size=CLIP_WIDTH, intermediate_size=2 * CLIP_WIDTH, num_hidden_layers=5, num_attention_heads=4,
            image_size=SIDE, patch_size=SIDE // 7, projection_dim=CLIP_WIDTH,
        ))  # fmt: skip
        width = words.shape[1]
        self.projector = nn.Sequential(nn.Linear(CLIP_WIDTH, width), nn.GELU(), nn.Linear(width, width))
        nn.init.normal_(self.projector[2].weight, std=0.02)  # tokens start quieter than the words, not louder
        nn.init.zeros_(self.projector[2].bias)
        self.register_buffer("words", words)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, side, side) -> (B * cells, width of the language model)."""
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        return self.projector(hidden[:, 1:]).flatten(0, 1)


@functools.lru_cache
def clip_image_processor() -> hf.CLIPImageProcessor:
    """The real image processor at the tower's size."""
    return hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def save_clip_tower(reader: ClipReader, folder: Path) -> None:
    """The tower alone, in 16 bit, with its image processor."""
    reader.tower.to(torch.float16).save_pretrained(folder)
    clip_image_processor().save_pretrained(folder)
