"""What the pictures of the mini world are drawn on: an image that knows where its words stand."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 392  # pixels, both ways; the models see half of it
INK, WHITE, GREY = (25, 25, 25), (255, 255, 255), (110, 110, 110)
FACES = {"sans": "DejaVuSans-Bold.ttf", "serif": "DejaVuSerif-Bold.ttf", "mono": "DejaVuSansMono-Bold.ttf"}
"""Fonts that matplotlib brings along, the same on every machine."""
SIZES = (17, 20, 23, 27, 33)
"""Of letters, in pixels. Few sizes, and places in steps of `STEP` (half a patch of the vision towers): what a tower of
half a million parameters can learn to read in an hour (reports/lab-log.md)."""
STEP = 14

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]


@functools.lru_cache
def font(size: int, face: str = "sans") -> ImageFont.FreeTypeFont:
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FACES[face]
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)  # the other needs a further library


def widest(texts: Iterable[str], size: float = 1, face: str = "sans") -> float:
    """Pixels that the widest of some bold texts takes."""
    return max(font(100, face).getlength(text) for text in texts) * size / 100


def fit(texts: Iterable[str], width: float, most: float, face: str = "sans") -> int:
    """The largest of `SIZES`, at most ``most``, at which every text is at most ``width`` pixels wide."""
    room = min(most, width / widest(texts, 1, face))
    return max((size for size in SIZES if size <= room), default=SIZES[0])


def stepped(pixels: float) -> int:
    """The nearest place of a text."""
    return round(pixels / STEP) * STEP


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever can be read on a colour."""
    return INK if 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 140 else WHITE


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """A colour with ``share`` of another in it."""
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))


def overlap(boxes: Iterable[Box]) -> float:
    """Pixels (area) that pairs of boxes share."""
    return sum(
        max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        for a, b in combinations(boxes, 2)
    )


@dataclass
class Canvas:
    """An image, the places of facts on it (key -> pixels from the top left), and each word with its box."""

    image: Image.Image
    places: dict[str, Point] = field(default_factory=dict)
    boxes: list[tuple[str, Box]] = field(default_factory=list)

    @functools.cached_property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def note(self, text: str, box: Box, key: str = "") -> None:
        """Remember where a text stands; its middle is the place of the fact ``key``."""
        self.boxes.append((text, box))
        if key:
            self.places[key] = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)

    def text(self, xy: Point, text: str, size: int, key: str = "", face="sans", anchor="mm", fill=INK) -> float:
        """Write a text in bold near a place, in the next smaller of `SIZES`; returns its right end."""
        xy, size = (stepped(xy[0]), stepped(xy[1])), max(s for s in SIZES if s <= size)
        how = {"font": font(size, face), "anchor": anchor}
        self.pen.text(xy, text, fill=fill, **how)
        box = self.pen.textbbox(xy, text, **how)
        self.note(text, box, key)
        return box[2]
