"""The plan of an assembly: for every tensor of the new model, where it comes from. Made before any is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from caprl_utils.errors import UserError
from caprl_utils.vlm_init.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

Part = Literal["language model", "vision tower", "projector"]
PARTS: tuple[Part, ...] = ("language model", "vision tower", "projector")


@dataclass(frozen=True)
class Take:
    """One tensor of the new model. source None: drawn afresh. pick: the part of a fused tensor that is meant."""

    target: str
    part: Part
    shape: tuple[int, ...]
    source: str | None = None
    pick: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass
class Plan:
    """All that an assembly writes: config, tensors, and how the tokenizer and processor are saved."""

    config: Any
    takes: list[Take]
    donors: dict[Part, Checkpoint]
    save_processor: Callable[[Any], dict[str, Any]]  # folder -> what was saved, for the summary
    agreed: dict[str, Any]
    notes: list[str]
    left_out: dict[str, int]  # what of the donors is not used -> number of parameters

    def check(self) -> None:
        """Every tensor has exactly one source of the right shape. Raises UserError naming the first that has not."""
        import torch

        for take in self.takes:
            if take.source is None:
                continue
            donor = self.donors[take.part]
            if take.source not in donor.tensors:
                raise UserError(
                    f"{donor.folder} has no tensor {take.source}, which the {take.part} of the new model needs "
                    f"({take.target}); does its config.json belong to these weights?"
                )
            stored = donor.tensors[take.source].shape
            if take.pick is not None:
                stored = tuple(take.pick(torch.empty(stored, device="meta")).shape)
            if stored != take.shape:
                raise UserError(
                    f"{take.source} in {donor.tensors[take.source].file} has shape {list(stored)}, the new model "
                    f"needs {list(take.shape)} for {take.target}; does config.json belong to these weights?"
                )
        twice = [name for name, count in Counter(t.target for t in self.takes).items() if count > 1]
        if twice:
            raise UserError(f"tensor {twice[0]} would be written twice")

    def parameters(self) -> dict[Part, int]:
        """Number of parameters of each part."""
        return {part: sum(prod(t.shape) for t in self.takes if t.part == part) for part in PARTS}


def unused(donor: Checkpoint, takes: Iterable[Take], groups: Mapping[str, str]) -> dict[str, int]:
    """Parameters of a donor that no take reads, by the group of their prefix (longest prefix first)."""
    used = {t.source for t in takes}
    counts: Counter[str] = Counter()
    for name, stored in donor.tensors.items():
        if name not in used:
            group = next((g for prefix, g in groups.items() if name.startswith(prefix)), name)
            counts[group] += prod(stored.shape)
    return dict(counts)


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of the class that `config` describes, built on the meta device."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied ones stand once
