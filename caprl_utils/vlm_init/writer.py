"""Weights from donors to a new folder, one tensor at a time, one shard in memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from caprl_utils.files import full_disk_as_user_error, write_json
from caprl_utils.schema import Projector
from caprl_utils.vlm_init.checkpoint import INDEX, SINGLE
from caprl_utils.vlm_init.plan import Plan, Take
from caprl_utils.vlm_init.projector import checksum, fresh

if TYPE_CHECKING:
    import torch

SHARD = "model-{number:05d}-of-{count:05d}.safetensors"


def write_weights(
    plan: Plan, folder: Path, dtype: torch.dtype, projector: Projector, max_shard_bytes: int
) -> str:
    """Write all tensors of the plan as safetensors shards with their index; returns the projector's checksum.

    Tensors go in the order of the donors' files, so each file is mapped once. Memory: one shard of the output and
    the mapped pages of one donor file. Raises UserError on a full disk.
    """
    from safetensors.torch import save_file

    shards = _shards(plan, dtype.itemsize, max_shard_bytes)
    weight_map, total, drawn = {}, 0, {}
    shapes = {t.target: t.shape for t in plan.takes if t.source is None}
    for number, takes in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else SHARD.format(number=number, count=len(shards))
        tensors = {}
        for take in takes:
            tensors[take.target] = _tensor(plan, take, shapes, projector).to(dtype).contiguous()
            if take.source is None:
                drawn[take.target] = tensors[take.target]
        with full_disk_as_user_error(folder / name):
            save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        tensors.clear()
    for donor in plan.donors.values():
        donor.close()
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return checksum(drawn)


def _tensor(plan: Plan, take: Take, shapes: dict, projector: Projector) -> torch.Tensor:
    if take.source is None:
        return fresh(take.target, shapes, projector)
    tensor = plan.donors[take.part].read(take.source)
    return tensor if take.pick is None else take.pick(tensor)


def _shards(plan: Plan, item_bytes: int, max_shard_bytes: int) -> list[list[Take]]:
    """Takes in the order of the donors' files, cut into shards (a single tensor may be larger than the limit)."""
    shards: list[list[Take]] = [[]]
    filled = 0
    for take in _in_file_order(plan):
        size = item_bytes * prod(take.shape)
        if filled and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(take)
        filled += size
    return shards


def _in_file_order(plan: Plan) -> Iterator[Take]:
    def place(take: Take) -> tuple[int, str, str]:
        if take.source is None:
            return (2, "", take.target)
        part = 0 if take.part == "language model" else 1
        return (part, plan.donors[take.part].tensors[take.source].file.name, take.target)

    yield from sorted(plan.takes, key=place)


def stored_bytes(folder: Path) -> int:
    """Size of the weights of a model folder on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
