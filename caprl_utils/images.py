"""Images: the one way to open a picture, and to write it for others."""

from __future__ import annotations

import io
import posixpath
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from caprl_utils.errors import UserError

MAX_PIXELS = 120_000_000  # ours: above a phone's 108 megapixels; such a picture takes 360 MB
MAX_ASPECT = 200  # Qwen2.5-VL's image processor refuses more
_UNKNOWN_HERE = (".svg", ".svgz", ".heic", ".heif", ".jxl")  # pictures that Pillow does not open
_RUNS_PROGRAMS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}  # of Pillow's formats: stubs, and Ghostscript
_PLAIN_FORMATS = {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Image.Transpose
Thing = TypeVar("Thing")


class BadImage(StrEnum):
    """Why an image cannot be used."""

    EMPTY = "empty file"
    NOT_AN_IMAGE = "not an image"
    TRUNCATED = "truncated or corrupt"
    TOO_LARGE = "too many pixels"
    TOO_NARROW = "aspect ratio too large"
    ANIMATED = "animated"
    OUTSIDE = "path outside the root"
    UNREADABLE = "cannot be read"
    NO_PATH = "names no image"
    NAME = "name that is not UTF-8"
    SAME_ID = "id used by an earlier image"


class BadImageError(UserError):
    """An image that cannot be used: the reason, and what of it is wrong."""

    def __init__(self, reason: BadImage, detail: object = None) -> None:
        self.reason, self.detail = reason, None if detail is None else str(detail)[:200]
        super().__init__(reason if detail is None else f"{reason} ({self.detail})")


def open_image(data: bytes | Path, max_pixels: int | None = None, header: Image.Image | None = None) -> Image.Image:
    """RGB pixels of an image file as a viewer shows them: upright (EXIF), transparent places white, deep grey values
    stretched; scaled down to `max_pixels`. header: what `peek` gave of it. Raises BadImageError, and FileNotFoundError.
    """
    opened = header or peek(data)
    try:
        plain, size = is_plain(opened), opened.width * opened.height
        pixels = fit(opened, max_pixels)
        pixels.load()
    except Exception as error:
        raise BadImageError(BadImage.TRUNCATED, error) from None
    if plain and isinstance(data, bytes) and pixels.width * pixels.height == size:
        pixels.own_file = data, _PLAIN_FORMATS[opened.format]  # for `encode`; no copy of the picture has it
    return pixels


def peek(data: bytes | Path | Any) -> Image.Image:
    """The header of an image file (open or not): size, mode and format, nothing decoded. The only place that opens an
    image. Raises BadImageError, also for more than `MAX_PIXELS`, and FileNotFoundError.
    """
    if data == b"":
        raise BadImageError(BadImage.EMPTY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures (we have a limit) and odd EXIF data
            opened = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_formats()[0])
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(BadImage.NOT_AN_IMAGE) from None
    except Image.DecompressionBombError as error:
        raise BadImageError(BadImage.TOO_LARGE, error) from None
    except Exception as error:  # decoders raise what they like on broken headers
        raise BadImageError(BadImage.TRUNCATED, error) from None
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise BadImageError(BadImage.TOO_LARGE, f"{width} x {height}, the limit is {MAX_PIXELS}")
    return opened


def is_strip(size: tuple[int, int]) -> bool:
    """Whether a picture of this width and height is too narrow for the models."""
    return max(size) > MAX_ASPECT * min(size)


def has_picture_name(name: str) -> bool:
    """Whether a file's suffix is that of a picture, of one that cannot be opened here too."""
    return posixpath.splitext(name)[1].lower() in _formats()[1]


@cache
def _formats() -> tuple[list[str], frozenset[str]]:
    """Pillow's formats that are opened, and the suffixes of picture files."""
    Image.init()
    formats = [name for name in Image.ID if name not in _RUNS_PROGRAMS]
    return formats, frozenset(_UNKNOWN_HERE).union(s for s, name in Image.EXTENSION.items() if name in formats)


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB pixels of any picture of Pillow, as `open_image` gives them; an RGB picture is returned itself."""
    turn = _TURNS.get(orientation(image))
    shown = image if turn is None else image.transpose(turn)
    if shown.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(shown, dtype=np.float64))
        low, high = values.min(), values.max()
        shown = Image.fromarray(np.uint8((values - low) * (255 / max(high - low, 1e-9))))
    elif shown.has_transparency_data:
        rgba = shown.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    shown = shown if shown.mode == "RGB" else shown.convert("RGB")
    if shown is not image:
        shown.info = {}  # or what is upright would be turned again
    return shown


def orientation(image: Image.Image) -> int:
    """EXIF's: 1 stands upright, 5 and more lie on their side."""
    with suppress(Exception):  # broken EXIF data: as if there were none
        return image.getexif().get(0x0112, 1)
    return 1


def fit(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """RGB pixels as a model sees them: an image of more than max_pixels scaled down, its shape kept. The one place
    where `ModelConfig.max_pixels` is obeyed, before any processor or server rounds to its patches.
    """
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return as_rgb(image)
    scale = (max_pixels / (width * height)) ** 0.5
    size = max(1, int(width * scale)), max(1, int(height * scale))
    if hasattr(image, "draft"):
        image.draft(None, size)  # a JPEG is decoded at a half, a quarter or an eighth of its size
    image = as_rgb(image)
    size = size if (image.width > image.height) == (width > height) else size[::-1]  # turned
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def is_plain(opened: Image.Image) -> bool:
    """Whether every program shows the file of `peek` as `open_image` does: usual, nothing to turn, blend or stretch."""
    if opened.format not in _PLAIN_FORMATS or opened.mode not in ("RGB", "L", "P", "1"):
        return False
    moves = opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1
    return not (moves or opened.has_transparency_data or orientation(opened) in _TURNS)


def encode(image: Image.Image) -> tuple[bytes, str]:
    """A file of the pixels and its media type: the one that they were read from where that is plain, else PNG."""
    if own := getattr(image, "own_file", None):
        return own
    buffer = io.BytesIO()
    as_rgb(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue(), "image/png"


@dataclass(eq=False)
class ImageItem:
    """One image of a source; it is read when it is asked for. load: gives the file's bytes, or pixels where there is no
    file; raises BadImageError. key: where the image stands in its source (a path, FILE.parquet#ROW, FILE.tar#MEMBER,
    #ROW). path: the file's name, if it has one. meta: what the source knows of it.
    """

    id: str
    load: Callable[[], bytes | Image.Image]
    key: str = ""
    kind: str | None = None
    path: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def open(self, max_pixels: int | None = None) -> Image.Image:
        """RGB pixels, nothing kept. Raises BadImageError, also for strips and animations (of the pages of a TIFF and
        the parts of a phone's MPO the first is taken).
        """
        data = self.load()
        if isinstance(data, Image.Image):
            return as_rgb(data)
        try:
            opened = peek(data)
        except BadImageError as error:
            suffix = posixpath.splitext(self.path or "")[1].lower()
            if error.reason == BadImage.NOT_AN_IMAGE and suffix in _UNKNOWN_HERE:
                raise BadImageError(error.reason, f"{suffix} is not opened here; convert it to PNG") from None
            raise
        if is_strip(opened.size):
            raise BadImageError(BadImage.TOO_NARROW, f"{opened.width} x {opened.height}")
        if opened.format not in ("MPO", "TIFF") and getattr(opened, "n_frames", 1) > 1:
            raise BadImageError(BadImage.ANIMATED, f"{opened.n_frames} frames")
        return open_image(data, max_pixels, opened)

    @cached_property
    def image(self) -> Image.Image | None:
        """The pixels, kept as long as the item; None where there is a problem."""
        try:
            return self.open()
        except BadImageError as error:
            self._problem = error

    @property
    def problem(self) -> BadImageError | None:
        """Why the image cannot be used."""
        return self._problem if self.image is None else None

    @classmethod
    def failing(cls, name: str, reason: BadImage, detail: object = None, key: str = "") -> ImageItem:
        """An item that stands for what is no image, so that it is counted and named."""

        def load() -> bytes:
            raise BadImageError(reason, detail)

        return cls(name, load, key)


def in_threads(work: Callable[[Thing], Any], things: Iterable[Thing]) -> Iterator[Any]:
    """work(thing) in the order of the things, a few ahead of the reader (decoding frees the interpreter)."""
    source = iter(things)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(work, thing) for thing in islice(source, 16)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(work, thing) for thing in islice(source, 1)]
