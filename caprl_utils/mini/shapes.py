"""Shapes of the mini world: scenes of objects between sky and ground, and drawings of geometry."""

from __future__ import annotations

import functools
import math
import random

from PIL import Image, ImageDraw

from caprl_utils.mini.canvas import INK, SIZE, WHITE, Box, Canvas, Point, mix, overlap, turned, widest
from caprl_utils.mini.vocabulary import COLOURS, SHAPES

SKIES = {"blue": (140, 195, 240), "grey": (165, 170, 178), "pink": (248, 200, 212), "black": (22, 24, 38)}
GROUNDS = {"grass": (110, 170, 75), "sand": (226, 200, 140), "snow": (236, 242, 249), "water": (55, 120, 175)}
FINE = 2  # lines are drawn at twice the size, for smooth edges


# Scenes


def scene(layout: dict) -> Canvas:
    """Objects from left to right, all of one shape in one colour, before ground and sky."""
    rng = random.Random(layout["seed"])
    image = Image.new("RGB", (SIZE * FINE, SIZE * FINE), SKIES[layout["sky"]])
    pen = ImageDraw.Draw(image)
    horizon = _land(pen, rng, layout["sky"], layout["ground"])
    objects = _spread(rng, layout["objects"], layout["biggest"])
    for name, x, y, radius in sorted(objects, key=lambda one: one[2]):  # the lower ones are nearer
        colour, turn = layout["colours"][name], rng.uniform(-12, 12)
        light = colour == "black" or (layout["sky"] == "black" and y < horizon)
        corners = (turned((x + radius * u, y + radius * v), turn, (x, y)) for u, v in _outline(name))
        points = [(FINE * a, FINE * b) for a, b in corners]
        pen.polygon(points, fill=COLOURS[colour])
        pen.line([*points, *points[:2]], fill=(238, 238, 238) if light else INK, width=6, joint="curve")
    places = {f"number of {SHAPES[name]}": (x, y) for name, x, y, _ in objects}  # of several the last; below, the first
    places |= {f"colour of {name}": (x, y) for name, x, y, _ in reversed(objects)}
    return Canvas(image.reduce(FINE), places)


def _land(pen: ImageDraw.ImageDraw, rng: random.Random, sky: str, ground: str) -> int:
    """Clouds, and a ground of blades, grains or waves; returns the horizon in pixels."""
    size, horizon, colour = SIZE * FINE, rng.randint(190, 250), GROUNDS[ground]
    for _ in range(rng.randint(0, 3)):
        x, y = rng.randrange(size), rng.randrange(horizon)
        for puff in (x, x + 60, x + 120):
            wide = rng.randint(40, 90)
            pen.ellipse([puff - wide, y - 22, puff + wide, y + 26], fill=mix(SKIES[sky], WHITE, 0.25))
    pen.rectangle([0, horizon * FINE, size, size], fill=colour)
    shades = mix(colour, (60, 80, 130), 0.25), mix(colour, WHITE, 0.4)
    for number in range(150):
        x, y, shade = rng.randrange(size), rng.randrange(horizon * FINE, size), shades[number % 2]
        if ground == "grass":
            pen.line([(x, y), (x + rng.randint(-8, 8), y - 16)], fill=shade, width=3)
        elif ground == "water":
            pen.arc([x - 30, y - 8, x + 30, y + 12], 200, 340, fill=shade, width=4)
        else:
            wide = 3 if ground == "sand" else 6
            pen.ellipse([x - wide, y - 3, x + wide, y + 3], fill=shade)
    return horizon


