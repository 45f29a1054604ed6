"""A donor's safetensors on disk: what is in them by their headers, and one tensor at a time.

Everything that can be wrong with a download is found here, before anything is copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caprl_utils.errors import UserError
from caprl_utils.hashing import file_hash, value_hash
from caprl_utils.paths import shown

if TYPE_CHECKING:
    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = "pytorch_model"  # pytorch_model.bin, and pytorch_model-00001-of-00002.bin
CONVERT = (
    "pickled weights are not opened here. If you trust them, save them once as safetensors and name that folder "
    "(with AutoModel and AutoProcessor of transformers: `X.from_pretrained(SOURCE).save_pretrained(FOLDER)`), or "
    "name a `revision` that has safetensors (on the hub often refs/pr/NUMBER, under Community)"
)
FETCH_AGAIN = "the download was interrupted: fetch it again (the hub client continues where it stopped)"


@dataclass(frozen=True)
class Stored:
    """One tensor as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a model folder. Opening reads headers only.

    wanted: prefixes of the tensors needed; shards that hold none of them need not be there. None: all.
    Raises UserError for a missing, cut or foreign file, naming it.
    """

    def __init__(self, folder: Path, wanted: Iterable[str] | None = None) -> None:
        self.folder = folder
        prefixes = None if wanted is None else tuple(wanted)
        self.tensors: dict[str, Stored] = {}
        for file, names in _files(folder).items():
            if prefixes and names is not None and not any(n.startswith(prefixes) for n in names):
                continue
            found = _header(folder / file)
            if names is not None and (lost := names - set(found)):
                raise UserError(
                    f"{shown(folder / file)} lacks {len(lost)} tensors that {INDEX} promises, {min(lost)} "
                    f"among them; index and shards are of different checkpoints: fetch the model again"
                )
            self.tensors |= {n: s for n, s in found.items() if not prefixes or n.startswith(prefixes)}
        self._open: tuple[Path, object] | None = None

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on CPU. The last file stays open, so reading in file order is cheap."""
        from safetensors import safe_open

        file = self.tensors[name].file
        if self._open is None or self._open[0] != file:
            self._open = None  # unmaps the file before
            self._open = (file, safe_open(file, "pt"))
        return self._open[1].get_tensor(name)

    def close(self) -> None:
        """Unmap the file that is open."""
        self._open = None

    def content_hash(self) -> str:
        """Hash of the files that hold the tensors, and of config.json."""
        files = sorted({s.file for s in self.tensors.values()} | {self.folder / "config.json"})
        return value_hash({f.name: file_hash(f) for f in files})


def _files(folder: Path) -> dict[str, set[str] | None]:
    """File name -> tensors that it should hold (None: whatever is in it)."""
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{shown(folder / INDEX)} cannot be read ({error}); {FETCH_AGAIN}") from None
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            files.setdefault(file, set()).add(name)
        return dict(sorted(files.items()))
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    raise UserError(_why_no_weights(folder))


def _why_no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"no model folder {shown(folder)}"
    if any(folder.glob("*.incomplete")) or any(folder.glob("model-*-of-*.safetensors")):
        return f"{shown(folder)} has parts of a model but no {INDEX}; {FETCH_AGAIN}"
    if pickled := sorted(folder.glob(f"{PICKLED}*.bin")):
        return f"{shown(folder)} has no safetensors, pickled weights only ({pickled[0].name}): {CONVERT}"
    return f"{shown(folder)} has no {SINGLE} and no {INDEX}; is it a model folder?"


def _header(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"missing shard {shown(file)}, which {INDEX} names; {FETCH_AGAIN}")
    with open(file, "rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            raise UserError(f"{shown(file)} is a git-lfs pointer, not the weights: run `git lfs pull` there")
    try:
        with safe_open(file, "pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {n: Stored(file, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except SafetensorError as error:
        size = file.stat().st_size
        raise UserError(f"{shown(file)} ({size} bytes) is cut or damaged ({error}); {FETCH_AGAIN}") from None
