"""Images of samples: found inside their root and opened late."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from caprl_utils import images
from caprl_utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


def inside(root: Path, relative: str, where: str) -> Path:
    """The file `relative` names under `root`. Raises UserError if it leaves the root or is missing.

    Args:
        where: file and row, for the message.
    """
    name = relative.removeprefix("file://")
    root = root.resolve()
    path = (root / PurePosixPath(name.replace("\\", "/"))).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"{where}: image {relative!r} lies outside {root}; paths must stay inside it")
    if not path.is_file():
        raise UserError(f"{where}: image {relative!r} is missing, expected at {path}")
    return path


def open_image(source: Any, where: str) -> Image.Image:
    """An RGB image from a path, bytes, base64 text or a {bytes, path} record.

    Raises UserError for what is no image, for none at all, and for one with too many pixels.
    """
    data = _bytes_of(source, where)
    try:
        return images.open_image(data)
    except images.BadImageError as error:
        raise UserError(f"{where}: {error}") from error


def _bytes_of(source: Any, where: str) -> bytes:
    if isinstance(source, Mapping):  # the storage form of `datasets.Image`
        if source.get("bytes") is not None:
            return source["bytes"]
        raise UserError(f"{where}: the data hold only a path of the image ({source.get('path')!r}), no bytes")
    if isinstance(source, Path):
        return source.read_bytes()
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, str) and source:
        try:
            return base64.b64decode(source.split(",", 1)[-1], validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{where}: the image text is not base64") from error
    raise UserError(f"{where}: no image in the row")
