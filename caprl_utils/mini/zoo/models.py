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
VISION_WIDTH, VISION_LAYERS, VISION_HEADS, VISION_MLP = 128, 6, 4, 256
PATCH, MERGE = 14, 2
SIDE = 196
IMAGE_PIXELS = SIDE * SIDE  # 49 visual tokens
CLIP_SIDE, CLIP_PATCH = SIDE, 28  # one patch is one cell
CLIP_WIDTH, CLIP_MLP, CLIP_LAYERS, CLIP_HEADS = 64, 128, 5, 4
_SIZE = {"shortest_edge": IMAGE_PIXELS, "longest_edge": IMAGE_PIXELS}
_SHAPE = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}


def text_config(width: int = WIDTH, layers: int = LAYERS) -> dict:
    """Shared shape of the language models (Qwen2 and the text half of Qwen2.5-VL)."""
    return {
        "vocab_size": len(shared_tokenizer()), "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": layers, "num_attention_heads": width // HEAD, "num_key_value_heads": width // HEAD,
        "max_position_embeddings": 1024, "tie_word_embeddings": False, "bos_token_id": SPECIAL.index("<|endoftext|>"),
        "eos_token_id": SPECIAL.index("<|im_end|>"), "pad_token_id": SPECIAL.index("<|endoftext|>"),
    }  # fmt: skip


def build_language_model(seed: int, width: int = WIDTH, layers: int = LAYERS) -> hf.Qwen2ForCausalLM:
    """A Qwen2 language model with fresh weights."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**text_config(width, layers), rope_parameters=rope))


def build_vlm(
    seed: int, width: int = WIDTH, layers: int = LAYERS, vision_layers: int = VISION_LAYERS
) -> hf.Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL model with fresh weights: 196 x 196 pixels become 49 visual tokens."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    vision = {
        "depth": vision_layers, "hidden_size": VISION_WIDTH, "intermediate_size": VISION_MLP, "num_heads": VISION_HEADS,
        "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2, "out_hidden_size": width,
        "window_size": 112, "fullatt_block_indexes": list(range(vision_layers)),
    }  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(
        text_config=text_config(width, layers) | {"rope_parameters": rope}, vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=SPECIAL.index("<|image_pad|>"), video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"), vision_end_token_id=SPECIAL.index("<|vision_end|>"),
    ))  # fmt: skip


@functools.lru_cache
def image_processor() -> hf.Qwen2VLImageProcessor:
    """The real image processor, at 196 x 196 pixels; one object, because lessons use it at every step."""
    return hf.Qwen2VLImageProcessor(size=_SIZE, **_SHAPE)


def build_processor() -> hf.Qwen2_5_VLProcessor:
    """The real processor, the image size fixed at 196 x 196."""
    tokenizer = build_tokenizer()
    return hf.Qwen2_5_VLProcessor(
        image_processor=image_processor(),
        video_processor=hf.Qwen2VLVideoProcessor(size=_SIZE, **_SHAPE),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def prepare_generation(model) -> None:
    """Generation defaults that serving and training read: end of turn, padding, plain sampling."""
    model.generation_config.eos_token_id = [SPECIAL.index("<|im_end|>"), SPECIAL.index("<|endoftext|>")]
    model.generation_config.pad_token_id = SPECIAL.index("<|endoftext|>")
    model.generation_config.bos_token_id = SPECIAL.index("<|endoftext|>")


class ClipReader(nn.Module):
    """A CLIP vision tower (the part of CLIP-ViT-L) and a projector into a language model's (frozen) embeddings.

    Class token, one patch per grid cell, features taken before the last layer, as LLaVA does. The projector is thrown
    away.
    """

    def __init__(self, seed: int, words: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(
            hidden_size=CLIP_WIDTH, intermediate_size=CLIP_MLP, num_hidden_layers=CLIP_LAYERS,
            num_attention_heads=CLIP_HEADS, image_size=CLIP_SIDE, patch_size=CLIP_PATCH, projection_dim=CLIP_WIDTH,
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
    side = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    return hf.CLIPImageProcessor(size={"shortest_edge": CLIP_SIDE}, crop_size=side)


def save_clip_tower(reader: ClipReader, folder: Path) -> None:
    """The tower alone, in 16 bit, with its image processor."""
    reader.tower.to(torch.float16).save_pretrained(folder)
    clip_image_processor().save_pretrained(folder)
