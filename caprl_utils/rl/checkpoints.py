"""Checkpoints that are known to be whole: a marker file, written last, says so."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from caprl_utils.files import write_json

MARKER = "complete.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def mark_complete(folder: Path) -> None:
    """Flush a checkpoint's files to disk, then write its marker."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    write_json(folder / MARKER, {str(f.relative_to(folder)): f.stat().st_size for f in files})


def step_of(folder: Path) -> int:
    """The number in checkpoint-<number>."""
    return int(_NAME.match(folder.name)[1])


def all_checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, whole or not, the oldest first."""
    return sorted((f for f in folder.glob("checkpoint-*") if f.is_dir() and _NAME.match(f.name)), key=step_of)


def last_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Half-written ones (a kill while saving) are deleted."""
    whole = []
    for checkpoint in all_checkpoints(folder):
        if (checkpoint / MARKER).is_file():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return whole[-1] if whole else None


def delete_all(folder: Path) -> None:
    """Delete every checkpoint of a finished run."""
    for checkpoint in all_checkpoints(folder):
        shutil.rmtree(checkpoint)
