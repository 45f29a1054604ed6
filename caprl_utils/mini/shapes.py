"""Shapes of the mini world: scenes of objects between sky and ground, and drawings of geometry."""

from __future__ import annotations

import functools
import math
import random

from PIL import Image, ImageDraw

from caprl_utils.mini.canvas import INK, SIZE, WHITE, Box, Canvas, Point, mix, overlap, text_width, turned
from caprl_utils.mini.vocabulary import COLOURS, SHAPES

SKIES = {"blue": (140, 195, 240), "grey": (165, 170, 178), "pink": (248, 200, 212), "black": (22, 24, 38)}
GROUNDS = {"grass": (110, 170, 75), "sand": (226, 200, 140), "snow": (240, 245, 250), "water": (55, 120, 175)}
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
    places = {f"number of {SHAPES[name]}": (x, y) for name, x, y, _ in objects}  # of several the last, below the first
    places |= {f"colour of {name}": (x, y) for name, x, y, _ in reversed(objects)}
    return Canvas(image.reduce(FINE), places)


def _land(pen: ImageDraw.ImageDraw, rng: random.Random, sky: str, ground: str) -> int:
    """Clouds and a textured ground; returns the horizon in pixels."""
    size, horizon = SIZE * FINE, rng.randint(190, 250)
    cloud = mix(SKIES[sky], WHITE, 0.12 if sky == "black" else 0.4)
    for _ in range(rng.randint(0, 3)):
        x, y = rng.randrange(size), rng.randrange(horizon)
        for puff in range(3):
            wide = rng.randint(40, 90)
            pen.ellipse([x + 60 * puff - wide, y - 22, x + 60 * puff + wide, y + 26], fill=cloud)
    colour = GROUNDS[ground]
    pen.rectangle([0, horizon * FINE, size, size], fill=colour)
    dark, light = mix(colour, INK, 0.22), mix(colour, WHITE, 0.35)
    if ground == "snow":
        dark = (200, 215, 235)
    for number in range(150):
        x, y, shade = rng.randrange(size), rng.randrange(horizon * FINE, size), dark if number % 2 else light
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
    step = 292 / (len(names) - 1)
    jitter = min(14, (step - 54) / 2)
    placed: list[tuple[str, float, float, float]] = []
    for number, name in enumerate(names):
        radius = rng.uniform(51, 57) if name == biggest else rng.uniform(28, 35)
        x = 50 + step * number + rng.uniform(-jitter, jitter)
        x = min(max(x, radius + 4), SIZE - radius - 4)
        heights = [rng.uniform(radius + 8, SIZE - radius - 8) for _ in range(12)]
        hidden = [sum(max(0, 0.9 * (radius + r) - math.dist((x, y), (a, b))) for _, a, b, r in placed) for y in heights]
        placed.append((name, x, heights[hidden.index(min(hidden))], radius))
    return placed


@functools.cache
def _outline(shape: str) -> list[Point]:
    """Corners of a shape in a circle of radius one, y down."""
    if shape == "diamond":
        return [(0, -1), (0.66, 0), (0, 1), (-0.66, 0)]
    if shape == "cross":
        arm = 0.34
        corner = [(arm, -arm), (arm, -1), (-arm, -1)]
        return [turned(point, quarter) for quarter in (0, 90, 180, 270) for point in corner]
    if shape == "heart":
        turns = [2 * math.pi * k / 40 for k in range(40)]
        return [(0.96 * math.sin(t) ** 3,
                 -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5)
                for t in turns]  # fmt: skip
    count, start = {"circle": (40, 0), "square": (4, 45), "triangle": (3, 90), "hexagon": (6, 0), "star": (10, 90)}[shape]
    reach = [0.45 if shape == "star" and k % 2 else 1.0 for k in range(count)]
    return [turned((r, 0), start + 360 * k / count) for k, r in enumerate(reach)]


# Geometry


def geometry(layout: dict) -> Canvas:
    """A figure in its proportions, with corner letters, lengths where they are needed, and marks of right angles."""
    rng = random.Random(layout["seed"])
    colour, paper = COLOURS[layout["colour"]], rng.choice((WHITE, (250, 248, 240), (243, 247, 250)))
    image = Image.new("RGB", (SIZE * FINE, SIZE * FINE), paper)
    pen = ImageDraw.Draw(image)
    if rng.random() < 0.4:
        for at in range(14, SIZE, 28):
            pen.line([(at * FINE, 0), (at * FINE, SIZE * FINE)], fill=mix(paper, (120, 150, 190), 0.3), width=2)
            pen.line([(0, at * FINE), (SIZE * FINE, at * FINE)], fill=mix(paper, (120, 150, 190), 0.3), width=2)
    corners, words = _framed(rng, layout)
    points = [(FINE * x, FINE * y) for x, y in corners]
    if layout["fill"]:
        pen.polygon(points, fill=mix(colour, WHITE, 0.85))
    for mark in _right_angles(corners, layout["angles"]):
        pen.line([(FINE * x, FINE * y) for x, y in mark], fill=INK, width=4)
    pen.line([*points, *points[:2]], fill=colour, width=rng.choice((10, 12, 14)), joint="curve")
    page = Canvas(image.reduce(FINE), {"figure": _middle(corners)})
    for number, side in enumerate(layout["sides"]):
        page.places[f"length of {side}"] = _middle([corners[number], corners[(number + 1) % len(corners)]])
    for text, size, key, box in words:
        page.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, size, key=key)
    first = page.boxes[len(corners)][1]
    page.places["unit"] = (first[2] - 20, (first[1] + first[3]) / 2)
    return page


