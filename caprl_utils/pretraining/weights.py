"""What a stage trained, read from the model folders: parameters per part, and how far each part moved."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from caprl_utils.errors import UserError
from caprl_utils.models.weights import PARTS, part_of, tensor_shapes
from caprl_utils.paths import shown

_LAYOUT = ("model", "language_model", "vision_model")  # levels that one layout has and another has not
_LOGGED = re.compile(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+)")


def tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Tensor name -> (file, shape), from the heads of the safetensors files. A tied head is left out.

    Raises UserError when there are no weights.
    """
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: (file, shape) for name, shape in tensor_shapes(file).items()}
    if not found:
        raise UserError(f"no *.safetensors in {shown(folder)}: that model is not there or not whole")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("tie_word_embeddings"):
        found = {name: entry for name, entry in found.items() if not name.endswith("lm_head.weight")}
    return found


def counts(folder: Path) -> dict[str, int]:
    """Parameters per part."""
    found = dict.fromkeys(PARTS, 0)
    for name, (_, shape) in tensors(folder).items():
        found[part_of(name)] += math.prod(shape)
    return found


def logged_counts(log: Path, start: int = 0) -> tuple[int, int] | None:
    """LLaMA-Factory's last count of (trainable, all) parameters in its log, from byte `start` on; None without one."""
    if not log.is_file():
        return None
    with open(log, "rb") as data:
        data.seek(start)
        found = _LOGGED.findall(data.read().decode("utf-8", errors="replace"))
    return tuple(int(text.replace(",", "")) for text in found[-1]) if found else None


def assert_trainable(log: Path, model: Path, trains: Iterable[str]) -> dict[str, int]:
    """Compare LLaMA-Factory's count of trainable parameters with the parts that should train.

    Returns {"trainable", "all"}. Raises UserError when they differ or the log says nothing.
    """
    logged = logged_counts(log)
    if logged is None:
        raise UserError(f"{shown(log)} does not say how many parameters trained")
    trained, everything = logged
    parts = counts(model)
    wanted, total = sum(parts[part] for part in set(trains)), sum(parts.values())
    if (trained, everything) != (wanted, total):
        raise UserError(
            f"{shown(log)}: {trained:,} of {everything:,} parameters trained, expected {wanted:,} of {total:,} "
            f"({', '.join(sorted(set(trains)))} of {shown(model)}: {parts})"
        )
    return {"trainable": trained, "all": everything}


def changes(before: Path, after: Path) -> dict[str, float]:
    """Part -> how far it moved: norm of the change over norm of the part before. 0.0 means bit for bit the same.

    Tensor by tensor, so memory is that of one. Raises UserError when the two hold different tensors.
    """
    old, new = _by_plain_name(before), _by_plain_name(after)
    if old.keys() != new.keys():
        odd = sorted(old.keys() ^ new.keys())
        raise UserError(f"{shown(before)} and {shown(after)} hold different tensors, first {odd[0]}")
    moved, norm = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    for plain, (name, file) in old.items():
        first, last = _read(file, name), _read(new[plain][1], new[plain][0])
        part = part_of(name)
        moved[part] += float((last - first).square().sum())
        norm[part] += float(first.square().sum())
    return {part: (moved[part] / norm[part]) ** 0.5 if norm[part] else moved[part] for part in PARTS}


def assert_changes(found: Mapping[str, float], trains: Iterable[str]) -> None:
    """Raise UserError when a frozen part moved or a part that should train stood still."""
    for part, moved in found.items():
        if (moved > 0) != (part in set(trains)):
            state = "moved" if moved > 0 else "did not move"
            raise UserError(
                f"the {part} {state} ({moved:.2e} of its norm), but {', '.join(trains)} should train; "
                "the model is not what the stage asked for"
            )


def _by_plain_name(folder: Path) -> dict[str, tuple[str, Path]]:
    """Name without the prefixes in which layouts differ -> (stored name, file)."""
    found = {}
    for name, (file, _) in tensors(folder).items():
        plain = ".".join(piece for piece in name.split(".") if piece not in _LAYOUT)
        found[plain] = (name, file)
    return found


def _read(file: Path, name: str):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as data:
        return data.get_tensor(name).double()