def _spread(rng: random.Random, names: list[str], biggest: str) -> list[tuple[str, float, float, float]]:
    """(name, x, y, radius) of each object; columns at least 50 pixels apart, heights that hide no neighbour."""
    step, placed = 284 / (len(names) - 1), []
    jitter = min(14, (step - 54) / 2)
    for number, name in enumerate(names):
        radius = rng.uniform(51, 57) if name == biggest else rng.uniform(28, 35)
        x = 54 + step * number + rng.uniform(-jitter, jitter)
        x = min(max(x, radius + 2), SIZE - radius - 2)
        heights = [rng.uniform(radius + 6, SIZE - radius - 6) for _ in range(12)]
        hidden = [sum(max(0, 0.9 * (radius + r) - math.dist((x, y), (a, b))) for _, a, b, r in placed) for y in heights]
        placed.append((name, x, heights[hidden.index(min(hidden))], radius))
    return placed


@functools.cache
def _outline(shape: str) -> list[Point]:
    """Corners of a shape in a circle of radius one, y down."""
    if shape == "heart":
        turns = [2 * math.pi * k / 40 for k in range(40)]
        return [(0.96 * math.sin(t) ** 3,
                 -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5)
                for t in turns]  # fmt: skip
    if shape == "cross":
        return [turned(point, turn) for turn in (0, 90, 180, 270) for point in ((0.34, -0.34), (0.34, -1), (-0.34, -1))]
    if shape == "diamond":
        return [(0, -1), (0.66, 0), (0, 1), (-0.66, 0)]
    count, start = {"circle": (40, 0), "square": (4, 45), "triangle": (3, 90), "hexagon": (6, 0), "star": (10, 90)}[
        shape
    ]
    return [turned((0.45 if shape == "star" and k % 2 else 1, 0), start + 360 * k / count) for k in range(count)]


# Geometry


def geometry(layout: dict) -> Canvas:
    """A figure in its proportions, with corner letters, lengths where they are needed, and marks of right angles."""
    rng, colour = random.Random(layout["seed"]), COLOURS[layout["colour"]]
    paper = rng.choice((WHITE, (250, 248, 240), (243, 247, 250)))
    image = Image.new("RGB", (SIZE * FINE, SIZE * FINE), paper)
    pen = ImageDraw.Draw(image)
    for at in range(28, SIZE * FINE, 56) if rng.random() < 0.4 else ():  # squared paper
        pen.line([(at, 0), (at, SIZE * FINE)], fill=mix(paper, (120, 150, 190), 0.3), width=2)
        pen.line([(0, at), (SIZE * FINE, at)], fill=mix(paper, (120, 150, 190), 0.3), width=2)
    corners, words = _framed(rng, layout)
    points = [(FINE * x, FINE * y) for x, y in corners]
    if layout["fill"]:
        pen.polygon(points, fill=mix(colour, WHITE, 0.85))
    for number in {"none": (), "one": (1,), "four": (0, 1, 2, 3)}[layout["angles"]]:
        pen.line(_right_angle(points[number - 1], points[number], points[(number + 1) % len(points)]), INK, 4)
    pen.line([*points, *points[:2]], fill=colour, width=rng.choice((10, 12, 14)), joint="curve")
    sides = zip(layout["sides"], _pairs(corners), strict=True)
    page = Canvas(image.reduce(FINE), {f"length of {side}": _middle(ends) for side, ends in sides})
    page.places["figure"] = _middle(corners)
    for text, size, key, (left, top, right, bottom) in words:
        page.text(((left + right) / 2, (top + bottom) / 2), text, size, key)
        if key:  # its last word
            page.places["unit"] = (right - 20, (top + bottom) / 2)
    return page


def _pairs(corners: list[Point]) -> list[tuple[Point, Point]]:
    """Both ends of each side."""
    return list(zip(corners, [*corners[1:], corners[0]], strict=True))


