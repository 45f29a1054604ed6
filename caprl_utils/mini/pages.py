"""Pages of the mini world: infographics and scanned documents."""

from __future__ import annotations

import functools
import io
import random

from PIL import Image, ImageChops, ImageDraw

from caprl_utils.mini.canvas import FACES, GREY, INK, SIZE, WHITE, Canvas, Colour, Point, fit, ink_on, mix
from caprl_utils.mini.vocabulary import COLOURS

LEFT, RIGHT = 20, SIZE - 20
PAPERS = ((245, 245, 240), (238, 243, 248), (250, 244, 232), (240, 246, 238), WHITE)
Parts = list[tuple[str, int, Colour]]  # good, share in percent, tint


# Infographics


def infographic(layout: dict) -> Canvas:
    """A header with topic and year, the goods with their shares in one of three layouts, a banner with the region."""
    rng, colour = random.Random(layout["seed"]), COLOURS[layout["colour"]]
    page = Canvas(Image.new("RGB", (SIZE, SIZE), rng.choice(PAPERS)))
    face = rng.choice(("sans", "sans", "serif"))
    page.pen.rectangle([0, 0, SIZE, 78], fill=colour)
    topic, year, ink = layout["topic"].capitalize(), layout["year"], ink_on(colour)
    if rng.random() < 0.5:
        title = rng.choice(("{} in figures", "Facts: {}", "{} report")).format(topic)
        page.text((LEFT, 26), title, fit([title], 350, 31, face), "topic", face, "lm", ink)
        page.text((LEFT, 60), rng.choice(("Year {}", "in {}", "Data of {}")).format(year), 24, "year", face, "lm", ink)
    else:
        page.text((LEFT, 39), topic, fit([topic], 210, 38, face), "topic", face, "lm", ink)
        page.text((RIGHT, 39), year, 29, "year", face, "rm", ink)
    above, band = rng.random() < 0.3, rng.choice((mix(colour, INK, 0.3), mix(colour, WHITE, 0.82)))
    top = 84 if above else 342
    page.pen.rectangle([0, top, SIZE, top + 44], fill=band)  # with the region and a small globe
    for half in (15, 7, 0):
        page.pen.ellipse([36 - half, top + 7, 36 + half, top + 37], outline=ink_on(band), width=2)
    page.pen.line([(21, top + 22), (51, top + 22)], fill=ink_on(band), width=2)
    words = rng.choice(("Region: {}", "Area: {}", "Where: {}")).format(layout["region"])
    page.text((66, top + 22), words, 26, "region", face, "lm", ink_on(band))
    tints = [mix(colour, WHITE, share) for share in (0, 0.35, 0.6, 0.78)]
    parts = list(zip(layout["labels"], map(int, layout["values"]), tints, strict=False))
    rng.choice((_rows, _rows, _tiles, _whole))(page, rng, parts, face, 134 if above else 86)
    return page


