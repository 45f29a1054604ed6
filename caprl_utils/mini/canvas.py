"""What the pictures of the mini world are drawn on: an image that knows where its words stand."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 392  # pixels, both ways; the models see half of it
INK, WHITE, GREY = (25, 25, 25), (255, 255, 255), (110, 110, 110)
FACES = {
    "sans": ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    "serif": ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    "mono": ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    "stix": ("STIXGeneral.ttf", "STIXGeneralBol.ttf"),
    "roman": ("cmss10.ttf", "cmb10.ttf"),
}
"""Families of fonts, regular and bold: those that matplotlib brings along, the same on every machine."""

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]


def font_file(face: str, bold: bool = True) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FACES[face][bold]


@functools.lru_cache
def font(size: int, face: str = "sans", bold: bool = True) -> ImageFont.FreeTypeFont:
    # the basic layout: the other needs a library that some machines lack
    return ImageFont.truetype(font_file(face, bold), size, layout_engine=ImageFont.Layout.BASIC)


def text_width(text: str, size: float, face: str = "sans", bold: bool = True) -> float:
    """Pixels that a text is wide."""
    return font(100, face, bold).getlength(text) * size / 100


def fit(texts: Iterable[str], width: float, most: int, face: str = "sans", bold: bool = True) -> int:
    """The largest size, at most ``most``, at which every text is at most ``width`` pixels wide."""
    return min(most, int(width / max(text_width(text, 1, face, bold) for text in texts)))


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = colour
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else WHITE


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """A colour with ``share`` of another in it."""
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))


def overlap(boxes: Iterable[Box]) -> float:
    """Pixels (area) that pairs of boxes share."""
    return sum(
        max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        for a, b in combinations(list(boxes), 2)
    )


def turned(point: Point, degrees: float, centre: Point = (0, 0)) -> Point:
    """A point after a turn, counterclockwise as one sees it, around a centre (y points down)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = point[0] - centre[0], point[1] - centre[1]
    return centre[0] + cos * x + sin * y, centre[1] - sin * x + cos * y


@functools.lru_cache
def noise(amount: int) -> Image.Image:
    """Fixed grey noise of 512 x 512 pixels around 255 - ``amount`` / 2, to be cropped at a place drawn at random."""
    values = random.Random(amount).randbytes(512 * 512)
    return Image.frombytes("L", (512, 512), values).point(lambda v: 255 - v * amount // 255)


@dataclass
class Canvas:
    """An image, the places of facts on it (key -> pixels from the top left), and each word with its box."""

    image: Image.Image
    places: dict[str, Point] = field(default_factory=dict)
    boxes: list[tuple[str, Box]] = field(default_factory=list)

    @property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def text(
        self, xy: Point, text: str, size: int, fill: Colour = INK, key: str = "", face="sans", bold=True, anchor="mm"
    ) -> Box:
        """Write a text; its middle is the place of the fact ``key``."""
        pen, shape = self.pen, font(size, face, bold)
        pen.text(xy, text, font=shape, fill=fill, anchor=anchor)
        box = pen.textbbox(xy, text, font=shape, anchor=anchor)
        self.boxes.append((text, box))
        if key:
            self.places[key] = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        return box

    def turn(self, degrees: float, fill: Colour) -> None:
        """Turn all that is drawn around the middle; ``fill`` is what comes in at the corners."""
        centre = (SIZE / 2, SIZE / 2)
        self.image = self.image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)
        self.places = {key: turned(place, degrees, centre) for key, place in self.places.items()}
        for number, (text, (left, top, right, bottom)) in enumerate(self.boxes):
            corners = [turned((x, y), degrees, centre) for x in (left, right) for y in (top, bottom)]
            xs, ys = zip(*corners, strict=True)
            self.boxes[number] = (text, (min(xs), min(ys), max(xs), max(ys)))
