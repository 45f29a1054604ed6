"""Which images are worth a question: large enough, not plain, not seen before (paper, appendix D).

The paper removes near-duplicates, low resolution and too simple images, without numbers; the limits here are ours.
Perceptual hashes find copies: scaled, recompressed or slightly edited, but not charts of other numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import imagehash
import numpy as np
from PIL.Image import Image

from caprl_utils.images import ImageItem

MIN_SIDE = 56  # pixels; ours: two visual tokens of Qwen2.5-VL
MIN_SPREAD = 4.0  # ours: standard deviation of the grey values (0 to 255); below it there is nothing to ask
HASH_SIDE = 16  # ours: 256 bits; the usual 64 cannot tell two charts of one style apart
MAX_DISTANCE = 8  # ours: bits of 256 in which copies may differ


class DuplicateFinder:
    """Finds hashes near one seen before, in time that hardly grows with their number.

    A hash is cut into bands of 16 bits. Hashes that differ in 8 bits differ in at most 8 bands, so of any
    nine bands one is equal, and looking up nine finds every neighbour.
    """

    def __init__(self, known: Iterable[tuple[str, str]] = ()) -> None:
        """known: (name, hash) pairs to start from, for example of benchmark images."""
        self._seen: dict[tuple[int, str], list[tuple[str, int]]] = {}
        for name, phash in known:
            self.add(name, phash)

    def add(self, name: str, phash: str) -> None:
        """Remember a hash (hex digits)."""
        one = name, int(phash, 16)
        for band in self._bands(phash):
            self._seen.setdefault(band, []).append(one)

    def nearest(self, phash: str) -> str | None:
        """Name of a remembered image that this one copies, or None."""
        value, there = int(phash, 16), (one for band in self._bands(phash) for one in self._seen.get(band, ()))
        return next((name for name, other in there if (value ^ other).bit_count() <= MAX_DISTANCE), None)

    @staticmethod
    def _bands(phash: str) -> list[tuple[int, str]]:
        return [(band, phash[-4 * band :][:4]) for band in range(1, MAX_DISTANCE + 2)]


def perceptual_hash(image: Image) -> str:
    """64 hex digits; pictures that look alike differ in few bits."""
    return str(imagehash.phash(image, hash_size=HASH_SIDE))


def check_image(item: ImageItem, seen: DuplicateFinder, benchmarks: DuplicateFinder) -> dict[str, Any]:
    """An image's row with the reason why it is set aside; a good one (None) is remembered in `seen`."""
    width, height = item.image.size if item.image is not None else (None, None)
    row = {"id": item.id, "kind": item.kind, "width": width, "height": height, "phash": None}
    if item.problem is not None:
        return row | {"reason": item.problem.reason, "detail": item.problem.detail}
    if min(width, height) < MIN_SIDE:
        return row | {"reason": "too small", "detail": f"{width} x {height}"}
    spread = float(np.asarray(item.image.convert("L"), dtype=np.float32).std())
    if spread < MIN_SPREAD:
        return row | {"reason": "too plain", "detail": f"grey values spread by {spread:.1f}"}
    row["phash"] = phash = perceptual_hash(item.image)
    for finder, reason in ((benchmarks, "too close to a benchmark image"), (seen, "near-duplicate")):
        if (copy := finder.nearest(phash)) is not None:
            return row | {"reason": reason, "detail": copy}
    seen.add(item.id, phash)
    return row | {"reason": None, "detail": None}
