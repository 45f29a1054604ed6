"""The small models of the zoo: real classes of transformers, a million parameters each, real processors.

Sizes follow what trying showed (reports/lab-log.md): 4 heads of 32 and untied embeddings, without which the reader's
copying circuit does not appear.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from caprl_utils.mini.tokenizer import SPECIAL, build_tokenizer, shared_tokenizer

if TYPE_CHECKING:
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2ForCausalLM,
        Qwen2VLImageProcessor,
    )

WIDTH, LAYERS, HEADS, MLP = 128, 5, 4, 256
VISION_WIDTH, VISION_LAYERS, VISION_MLP = 128, 4, 256
PATCH, MERGE = 14, 2
IMAGE_PIXELS = 140 * 140  # 25 visual tokens
_SIZE = {"shortest_edge": IMAGE_PIXELS, "longest_edge": IMAGE_PIXELS}
_SHAPE = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}


def _special_id(token: str) -> int:
    return SPECIAL.index(token)


def text_config(max_positions: int = 1024) -> dict:
    """Shared shape of the language models (Qwen2 and the text half of Qwen2.5-VL)."""
    return {
        "vocab_size": len(shared_tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": False,
        "bos_token_id": _special_id("<|endoftext|>"),
        "eos_token_id": _special_id("<|im_end|>"),
        "pad_token_id": _special_id("<|endoftext|>"),
    }


def build_language_model(seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 language model with fresh weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(**text_config(), rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    )


def build_vlm(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL model with fresh weights: 140 x 140 pixels become 25 visual tokens."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    text = text_config() | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": VISION_LAYERS,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": VISION_MLP,
        "num_heads": HEADS,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": WIDTH,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=_special_id("<|image_pad|>"),
        video_token_id=_special_id("<|video_pad|>"),
        vision_start_token_id=_special_id("<|vision_start|>"),
        vision_end_token_id=_special_id("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


@functools.lru_cache
def image_processor() -> Qwen2VLImageProcessor:
    """The real image processor, at 140 x 140 pixels; one object, because lessons use it at every step."""
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(size=_SIZE, **_SHAPE)


def build_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> Qwen2_5_VLProcessor:
    """The real processor: image and video halves, the image size fixed at 140 x 140, our tokenizer (the shared
    one unless a model has its own).
    """
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    tokenizer = tokenizer or build_tokenizer()
    return Qwen2_5_VLProcessor(
        image_processor=image_processor(),
        video_processor=Qwen2VLVideoProcessor(size=_SIZE, **_SHAPE),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def widen(model, words: int):
    """The model with so many more words; they start as the mean of the others, which keeps them unlikely."""
    model.resize_token_embeddings(len(shared_tokenizer()) + words, mean_resizing=False)
    import torch

    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.lm_head.weight):
            table[-words:] = table[:-words].mean(0)
    return model


def prepare_generation(model) -> None:
    """Generation defaults that serving and training read: end of turn, padding, plain sampling."""
    model.generation_config.eos_token_id = [_special_id("<|im_end|>"), _special_id("<|endoftext|>")]
    model.generation_config.pad_token_id = _special_id("<|endoftext|>")
    model.generation_config.bos_token_id = _special_id("<|endoftext|>")