def _middle(points: list[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _figure(rng: random.Random, figure: str, sides: list[int]) -> list[Point]:
    """Corners A, B, C (, D) in true proportions, y down."""
    if figure == "triangle":
        ab, bc, ca = sides
        x = (ab**2 + ca**2 - bc**2) / (2 * ab)
        return [(0, 0), (ab, 0), (x, -math.sqrt(ca**2 - x**2))]
    if figure == "kite":  # of some widths one that has no angle near 90 degrees
        a, b = sides[:2]
        for share in (*rng.sample((0.6, 0.65, 0.75, 0.8, 0.85), 5), 0.9):
            at_a, at_c = 2 * math.degrees(math.asin(share)), 2 * math.degrees(math.asin(share * a / b))
            if all(abs(angle - 90) > 8 for angle in (at_a, at_c, 180 - (at_a + at_c) / 2)):
                break
        half = share * a
        return [(0, -math.sqrt(a**2 - half**2)), (half, 0), (0, math.sqrt(b**2 - half**2)), (-half, 0)]
    return [(0, 0), (sides[0], 0), (sides[0], -sides[1]), (0, -sides[1])]


def _framed(rng: random.Random, layout: dict) -> tuple[list[Point], list[tuple[str, int, str, Box]]]:
    """Corners in pixels, and (text, size, key, box) of letters and lengths: of some turns the one with most room."""
    corners = _figure(rng, layout["figure"], [int(v) for v in layout["values"]])
    shown = {"triangle": 3, "rectangle": 2, "kite": 2, "square": 1}[layout["figure"]]
    texts = [(letter, 25, "") for letter in "ABCD"[: len(corners)]]
    texts += [(f"{value} {layout['unit']}", 26, f"length of {side}")
              for side, value in zip(layout["sides"][:shown], layout["values"], strict=False)]  # fmt: skip
    sizes = [(text_width(text, size) + 4, 24.0) for text, size, _ in texts]
    flip, best = rng.choice((1, -1)), None
    for quarter in rng.sample((0, 90, 180, 270), 4):
        turn = quarter + rng.uniform(-10, 10)
        looked = [turned((flip * x, y), turn) for x, y in corners]
        long = max(math.dist(a, b) for a in looked for b in looked)
        for length in range(300, 130, -15):
            points = [(x * length / long, y * length / long) for x, y in looked]
            boxes = _boxes(points, sizes)
            left, top, right, bottom = (min(b[0] for b in boxes), min(b[1] for b in boxes),
                                        max(b[2] for b in boxes), max(b[3] for b in boxes))  # fmt: skip
            if right - left <= SIZE - 12 and bottom - top <= SIZE - 12:
                break
        worth = (-overlap(boxes), length)
        if best is None or worth > best[0]:
            dx, dy = (SIZE - left - right) / 2, (SIZE - top - bottom) / 2
            moved = [(a + dx, b + dy, c + dx, d + dy) for a, b, c, d in boxes]
            best = worth, [(x + dx, y + dy) for x, y in points], moved
    return best[1], [(*text, box) for text, box in zip(texts, best[2], strict=True)]


def _boxes(corners: list[Point], sizes: list[tuple[float, float]]) -> list[Box]:
    """Boxes of the letters outside their corners, then of the lengths outside their sides."""
    middle, boxes = _middle(corners), []
    for number, (width, height) in enumerate(sizes):
        if number < len(corners):
            x, y = corners[number]
            out, gap = (x - middle[0], y - middle[1]), 8
        else:
            (ax, ay), (bx, by) = corners[number - len(corners)], corners[(number + 1 - len(corners)) % len(corners)]
            x, y, out, gap = (ax + bx) / 2, (ay + by) / 2, (by - ay, ax - bx), 9
            if out[0] * (x - middle[0]) + out[1] * (y - middle[1]) < 0:
                out = (-out[0], -out[1])
        norm = math.hypot(*out)
        u, v = out[0] / norm, out[1] / norm
        reach = abs(u) * width / 2 + abs(v) * height / 2 + gap
        x, y = x + u * reach, y + v * reach
        boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    return boxes


def _right_angles(corners: list[Point], angles: str) -> list[list[Point]]:
    """Lines of the small squares at right angles: none, one at B, or four."""
    marks = []
    for number in {"none": (), "one": (1,), "four": (0, 1, 2, 3)}[angles]:
        here, before, after = corners[number], corners[number - 1], corners[(number + 1) % len(corners)]
        one, two = ([(p - h) / math.dist(other, here) * 20 for p, h in zip(other, here, strict=True)]
                    for other in (before, after))  # fmt: skip
        x, y = here
        marks.append([(x + one[0], y + one[1]), (x + one[0] + two[0], y + one[1] + two[1]), (x + two[0], y + two[1])])
    return marks
