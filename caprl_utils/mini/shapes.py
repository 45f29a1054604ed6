"""Shapes of the mini world: scenes of objects between sky and ground, and drawings of geometry.

A point is a complex number while it is reckoned with: its real part points right, its imaginary part down.
"""

from __future__ import annotations

import cmath
import functools
import math
import random
from collections.abc import Iterable
from itertools import pairwise

from PIL import Image, ImageDraw

from caprl_utils.mini.canvas import INK, SIZE, WHITE, Box, Canvas, mix, overlap, widest
from caprl_utils.mini.vocabulary import COLOURS, SHAPES

SKIES = {"blue": (140, 195, 240), "grey": (165, 170, 178), "pink": (248, 200, 212), "black": (22, 24, 38)}
GROUNDS = {"grass": (110, 170, 75), "sand": (226, 200, 140), "snow": (236, 242, 249), "water": (55, 120, 175)}
FINE = 2  # lines are drawn at twice the size, for smooth edges


def _xy(points: Iterable[complex], scale: float = FINE) -> list[tuple[float, float]]:
    return [(scale * point.real, scale * point.imag) for point in points]


# Scenes


def scene(layout: dict) -> Canvas:
    """Objects from left to right, all of one shape in one colour, before ground and sky."""
    rng = random.Random(layout["seed"])
    image = Image.new("RGB", (SIZE * FINE, SIZE * FINE), SKIES[layout["sky"]])
    pen = ImageDraw.Draw(image)
    horizon = _land(pen, rng, layout["sky"], layout["ground"])
    objects = []  # (name, middle, radius), in columns at least 50 pixels apart, at heights that hide no neighbour
    step = 284 / (len(layout["objects"]) - 1)
    jitter = min(14, (step - 54) / 2)
    for number, name in enumerate(layout["objects"]):
        radius = rng.uniform(51, 57) if name == layout["biggest"] else rng.uniform(28, 35)
        x = 54 + step * number + rng.uniform(-jitter, jitter)
        x = min(max(x, radius + 2), SIZE - radius - 2)
        spots = [complex(x, rng.uniform(radius + 6, SIZE - radius - 6)) for _ in range(12)]
        hidden = [sum(max(0, 0.9 * (radius + r) - abs(spot - at)) for _, at, r in objects) for spot in spots]
        objects.append((name, spots[hidden.index(min(hidden))], radius))
    for name, at, radius in sorted(objects, key=lambda one: one[1].imag):  # the lower ones are nearer
        colour, turn = layout["colours"][name], cmath.rect(radius, rng.uniform(-0.2, 0.2))
        light = colour == "black" or (layout["sky"] == "black" and at.imag < horizon)
        points = _xy(at + turn * corner for corner in _outline(name))
        pen.polygon(points, fill=COLOURS[colour])
        pen.line([*points, *points[:2]], fill=(238, 238, 238) if light else INK, width=6, joint="curve")
    places = {f"number of {SHAPES[name]}": (at.real, at.imag) for name, at, _ in objects}  # of several the last
    places |= {f"colour of {name}": (at.real, at.imag) for name, at, _ in reversed(objects)}  # the first
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


@functools.cache
def _outline(shape: str) -> list[complex]:
    """Corners of a shape in a circle of radius one around zero."""
    if shape == "heart":
        turns = [math.pi * k / 20 for k in range(40)]
        depth = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
        return [complex(0.96 * math.sin(t) ** 3, -d / 16.5) for t, d in zip(turns, depth, strict=True)]
    if shape == "cross":
        return [turn * point for turn in (1, 1j, -1, -1j) for point in (0.34 - 1j, 0.34 - 0.34j, 1 - 0.34j)]
    if shape == "diamond":
        return [-1j, 0.66, 1j, -0.66]
    corners = {"circle": 40, "square": 4, "triangle": 3, "hexagon": 6, "star": 10}[shape]
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    reach = [0.45 if shape == "star" and k % 2 else 1 for k in range(corners)]
    return [cmath.rect(r, start + 2 * math.pi * k / corners) for k, r in enumerate(reach)]


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
    if layout["fill"]:
        pen.polygon(_xy(corners), fill=mix(colour, WHITE, 0.85))
    for number in {"none": (), "one": (1,), "four": (0, 1, 2, 3)}[layout["angles"]]:
        here, others = corners[number], (corners[number - 1], corners[(number + 1) % len(corners)])
        one, two = (20 * (other - here) / abs(other - here) for other in others)
        pen.line(_xy((here + one, here + one + two, here + two)), fill=INK, width=4)
    pen.line(_xy([*corners, *corners[:2]]), fill=colour, width=rng.choice((10, 12, 14)), joint="curve")
    keys = ["figure", *(f"length of {side}" for side in layout["sides"])]
    middles = [sum(corners) / len(corners), *((a + b) / 2 for a, b in pairwise([*corners, corners[0]]))]
    page = Canvas(image.reduce(FINE), dict(zip(keys, _xy(middles, 1), strict=True)))
    for text, size, key, (left, top, right, bottom) in words:
        page.text(((left + right) / 2, (top + bottom) / 2), text, size, key)
    page.places["unit"] = (right - 20, (top + bottom) / 2)  # the last word of a length
    return page


