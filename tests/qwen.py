"""The real tokenizer, chat templates and image processor of Qwen2.5 and Qwen2.5-VL before tiny random models.

Folders have the hub's files. The tokenizer comes with `make setup` (requirements/tokenizer.sh).
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf

from caprl_utils import paths

TOKENIZER = paths.ROOT / ".tools" / "tokenizer-qwen2.5"
VOCABULARY = 151_936  # rows of the embedding of Qwen2.5 and Qwen2.5-VL up to 3B
ENDS = {"bos_token_id": 151_643, "eos_token_id": [151_645, 151_643], "pad_token_id": 151_643}
IDS = {"vision_start_token_id": 151_652, "vision_end_token_id": 151_653, "image_token_id": 151_655,
       "video_token_id": 151_656}  # fmt: skip
PREPROCESSOR = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip
VLM_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_folder() -> Path:
    """The tokenizer's folder; the test is skipped without it, and fails in CI."""
    if not (TOKENIZER / "tokenizer.json").is_file():
        reason = "no tokenizer of Qwen2.5: requirements/tokenizer.sh fetches it (needs npm)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return TOKENIZER


def _text(width: int) -> dict:
    return {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": width // 32, "num_key_value_heads": 1, "max_position_embeddings": 32_768,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, **ENDS,
    }  # fmt: skip


def _save(model, folder: Path) -> Path:
    """The model in the hub's layout, with the tokenizer and the end tokens of the instruct models."""
    model.generation_config = hf.GenerationConfig(**ENDS)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder)
    return folder


def save_reader(folder: Path, width: int = 64, seed: int = 0) -> Path:
    """A random Qwen2.5: 2 layers, heads of 32."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return _save(hf.Qwen2ForCausalLM(hf.Qwen2Config(**_text(width), rope_parameters=rope)), folder)


def save_vlm(folder: Path, width: int = 64, seed: int = 0) -> Path:
    """A random Qwen2.5-VL with the same language half and a tower of two layers."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": width, "window_size": 112,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = _text(width) | {"rope_parameters": rope}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **IDS)
    _save(hf.Qwen2_5_VLForConditionalGeneration(config), folder)
    return add_processor(folder)


def add_processor(folder: Path) -> Path:
    """Qwen2.5-VL's image processor and chat template beside a model."""
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": VLM_TEMPLATE}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": VLM_TEMPLATE}))
    return folder
