"""Images from anywhere, one at a time, each either good or set aside with its reason.

Nothing here holds more than one image in memory, and no file outside the source's root is opened.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from caprl_utils.captions.old_sources import RawImage, read_source
from caprl_utils.registry import drawn_source
from caprl_utils.schema import Profile

MINI_WORLD = "mini-world"
MAX_PIXELS = 50_000_000  # ours: beyond it, decoding takes gigabytes; cameras end near 48 million
MAX_ASPECT = 200  # Qwen2.5-VL's image processor refuses more


class BadImage(StrEnum):
    """Why an image was set aside."""

    EMPTY = "empty file"
    NOT_AN_IMAGE = "not an image"
    TRUNCATED = "truncated or corrupt"
    TOO_LARGE = "too many pixels"
    TOO_NARROW = "aspect ratio too large"
    ANIMATED = "animated"
    CMYK = "CMYK colours"
    WRONG_EXTENSION = "extension does not match the content"
    OUTSIDE = "path outside the root"
    UNREADABLE = "cannot be read"
    TOO_SMALL = "too small"
    TOO_PLAIN = "too plain"
    DUPLICATE = "near-duplicate"
    SIMILAR = "near-duplicate by embedding"
    BENCHMARK = "too close to a benchmark image"


@dataclass(frozen=True)
class ImageItem:
    """One image of a source: RGB pixels and what the source knows of it (`meta`).

    data and path: the file as it was, None for rendered images. problem: why it cannot be used; `image` is
    then None.
    """

    id: str
    image: Image.Image | None
    kind: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    data: bytes | None = None
    path: str | None = None
    problem: BadImage | None = None
    detail: str | None = None

    def encoded(self) -> bytes:
        """The file's own bytes, or the pixels as PNG."""
        if self.data is not None:
            return self.data
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG")
        return buffer.getvalue()


def open_images(profile: Profile, split: str = "rl") -> Iterator[ImageItem]:
    """The first `images.num_images` images of the profile's source; bad ones come with their `problem`."""
    settings = profile.images
    if (drawn := drawn_source(settings.source)) is not None:
        for number in range(settings.num_images):
            yield ImageItem(*drawn.image_at(split, number, settings.kinds, profile.seed))
        return
    for number, raw in enumerate(read_source(settings.source, settings.kinds)):
        if number == settings.num_images:
            return
        yield decode(raw)


def decode(raw: RawImage) -> ImageItem:
    """Open one image, or say what is wrong with it."""
    try:
        if raw.problem is not None:
            raise _BadImageError(BadImage(raw.problem))
        image = _decode(raw)
    except _BadImageError as error:
        return ImageItem(raw.id, None, raw.kind, path=raw.path, problem=error.reason, detail=error.detail)
    return ImageItem(raw.id, image, raw.kind, data=raw.data, path=raw.path)


class _BadImageError(Exception):
    def __init__(self, reason: BadImage, detail: object = None) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, None if detail is None else str(detail)[:200]


def look_at_header(raw: RawImage) -> dict[str, Any]:
    """Width, height, problem and detail without decoding: a truncated file is not noticed."""
    found: dict[str, Any] = {"width": None, "height": None, "problem": raw.problem, "detail": None}
    if raw.problem is not None:
        return found
    try:
        found["width"], found["height"] = _open(raw).size
    except _BadImageError as error:
        found |= {"problem": error.reason, "detail": error.detail}
    return found


def _decode(raw: RawImage) -> Image.Image:
    opened = _open(raw)
    try:
        opened.load()
        return _as_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:
        raise _BadImageError(BadImage.TRUNCATED, error) from None


def _open(raw: RawImage) -> Image.Image:
    if not raw.data:
        raise _BadImageError(BadImage.EMPTY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a lower limit
            opened = Image.open(io.BytesIO(raw.data))
    except UnidentifiedImageError:
        raise _BadImageError(BadImage.NOT_AN_IMAGE) from None
    except Image.DecompressionBombError as error:
        raise _BadImageError(BadImage.TOO_LARGE, error) from None
    except Exception as error:  # decoders raise what they like on broken headers
        raise _BadImageError(BadImage.TRUNCATED, error) from None
    _check_header(opened, raw.path)
    return opened


def _check_header(opened: Image.Image, path: str | None) -> None:
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise _BadImageError(BadImage.TOO_LARGE, f"{width} x {height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _BadImageError(BadImage.TOO_NARROW, f"{width} x {height}")
    if getattr(opened, "n_frames", 1) > 1:
        raise _BadImageError(BadImage.ANIMATED, f"{opened.n_frames} frames")
    if opened.mode == "CMYK":
        raise _BadImageError(BadImage.CMYK)
    suffix = Path(path).suffix.lower() if path else ""
    expected = Image.registered_extensions().get(suffix)
    family = {opened.format, "JPEG" if opened.format == "MPO" else opened.format}
    if suffix and expected not in family:
        raise _BadImageError(BadImage.WRONG_EXTENSION, f"{suffix} holds {opened.format}")


def _as_rgb(image: Image.Image) -> Image.Image:
    """RGB pixels; transparent places become white, as a viewer shows them."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    elif image.mode.startswith("I") or image.mode == "F":
        low, high = image.getextrema()
        image = image.point(lambda value: (value - low) * (255 / max(high - low, 1))).convert("L")
    return image.convert("RGB")
