"""What an assembled model is made of: numbers for a reader and for later stages, kept beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from caprl_utils.errors import UserError
from caprl_utils.paths import shown

FILE = "assembly.json"


class PartSummary(BaseModel):
    """One part: where it comes from and how large it is."""

    model_config = ConfigDict(frozen=True)

    source: str
    tensors: int
    parameters: int


class Summary(BaseModel):
    """The record of one assembly; `assembly.json` of the model folder."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    key: str  # of setting and donors: the same key, the same model
    setting: dict[str, Any]
    architecture: str
    dtype: str
    parts: dict[str, PartSummary]
    parameters: int
    bytes_on_disk: int
    tied_head: bool
    projector_checksum: str
    donor_hashes: dict[str, str]
    agreed: dict[str, Any]
    images: dict[str, Any]
    end_token_ids: list[int]
    left_out: dict[str, int]
    notes: list[str]
    versions: dict[str, str]
    folder: Path

    @classmethod
    def load(cls, folder: Path) -> Summary:
        """Read it from a model folder. Raises UserError when there is none."""
        file = folder / FILE
        if not file.is_file():
            raise UserError(f"{shown(folder)} was not assembled here: it has no {FILE}")
        return cls.model_validate_json(file.read_text(encoding="utf-8")).model_copy(update={"folder": folder})

    def rows(self) -> list[dict[str, Any]]:
        """One row per part, for a table."""
        return [
            {"part": name, "from": part.source, "tensors": part.tensors, "parameters": part.parameters,
             "share": part.parameters / self.parameters}
            for name, part in self.parts.items()
        ]  # fmt: skip

    def text(self) -> str:
        """A few lines for a terminal."""
        width = max(len(name) for name in self.parts)
        lines = [f"{self.setting['name']}: {self.architecture}, {self.dtype}, {shown(self.folder)}"]
        lines += [
            f"  {name:<{width}}  {part.parameters:>14,} parameters in {part.tensors:>4} tensors from {part.source}"
            for name, part in self.parts.items()
        ]
        head = "tied to the embeddings" if self.tied_head else "of its own"
        lines += [
            f"  {'all':<{width}}  {self.parameters:>14,} parameters, {self.bytes_on_disk / 1e6:,.1f} MB; head {head}",
            f"  projector checksum {self.projector_checksum}; images up to {self.images['max_pixels']:,} pixels, "
            f"{self.images['max_image_tokens']:,} tokens; ends with {self.end_token_ids}",
        ]
        lines += [f"  left out: {what}, {number:,} parameters" for what, number in self.left_out.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])
