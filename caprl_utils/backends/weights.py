"""What makes a model folder: its weights, config, tokenizer and processor, and their hash."""

from __future__ import annotations

from pathlib import Path

from caprl_utils.hashing import file_hash, value_hash

MODEL_FILES = (
    "*.safetensors*", "config.json", "generation_config.json", "*token*.json", "vocab.json", "merges.txt",
    "*processor*.json", "chat_template.*",
)  # fmt: skip


def files_hash(folder: Path) -> str:
    """Hash of the files that make the model; notes and training logs beside them do not count."""
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    return value_hash({file.name: file_hash(file) for file in files})
