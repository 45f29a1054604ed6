"""Which images are worth a question: large enough, not plain, not seen before (paper, appendix D).

The paper removes near-duplicates by SemDeDup-style clusters, low resolution and too simple images, without
numbers; the limits here are ours. Perceptual hashes find copies: the same picture scaled, recompressed or
slightly edited. Two charts that differ in their numbers alone have different hashes.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import imagehash
import numpy as np
from PIL.Image import Image

from caprl_utils.images import BadImage, ImageItem
from caprl_utils.records import Row

MIN_SIDE = 56  # pixels; ours: two visual tokens of Qwen2.5-VL
MIN_SPREAD = 4.0  # ours: standard deviation of the grey values (0 to 255); below it there is nothing to ask
HASH_SIDE = 16  # ours: 256 bits; the usual 64 cannot tell two charts of one style apart
MAX_DISTANCE = 8  # ours: bits of 256 in which copies may differ
_BAND_BITS = 16


class Unwanted(StrEnum):
    """Why a sound image is set aside."""

    TOO_SMALL = "too small"
    TOO_PLAIN = "too plain"
    DUPLICATE = "near-duplicate"
    BENCHMARK = "too close to a benchmark image"


class CheckedImage(Row):
    """What the image checks found; ``reason`` says why an image was set aside."""

    id: str
    kind: str | None
    width: int | None
    height: int | None
    phash: str | None  # 64 hex digits, 256 bits
    reason: str | None
    detail: str | None = None


class DuplicateFinder:
    """Finds hashes near one seen before, in time that hardly grows with their number.

    A hash is cut into bands of 16 bits. Hashes that differ in 8 bits differ in at most 8 bands, so of any
    nine bands one is equal, and looking up nine finds every neighbour.
    """

    def __init__(self, known: Iterable[tuple[str, str]] = ()) -> None:
        """known: (name, hash) pairs to start from, for example of benchmark images."""
        self._hashes: list[tuple[str, int]] = []
        self._bands: list[dict[int, list[int]]] = [{} for _ in range(MAX_DISTANCE + 1)]
        for name, phash in known:
            self.add(name, phash)

    def add(self, name: str, phash: str) -> None:
        """Remember a hash (hex digits)."""
        value = int(phash, 16)
        for band, places in zip(self._split(value), self._bands, strict=False):
            places.setdefault(band, []).append(len(self._hashes))
        self._hashes.append((name, value))

    def nearest(self, phash: str) -> str | None:
        """Name of a remembered image that this one copies, or None."""
        value = int(phash, 16)
        tried: set[int] = set()
        for band, places in zip(self._split(value), self._bands, strict=False):
            for place in places.get(band, ()):
                if place not in tried:
                    tried.add(place)
                    name, other = self._hashes[place]
                    if (value ^ other).bit_count() <= MAX_DISTANCE:
                        return name
        return None

    @staticmethod
    def _split(value: int) -> list[int]:
        count = HASH_SIDE * HASH_SIDE // _BAND_BITS
        return [(value >> (_BAND_BITS * band)) & ((1 << _BAND_BITS) - 1) for band in range(count)]


def perceptual_hash(image: Image) -> str:
    """64 hex digits; pictures that look alike differ in few bits."""
    return str(imagehash.phash(image, hash_size=HASH_SIDE))


def check_image(item: ImageItem, seen: DuplicateFinder, benchmarks: DuplicateFinder) -> CheckedImage:
    """One image's row; a good one is remembered in `seen`."""
    if item.problem is not None:
        return _row(item, item.problem, item.detail)
    width, height = item.image.size
    if min(width, height) < MIN_SIDE:
        return _row(item, Unwanted.TOO_SMALL, f"{width} x {height}")
    spread = float(np.asarray(item.image.convert("L"), dtype=np.float32).std())
    if spread < MIN_SPREAD:
        return _row(item, Unwanted.TOO_PLAIN, f"grey values spread by {spread:.1f}")
    phash = perceptual_hash(item.image)
    if (copy := benchmarks.nearest(phash)) is not None:
        return _row(item, Unwanted.BENCHMARK, copy, phash)
    if (copy := seen.nearest(phash)) is not None:
        return _row(item, Unwanted.DUPLICATE, copy, phash)
    seen.add(item.id, phash)
    return _row(item, None, None, phash)


def _row(
    item: ImageItem, reason: BadImage | Unwanted | None, detail: str | None = None, phash: str | None = None
) -> CheckedImage:
    width, height = item.image.size if item.image is not None else (None, None)
    return CheckedImage(
        id=item.id, kind=item.kind, width=width, height=height, phash=phash, reason=reason, detail=detail
    )