def _middle(points: list[Point] | tuple[Point, ...]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _figure(rng: random.Random, figure: str, sides: list[int]) -> list[Point]:
    """Corners A, B, C (, D) in true proportions, y down."""
    if figure == "triangle":
        ab, bc, ca = sides
        x = (ab**2 + ca**2 - bc**2) / (2 * ab)
        return [(0, 0), (ab, 0), (x, -math.sqrt(ca**2 - x**2))]
    if figure != "kite":
        return [(0, 0), (sides[0], 0), (sides[0], -sides[1]), (0, -sides[1])]
    a, b = sides[:2]
    for share in (*rng.sample((0.65, 0.8, 0.85), 3), 0.6):  # half the width in parts of the short side
        at_a, at_c = 2 * math.degrees(math.asin(share)), 2 * math.degrees(math.asin(share * a / b))
        if min(abs(angle - 90) for angle in (at_a, at_c, 180 - (at_a + at_c) / 2)) > 8:
            break  # no angle that looks right
    half = share * a
    return [(0, -math.sqrt(a**2 - half**2)), (half, 0), (0, math.sqrt(b**2 - half**2)), (-half, 0)]


def _framed(rng: random.Random, layout: dict) -> tuple[list[Point], list[tuple[str, int, str, Box]]]:
    """Corners in pixels, and (text, size, key, box) of letters and lengths: as large as all of it has room."""
    flip = rng.choice((1, -1))
    shape = [(flip * x, y) for x, y in _figure(rng, layout["figure"], [int(v) for v in layout["values"]])]
    reach = max(math.dist(a, b) for a in shape for b in shape)
    shown = {"triangle": 3, "rectangle": 2, "kite": 2, "square": 1}[layout["figure"]]  # the other sides follow
    lengths = list(zip(layout["sides"], layout["values"], strict=True))[:shown]
    words = [(letter, 25, "") for letter in "ABCD"[: len(shape)]]
    words += [(f"{value} {layout['unit']}", 26, f"length of {side}") for side, value in lengths]
    widths = [widest([text], size) + 4 for text, size, _ in words]
    turns = [turn + rng.uniform(-10, 10) for turn in (*rng.sample((0, 90, 180, 270), 4), 45, 135, 225, 315)]
    tried = ((length, turn) for some in (turns[:4], turns[4:]) for length in range(310, 130, -10) for turn in some)
    for length, turn in tried:
        corners = [turned((x * length / reach, y * length / reach), turn) for x, y in shape]
        boxes = _boxes(corners, widths)
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        dx, dy = (SIZE - min(lefts) - max(rights)) / 2, (SIZE - min(tops) - max(bottoms)) / 2
        if min(min(lefts) + dx, min(tops) + dy) > 6 and not overlap(boxes):
            break
    moved = [(a + dx, b + dy, c + dx, d + dy) for a, b, c, d in boxes]
    return [(x + dx, y + dy) for x, y in corners], [(*word, box) for word, box in zip(words, moved, strict=True)]


def _boxes(corners: list[Point], widths: list[float]) -> list[Box]:
    """Boxes of the letters outside their corners, then of the lengths outside their sides."""
    middle, boxes = _middle(corners), []
    places = [(corner, (corner[0] - middle[0], corner[1] - middle[1])) for corner in corners]
    for a, b in _pairs(corners):
        (x, y), out = _middle((a, b)), (b[1] - a[1], a[0] - b[0])
        outwards = 1 if out[0] * (x - middle[0]) + out[1] * (y - middle[1]) > 0 else -1
        places.append(((x, y), (outwards * out[0], outwards * out[1])))
    for ((x, y), (u, v)), width in zip(places, widths, strict=False):
        far = (abs(u) * width / 2 + abs(v) * 12) / math.hypot(u, v) + 9
        x, y = x + u / math.hypot(u, v) * far, y + v / math.hypot(u, v) * far
        boxes.append((x - width / 2, y - 12, x + width / 2, y + 12))
    return boxes


def _right_angle(before: Point, here: Point, after: Point) -> list[Point]:
    """The mark of a right angle: two sides of a small square at the corner ``here``."""
    one, two = ([(p - h) / math.dist(other, here) * 40 for p, h in zip(other, here, strict=True)]
                for other in (before, after))  # fmt: skip
    x, y = here
    return [(x + one[0], y + one[1]), (x + one[0] + two[0], y + one[1] + two[1]), (x + two[0], y + two[1])]
