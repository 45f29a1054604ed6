"""The real tokenizer, chat templates and image processor of Qwen2.5 and Qwen2.5-VL before tiny random models.

Folders have the hub's files. The tokenizer comes with `make setup` (requirements/tokenizer.sh).
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as hf

from caprl_utils import paths

TOKENIZER = paths.ROOT / ".tools" / "tokenizer-qwen2.5"
VLM_FILES = paths.ROOT / "tests" / "data" / "qwen2.5-vl"
VOCABULARY = 151_936  # rows of the embedding of Qwen2.5 and Qwen2.5-VL up to 3B
ENDS = {"bos_token_id": 151_643, "eos_token_id": [151_645, 151_643], "pad_token_id": 151_643}
IDS = {"vision_start_token_id": 151_652, "vision_end_token_id": 151_653, "image_token_id": 151_655,
       "video_token_id": 151_656}  # fmt: skip


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


def save_reader(folder: Path, **size: int) -> Path:
    """A random Qwen2.5: 2 layers, heads of 32; size: what is otherwise."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return _save(hf.Qwen2ForCausalLM(hf.Qwen2Config(**_text(64) | size, rope_parameters=rope)), folder)


def save_vlm(folder: Path, mrope: Sequence[int] = (4, 6, 6), tower: dict | None = None, **size: int) -> Path:
    """A random Qwen2.5-VL with the same language half and a tower of two layers."""
    torch.manual_seed(0)
    text = _text(64) | size
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [*mrope]}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": text["hidden_size"], "window_size": 112,
        "fullatt_block_indexes": [1], **(tower or {}),
    }  # fmt: skip
    text["rope_parameters"] = rope
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **IDS)
    _save(hf.Qwen2_5_VLForConditionalGeneration(config), folder)
    return add_processor(folder)


def add_processor(folder: Path) -> Path:
    """Qwen2.5-VL's image processor and chat template beside a model."""
    for file in VLM_FILES.iterdir():
        shutil.copy(file, folder)
    settings = folder / "tokenizer_config.json"
    template = json.loads((folder / "chat_template.json").read_text())
    settings.write_text(json.dumps(json.loads(settings.read_text()) | template))
    return folder
