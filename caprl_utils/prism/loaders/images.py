"""Images of samples: found inside their root, opened late, and never larger than a limit."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_PIXELS = 100_000_000  # ours: above every benchmark's images, below what fills a memory


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


def open_image(source: Any, where: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """An RGB image from a path, bytes, base64 text, a {bytes, path} record or a PIL image.

    Raises UserError for what is no image, for none at all, and for one with more than `max_pixels`.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        image = source
    else:
        data = _source_of(source, where)
        try:
            image = Image.open(data)
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
            raise UserError(f"{where}: not a readable image ({error})") from error
    width, height = image.size
    if width * height > max_pixels:
        raise UserError(f"{where}: image of {width} x {height} pixels is above the limit of {max_pixels}")
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # a truncated file fails here, not on opening
        raise UserError(f"{where}: the image cannot be decoded ({error})") from error


def _source_of(source: Any, where: str) -> Path | io.BytesIO:
    if isinstance(source, Mapping):  # the storage form of `datasets.Image`
        if source.get("bytes") is not None:
            return io.BytesIO(source["bytes"])
        raise UserError(f"{where}: the data hold only a path of the image ({source.get('path')!r}), no bytes")
    if isinstance(source, Path):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(bytes(source))
    if isinstance(source, str) and source:
        try:
            return io.BytesIO(base64.b64decode(source.split(",", 1)[-1], validate=True))
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{where}: the image text is not base64") from error
    raise UserError(f"{where}: no image in the row")
