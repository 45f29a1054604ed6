"""Which of LLaMA-Factory's checkpoints are whole: a kill may come while one is written.

Seen from outside, because LLaMA-Factory writes no marker: every file that resuming needs is there and ends
where it should. DeepSpeed's own shards are trusted once `latest`, which it writes last, names them.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

from caprl_utils.models.weights import tensor_shapes
from caprl_utils.rl.policy import checkpoints_in

_JSON = ("config.json", "tokenizer_config.json", "trainer_state.json")
_ZIPPED = ("optimizer.pt", "scheduler.pt")


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None; broken ones are deleted."""
    whole = []
    for checkpoint in checkpoints_in(folder):
        if problem(checkpoint) is None:
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return whole[-1] if whole else None


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    for name in _JSON:
        if not _is_json(checkpoint / name):
            return f"{name} is missing or cut off"
    # the processor comes after trainer_state.json, and a model folder without it cannot be trained on
    if not any(_is_json(checkpoint / name) for name in ("processor_config.json", "preprocessor_config.json")):
        return "the processor's configuration is missing or cut off"
    weights = list(checkpoint.glob("*.safetensors"))
    if not weights:
        return "no weights"
    if broken := [file.name for file in weights if not _is_whole_safetensors(file)]:
        return f"{broken[0]} is cut off"
    if (checkpoint / "latest").is_file():  # DeepSpeed
        return None
    for name in _ZIPPED:
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is missing or cut off"
    if not any(zipfile.is_zipfile(file) for file in checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing or cut off"
    return None


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_whole_safetensors(file: Path) -> bool:
    """Whether the file is as long as its head says."""
    from safetensors import SafetensorError

    try:
        tensor_shapes(file)
    except SafetensorError:
        return False
    return True
