"""Where donors come from: a folder, the small zoo, or the hub (only the shards that are needed)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.registry import made_model
from caprl_utils.schema import Donor
from caprl_utils.vlm_init.checkpoint import CONVERT, INDEX, PICKLED, SINGLE

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # configs, tokenizer, processor


def donor_folder(donor: Donor, wanted: Sequence[str]) -> Path:
    """A donor's folder on this machine. wanted: prefixes of the tensors that are needed.

    Raises UserError when it is not there and cannot be fetched, or has no safetensors.
    """
    if (made := made_model(donor.path)) is not None:
        return made
    if donor.path.startswith(paths.ZOO_PREFIX):
        return Path(paths.resolve_model(donor.path))
    if Path(donor.path).is_dir():
        return Path(donor.path)
    return _fetched(donor, wanted)


def _fetched(donor: Donor, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(donor.path, revision=donor.revision, allow_patterns=patterns))

    try:
        folder = fetch(SMALL_FILES)
        folder = fetch([*SMALL_FILES, *_shards(folder, wanted)])
        if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
            raise UserError(_why_no_safetensors(donor))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"donor {donor.path!r} is no folder here and could not be fetched from the hub: {reason}. "
            "Check the name and the network (HF_HUB_OFFLINE must not be set), or name a folder"
        ) from None


def _why_no_safetensors(donor: Donor) -> str:
    """What the hub has of a donor instead. Raises as the hub's client when it cannot be asked."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(donor.path, revision=donor.revision)
    name = f"donor {donor.path!r} at revision {donor.revision or 'main'}"
    if pickled := sorted(f for f in files if f.startswith(PICKLED) and f.endswith(".bin")):
        return f"{name} has no safetensors on the hub, pickled weights only ({pickled[0]}): {CONVERT}"
    return f"{name} has no {SINGLE} and no {INDEX} on the hub; is it a model?"


def _shards(folder: Path, wanted: Sequence[str]) -> list[str]:
    if not (folder / INDEX).is_file():
        return [SINGLE]
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return sorted({file for name, file in weight_map.items() if name.startswith(tuple(wanted))})


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a donor, as it is. Raises UserError when it is missing or cut."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{paths.shown(folder)} has no config.json; is it a model folder?")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{paths.shown(file)} cannot be read ({error}); fetch the model again") from None
