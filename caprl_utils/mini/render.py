"""Draws the pictures of the mini world: 280 x 280 pixels, which the processor halves to 140 x 140 for the models.

Labels and numbers sit on a grid of 56 pixels (one visual token after halving), so that a vision tower of half a million
parameters can learn to read them; everything else (styles, colours, bar heights, places of objects) varies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from caprl_utils.mini.vocabulary import COLOURS, POSITIONS
from caprl_utils.mini.world import Picture

SIZE = 280  # pixels, both ways
CELL = SIZE // 5
INK, PALE, GRID = (25, 25, 25), (245, 245, 240), (205, 205, 205)


@functools.lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # its DejaVu fonts come with the package: the same pixels on every machine

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _text(draw, xy, text: str, size: int = 17, fill=INK, bold: bool = False, anchor: str = "mm") -> None:
    draw.text(xy, text, font=_font(size, bold), fill=fill, anchor=anchor)


def _centre(column: int, row: int) -> tuple[int, int]:
    return column * CELL + CELL // 2, row * CELL + CELL // 2


def render(picture: Picture) -> Image.Image:
    """The picture as an RGB image of 280 x 280 pixels."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    _PAINTERS[picture.kind](ImageDraw.Draw(image), picture.layout)
    return image


def _chart(draw: ImageDraw.ImageDraw, layout: dict) -> None:
    _text(draw, (SIZE // 2, CELL // 2), layout["topic"].capitalize(), 22, bold=True)
    paint = _bars if layout["type"] == "bars" else _columns
    paint(draw, layout, COLOURS[layout["colour"]])


def _bars(draw, layout: dict, colour) -> None:
    left, right = CELL + 6, SIZE - CELL
    for tick in range(0, 101, 25):
        x = left + (right - left) * tick / 100
        draw.line([(x, CELL), (x, SIZE - 4)], fill=GRID)
    for row, (label, value) in enumerate(zip(layout["labels"], layout["values"], strict=True), start=1):
        _, y = _centre(0, row)
        _text(draw, (CELL, y), label, anchor="rm")
        draw.rectangle([left, y - 17, left + (right - left) * int(value) / 100, y + 17], fill=colour)
        _text(draw, (_centre(4, 0)[0], y), value, 21, bold=True)
    draw.line([(left, CELL), (left, SIZE - 4)], fill=INK, width=2)


def _columns(draw, layout: dict, colour) -> None:
    top, base, kind = CELL + 8, SIZE - CELL, layout["type"]
    for tick in range(0, 101, 25):
        y = base - (base - top) * tick / 100
        draw.line([(CELL - 6, y), (SIZE - 6, y)], fill=GRID)
        _text(draw, (CELL - 10, y), str(tick), 13, anchor="rm")
    points = []
    for column, (label, value) in enumerate(zip(layout["labels"], layout["values"], strict=True), start=1):
        x, _ = _centre(column, 0)
        y = base - (base - top) * int(value) / 100
        points.append((x, y))
        _text(draw, (x, base + 14), label)
        _text(draw, (x, base + 38), value, 21, bold=True)
        if kind == "columns":
            draw.rectangle([x - 19, y, x + 19, base], fill=colour)
    if kind == "line":
        draw.line(points, fill=colour, width=5)
    if kind in ("line", "dots"):
        for x, y in points:
            radius = 5 if kind == "line" else 11
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    draw.line([(CELL - 6, base), (SIZE - 6, base)], fill=INK, width=2)


def _infographic(draw: ImageDraw.ImageDraw, layout: dict) -> None:
    colour = COLOURS[layout["colour"]]
    draw.rectangle([0, 0, SIZE, CELL - 4], fill=colour)
    _text(draw, (SIZE // 2, CELL // 2 - 2), f"The {layout['topic']} in figures", 20, "white", bold=True)
    for row, (label, value) in enumerate(zip(layout["labels"], layout["values"], strict=True), start=1):
        y = row * CELL + CELL // 2
        if (row + layout["style"]) % 2:
            draw.rectangle([0, y - CELL // 2, SIZE, y + CELL // 2], fill=PALE)
        _gauge(draw, (CELL // 2, y), int(value), colour, layout["style"])
        _text(draw, (CELL + 8, y), label.capitalize(), 20, anchor="lm")
        _text(draw, (_centre(3, 0)[0] + 14, y), value, 30, colour, bold=True)
        _text(draw, (_centre(4, 0)[0] - 2, y + 3), "%", 20, INK)


def _gauge(draw, centre, value: int, colour, style: int) -> None:
    x, y = centre
    box = [x - 20, y - 20, x + 20, y + 20]
    if style == 0:  # pie
        draw.ellipse(box, fill=GRID)
        draw.pieslice(box, -90, -90 + 3.6 * value, fill=colour)
    elif style == 1:  # ring
        draw.ellipse(box, outline=GRID, width=9)
        draw.arc(box, -90, -90 + 3.6 * value, fill=colour, width=9)
    else:  # filling glass
        draw.rectangle([x - 14, y - 20, x + 14, y + 20], outline=INK, width=2)
        draw.rectangle([x - 12, y + 18 - 0.36 * value, x + 12, y + 18], fill=colour)


def _document(draw: ImageDraw.ImageDraw, layout: dict) -> None:
    style = layout["style"]
    draw.rectangle([6, 4, SIZE - 7, SIZE - 3], fill=(252, 250, 243), outline=GRID, width=2)
    _text(draw, (18, CELL // 2 + 2), layout["type"].upper(), 23, bold=True, anchor="lm")
    if style == 1:
        draw.ellipse([SIZE - 54, 12, SIZE - 22, 44], outline=(170, 40, 40), width=4)
    elif style == 2:
        for x in range(SIZE - 70, SIZE - 20, 5):
            draw.line([(x, 14), (x, 44)], fill=INK, width=1 + (x * 7) % 3)
    draw.line([(16, CELL + 2), (SIZE - 18, CELL + 2)], fill=INK, width=2)
    for row, (key, value) in enumerate(layout["fields"], start=1):
        _, y = _centre(0, row)
        _text(draw, (18, y + 2), f"{key.capitalize()}:", 19, (90, 90, 90), anchor="lm")
        _text(draw, (_centre(2, 0)[0], y + 2), value, 21, bold=True, anchor="lm")
        if style != 1:
            draw.line([(18, y + 22), (SIZE - 20, y + 22)], fill=GRID)


_SKIES = [((196, 225, 245), (150, 190, 110)), ((250, 222, 190), (205, 180, 130)), ((215, 215, 230), (235, 235, 240)),
          ((190, 225, 225), (225, 205, 160))]  # fmt: skip


def _scene(draw: ImageDraw.ImageDraw, layout: dict) -> None:
    sky, ground = _SKIES[layout["background"]]
    draw.rectangle([0, 0, SIZE, SIZE // 2], fill=sky)
    draw.rectangle([0, SIZE // 2, SIZE, SIZE], fill=ground)
    places = [(1, 1), (3, 1), (1, 3), (3, 3)]
    rows = zip(places, layout["shapes"], layout["colours"], layout["jitter"], strict=True)
    for (column, row), shape, colour, (dx, dy, scale) in rows:
        x, y = _centre(column, row)
        _shape(draw, shape, x + dx, y + dy, 44 * scale, COLOURS[colour])


def _shape(draw, shape: str, x: float, y: float, radius: float, fill) -> None:
    if shape == "circle":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill, outline=INK)
        return
    if shape == "cross":
        arm = radius * 0.35
        draw.rectangle([x - radius, y - arm, x + radius, y + arm], fill=fill)
        draw.rectangle([x - arm, y - radius, x + arm, y + radius], fill=fill)
        return
    if shape == "heart":
        half = radius / 2
        draw.ellipse([x - radius, y - radius, x, y], fill=fill)
        draw.ellipse([x, y - radius, x + radius, y], fill=fill)
        draw.polygon(
            [(x - radius * 0.93, y - half * 0.6), (x + radius * 0.93, y - half * 0.6), (x, y + radius)], fill=fill
        )
        return
    draw.polygon(_corners(shape, x, y, radius), fill=fill, outline=INK)


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of a regular shape or star around (x, y)."""
    count, start = {"square": (4, 45), "triangle": (3, -90), "diamond": (4, 0), "hexagon": (6, 0), "star": (10, -90)}[
        shape
    ]
    corners = []
    for k in range(count):
        reach = radius * (0.42 if shape == "star" and k % 2 else 1.0)
        angle = math.radians(start + 360 * k / count)
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return corners


_OUTLINES = {
    "triangle": [(40, 224), (240, 224), (140, 48)],
    "rectangle": [(52, 196), (228, 196), (228, 84), (52, 84)],
    "square": [(70, 210), (210, 210), (210, 70), (70, 70)],
    "kite": [(140, 252), (232, 112), (140, 30), (48, 112)],
}
_SIDE_LABELS = {  # where the length of each side stands: grid cells (column, row)
    "triangle": [(2, 4), (4, 2), (0, 2)],
    "rectangle": [(2, 4), (4, 2), (2, 0), (0, 2)],
    "square": [(2, 4), (4, 2), (2, 0), (0, 2)],
    "kite": [(4, 3), (4, 0), (0, 0), (0, 3)],
}


def _geometry(draw: ImageDraw.ImageDraw, layout: dict) -> None:
    figure, colour = layout["figure"], COLOURS[layout["colour"]]
    corners = _OUTLINES[figure]
    if layout["fill"]:
        pale = tuple(235 - (255 - c) // 10 for c in colour)
        draw.polygon(corners, fill=pale)
    draw.line([*corners, corners[0], corners[1]], fill=colour, width=6, joint="curve")
    middle_x, middle_y = (sum(c[i] for c in corners) / len(corners) for i in (0, 1))
    for name, (x, y) in zip("ABCD", corners, strict=False):
        towards = (x - (x - middle_x) * 0.24, y - (y - middle_y) * 0.24)
        _text(draw, towards, name, 18)
    for value, (column, row) in zip(layout["values"], _SIDE_LABELS[figure], strict=True):
        _text(draw, _centre(column, row), value, 24, bold=True)


_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, dict], None]] = {
    "chart": _chart,
    "infographic": _infographic,
    "document": _document,
    "scene": _scene,
    "geometry": _geometry,
}


def shown_words(picture: Picture) -> dict[tuple[int, int], tuple[str, str]]:
    """The fact that a grid cell (column, row) stands for, as two words: the end of its key, and its value.

    A fact belongs to the cell where its label stands, or to a cell of its own where it has none. Key and value share
    one cell, so that the vision tower, which sees both ways, binds them before the language model reads them.
    """
    by_key = {fact.key: fact.value for fact in picture.facts}
    cells = _fact_cells(picture)
    return {cell: (key.rsplit(" of ", 1)[-1], by_key[key]) for key, cell in cells.items()}


def _fact_cells(picture: Picture) -> dict[str, tuple[int, int]]:
    layout = picture.layout
    if picture.kind == "chart":
        bars = layout["type"] == "bars"
        labels = {f"value of {c}": (0, i) if bars else (i, 4) for i, c in enumerate(layout["labels"], start=1)}
        return {"topic": (2, 0), "chart type": (0, 0), "chart colour": (4, 0)} | labels
    if picture.kind == "infographic":
        labels = {f"share of {g}": (1, i) for i, g in enumerate(layout["labels"], start=1)}
        return {"topic": (2, 0), "header colour": (0, 0)} | labels
    if picture.kind == "document":
        return {"document type": (1, 0)} | {k: (0, i) for i, (k, _) in enumerate(layout["fields"], start=1)}
    if picture.kind == "scene":
        places = zip(POSITIONS, [(1, 1), (3, 1), (1, 3), (3, 3)], strict=True)
        return {
            f"{place} {what}": (column + beside, row)
            for place, (column, row) in places
            for what, beside in (("shape", 0), ("colour", 1))
        }
    sides = zip(layout["sides"], _SIDE_LABELS[layout["figure"]], strict=True)
    return {"figure": (2, 2), "line colour": (2, 1)} | {f"length of {side}": cell for side, cell in sides}
