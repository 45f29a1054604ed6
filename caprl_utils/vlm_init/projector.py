"""The fresh projector: a seeded draw that does not depend on the order of tensors, and its checksum."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from caprl_utils.schema import Projector

if TYPE_CHECKING:
    import torch


def fresh(name: str, shapes: Mapping[str, tuple[int, ...]], how: Projector) -> torch.Tensor:
    """The first value of one projector tensor, float32.

    name: as stored, e.g. "visual.merger.mlp.0.weight". shapes: of all projector tensors (a bias of `torch` needs
    the width of its layer). Norms start at one (and zero bias); linear layers as `how` says: `normal` is
    normal(0, std) with zero bias, `torch` is uniform within 1/sqrt(fan_in) for weight and bias, as nn.Linear.
    """
    import torch

    shape = shapes[name]
    stem, kind = name.rsplit(".", 1)
    weight_shape = shapes[f"{stem}.weight"]
    if len(weight_shape) == 1:  # a norm
        return torch.ones(shape) if kind == "weight" else torch.zeros(shape)
    seed = int.from_bytes(hashlib.sha256(f"{how.seed}/{name}".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    if how.initialisation == "torch":
        bound = 1 / math.sqrt(weight_shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if kind == "bias":
        return torch.zeros(shape)
    return torch.empty(shape).normal_(0, how.std, generator=generator)


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over names, shapes and values as stored, sorted by name."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