def _figure(rng: random.Random, figure: str, sides: list[int]) -> list[complex]:
    """Corners A, B, C (, D) in true proportions, counterclockwise."""
    if figure == "triangle":
        ab, bc, ca = sides
        x = (ab**2 + ca**2 - bc**2) / (2 * ab)
        return [0, ab, complex(x, -math.sqrt(ca**2 - x**2))]
    a, b = sides[:2]
    if figure != "kite":
        return [0, a, a - b * 1j, -b * 1j]
    for share in (*rng.sample((0.65, 0.8, 0.85), 3), 0.6):  # half the width in parts of the short side
        at_a, at_c = (2 * math.degrees(math.asin(share * a / side)) for side in (a, b))
        if min(abs(angle - 90) for angle in (at_a, at_c, 180 - (at_a + at_c) / 2)) > 8:
            break  # no angle looks right
    half = share * a
    return [1j * math.sqrt(a**2 - half**2), half, -1j * math.sqrt(b**2 - half**2), -half]


def _framed(rng: random.Random, layout: dict) -> tuple[list[complex], list[tuple[str, int, str, Box]]]:
    """Corners in pixels, and (text, size, key, box) of letters and lengths: as large as all of it has room."""
    flip = rng.choice((1, -1))
    shape = _figure(rng, layout["figure"], [int(value) for value in layout["values"]])
    shape = [complex(flip * point.real, point.imag) for point in shape]
    reach = max(abs(a - b) for a in shape for b in shape)
    shown = {"triangle": 3, "rectangle": 2, "kite": 2, "square": 1}[layout["figure"]]  # the other sides follow
    words = [(letter, 25, "") for letter in "ABCD"[: len(shape)]]
    words += [(f"{value} {layout['unit']}", 26, f"length of {side}")
              for side, value in zip(layout["sides"][:shown], layout["values"], strict=False)]  # fmt: skip
    widths = [widest([text], size) + 4 for text, size, _ in words]
    turns = [
        math.radians(turn + rng.uniform(-10, 10)) for turn in (*rng.sample(range(0, 360, 90), 4), 45, 135, 225, 315)
    ]
    tried = ((length, turn) for some in (turns[:4], turns[4:]) for length in range(310, 130, -10) for turn in some)
    for length, turn in tried:
        corners = [point * cmath.rect(length / reach, turn) for point in shape]
        middle, boxes = sum(corners) / len(corners), []  # of the letters outside their corners, then of the lengths
        places = [(corner, corner - middle) for corner in corners]
        places += [((a + b) / 2, flip * 1j * (b - a)) for a, b in pairwise([*corners, corners[0]])]
        for (at, out), width in zip(places, widths, strict=False):
            out /= abs(out)
            at += out * (abs(out.real) * width / 2 + abs(out.imag) * 12 + 9)
            boxes.append((at.real - width / 2, at.imag - 12, at.real + width / 2, at.imag + 12))
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        dx, dy = (SIZE - min(lefts) - max(rights)) / 2, (SIZE - min(tops) - max(bottoms)) / 2
        if min(min(lefts) + dx, min(tops) + dy) > 6 and not overlap(boxes):
            break
    moved = [(left + dx, top + dy, right + dx, bottom + dy) for left, top, right, bottom in boxes]
    return [point + complex(dx, dy) for point in corners], [(*w, box) for w, box in zip(words, moved, strict=True)]