def _gauge(pen: ImageDraw.ImageDraw, kind: str, at: Point, share: int, tint: Colour, radius: int = 25) -> None:
    """A share as a part of a disc, of a ring, of a bar or of twenty people."""
    (x, y), pale = at, mix(tint, WHITE, 0.78)
    box = [x - radius, y - radius, x + radius, y + radius]
    if kind == "disc":
        pen.ellipse(box, fill=pale, outline=INK)
        pen.pieslice(box, -90, -90 + 3.6 * share, fill=tint)
    elif kind == "ring":
        pen.arc(box, 0, 360, fill=pale, width=radius // 3)
        pen.arc(box, -90, -90 + 3.6 * share, fill=tint, width=radius // 3)
    elif kind == "bar":
        pen.rectangle([LEFT, y + 6, RIGHT, y + 20], fill=pale, outline=GREY)
        pen.rectangle([LEFT, y + 6, LEFT + (RIGHT - LEFT) * share / 100, y + 20], fill=tint)
    else:  # twenty people, five percent each
        for number in range(20):
            x, fill = LEFT + 9 + 17.5 * number, tint if 5 * number < share else mix(pale, GREY, 0.2)
            pen.ellipse([x - 4, y + 3, x + 4, y + 11], fill=fill)
            pen.rectangle([x - 5, y + 13, x + 5, y + 23], fill=fill)


def _rows(page: Canvas, rng: random.Random, parts: Parts, face: str, top: int) -> None:
    """A row for each good, with a gauge beside or below its name."""
    kind, height, left = rng.choice(("disc", "ring", "bar", "people")), 252 / len(parts), rng.random() < 0.5
    below = kind in ("bar", "people")
    for number, (name, share, _) in enumerate(parts):
        y = top + height * (number + 0.5)
        if number % 2 == 0 and left:
            page.pen.rectangle([0, y - height / 2, SIZE, y + height / 2], fill=WHITE)
        _gauge(page.pen, kind, (46 if left else SIZE - 46, y), share, parts[0][2])
        x, end, line = (LEFT, RIGHT, y - 12) if below else (88, RIGHT, y) if left else (LEFT, SIZE - 88, y)
        page.text((x, line), name.capitalize(), 26, f"share of {name}", face, "lm")
        page.text((end, line), f"{share}%", 28, "", face, "rm")


def _tiles(page: Canvas, rng: random.Random, parts: Parts, face: str, top: int) -> None:
    """A tile for each good, two a row, with its share in a ring."""
    for number, (name, share, _) in enumerate(parts):
        x = SIZE / 2 if (len(parts), number) == (3, 2) else 102 + 188 * (number % 2)
        y = top + 64 + 122 * (number // 2)
        page.pen.rounded_rectangle([x - 88, y - 56, x + 88, y + 56], 10, fill=WHITE, outline=parts[1][2], width=2)
        _gauge(page.pen, "ring", (x, y - 16), share, parts[0][2], 39)
        page.text((x, y - 14), f"{share}%", 20, "", face)
        page.text((x, y + 36), name.capitalize(), 25, f"share of {name}", face)


def _whole(page: Canvas, rng: random.Random, parts: Parts, face: str, top: int) -> None:
    """All goods as parts of one pie, ring or bar, and the list of their names and shares."""
    kind, start, pen = rng.choice(("pie", "ring", "bar")), 0.0, page.pen
    for number, (name, share, tint) in enumerate(parts):
        if kind == "bar":
            pen.rectangle(
                [LEFT + 3.5 * start, top + 16, LEFT + 3.5 * (start + share), top + 70], fill=tint, outline=INK
            )
            x, y = LEFT + 180 * (number % 2), top + 124 + 80 * (number // 2)
        else:
            pen.pieslice([206, top + 42, 374, top + 210], 3.6 * start - 90, 3.6 * (start + share) - 90, tint, INK)
            x, y = LEFT, top + 252 / len(parts) * (number + 0.5)
        start += share
        pen.rectangle([x, y - 24, x + 16, y + 24], fill=tint, outline=INK)
        page.text((x + 28, y - 14), name.capitalize(), 25, f"share of {name}", face, "lm")
        page.text((x + 28, y + 15), f"{share}%", 26, "", face, "lm")
    if kind == "ring":
        pen.ellipse([250, top + 86, 330, top + 166], fill=WHITE, outline=INK)


# Documents


def document(layout: dict) -> Canvas:
    """A scan: letterhead, two fields, items with their prices, the total, a stamp; at a slant, noisy, compressed."""
    rng = random.Random(layout["seed"])
    page = Canvas(Image.new("RGB", (SIZE, SIZE), rng.choice(PAPERS)))
    face = rng.choice((*FACES,))
    _letterhead(page, rng, layout["type"], face)
    for number, (key, value) in enumerate(layout["fields"]):
        y = 92 + 34 * number
        end = page.text((LEFT, y), f"{key.capitalize()}:", 24, key, face, "lm", (85, 85, 85))
        page.text((max(112, end + 10), y), value, 26, "", face, "lm")
    _table(page, rng, layout, face)
    if rng.random() < 0.6:  # a round stamp beside the fields
        x, ink = rng.randint(318, 332), mix(rng.choice(((190, 30, 40), (40, 60, 160), (30, 120, 70))), WHITE, 0.25)
        for radius, width in ((40, 5), (28, 2), (12, 8)):
            page.pen.ellipse([x - radius, 110 - radius, x + radius, 110 + radius], outline=ink, width=width)
    slant, desk = rng.choice((0, 1, 1)) * rng.uniform(-1, 1), rng.choice(((150, 140, 130), (90, 95, 100)))
    scan = page.image.rotate(slant, Image.Resampling.BILINEAR, fillcolor=desk)  # no place moves by a quarter of a cell
    x, y = rng.randrange(120), rng.randrange(120)
    grain = _noise(rng.choice((14, 24, 36))).crop((x, y, x + SIZE, y + SIZE))
    file = io.BytesIO()
    ImageChops.multiply(scan, grain).save(file, "JPEG", quality=rng.randint(40, 90))
    page.image = Image.open(file).convert("RGB")
    return page


@functools.cache
def _noise(amount: int) -> Image.Image:
    """Fixed noise of 512 x 512 pixels that darkens by up to ``amount``, to be cropped at a place drawn at random."""
    grey = Image.frombytes("L", (512, 512), random.Random(amount).randbytes(512 * 512))
    return Image.merge("RGB", [grey.point(lambda v: 255 - v * amount // 255)] * 3)


def _letterhead(page: Canvas, rng: random.Random, kind: str, face: str) -> None:
    """The document's type: in a band, over a double rule, or beside a logo, a bar code or a stripe."""
    style, pen = rng.choice(("band", "rule", "logo", "code", "stripe")), page.pen
    colour = COLOURS[rng.choice(("red", "blue", "green", "purple", "brown"))]
    title = rng.choice((kind.upper(), kind.capitalize()))
    if style == "band":
        pen.rectangle([0, 0, SIZE, 66], fill=colour)
    elif style == "rule":
        pen.line([(LEFT, 62), (RIGHT, 62)], fill=INK, width=2)
        pen.line([(LEFT, 67), (RIGHT, 67)], fill=INK, width=2)
    elif style == "logo":
        pen.ellipse([RIGHT - 46, 14, RIGHT, 60], outline=colour, width=6)
        pen.polygon([(RIGHT - 23, 22), (RIGHT - 8, 48), (RIGHT - 38, 48)], fill=colour)
    elif style == "code":
        for x in range(RIGHT - 72, RIGHT, 5):
            pen.rectangle([x, 16, x + rng.choice((1, 2, 3)), 58], fill=INK)
    else:
        pen.rectangle([0, 0, 10, SIZE], fill=colour)
        pen.line([(LEFT, 66), (RIGHT, 66)], fill=colour, width=3)
    at, anchor = ((SIZE / 2, 36), "mm") if style in ("band", "rule") else ((LEFT, 36), "lm")
    ink = {"band": WHITE, "logo": colour}.get(style, INK)
    page.text(at, title, fit([title], 260, 36, face), "document type", face, anchor, ink)


def _table(page: Canvas, rng: random.Random, layout: dict, face: str) -> None:
    """Items, prices and their total; the currency above or below."""
    pen, y, step, below, striped = page.pen, 153, 42, rng.random() < 0.5, rng.random() < 0.4
    pen.rectangle([LEFT - 6, y, RIGHT + 6, y + 31], fill=(215, 215, 210))
    page.text((LEFT, y + 15), rng.choice(("Item", "Goods")), 22, "", face, "lm")
    page.text((RIGHT, y + 15), "Price" if below else f"in {layout['currency']}", 23, "" if below else "currency", face,
              "rm")  # fmt: skip
    y = 189
    for number, (item, price) in enumerate(zip(layout["labels"], layout["values"], strict=True)):
        if striped and number % 2:
            pen.rectangle([LEFT - 6, y, RIGHT + 6, y + step], fill=(232, 232, 225))
        page.text((LEFT, y + step / 2), item.capitalize(), 25, f"price of {item}", face, "lm")
        page.text((RIGHT, y + step / 2), price, 26, "", face, "rm")
        y += step
        pen.line([(LEFT - 6, y), (RIGHT + 6, y)], fill=GREY)
    pen.line([(LEFT - 6, y), (RIGHT + 6, y)], fill=INK, width=3)
    page.text((LEFT, y + 21), rng.choice(("Total", "TOTAL", "Sum total")), 26, "total", face, "lm")
    page.text((RIGHT, y + 21), layout["total"], 29, "", face, "rm")
    if below:
        words = rng.choice(("All in {}", "Paid in {}", "Prices in {}", "Currency: {}")).format(layout["currency"])
        page.text((LEFT, y + 49), words, 24, "currency", face, "lm")
