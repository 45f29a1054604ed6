"""Pages of the mini world: infographics and scanned documents."""

from __future__ import annotations

import io
import math
import random

from PIL import Image, ImageChops, ImageDraw

from caprl_utils.mini.canvas import GREY, INK, SIZE, WHITE, Canvas, Colour, fit, ink_on, mix, noise
from caprl_utils.mini.vocabulary import COLOURS

MARGIN = 16
PALE = ((245, 245, 240), (238, 243, 248), (250, 244, 232), (240, 246, 238), (255, 255, 255))


# Infographics


def infographic(layout: dict) -> Canvas:
    """A header with topic and year, the goods with their shares in one of five layouts, and a banner with the region."""
    rng = random.Random(layout["seed"])
    paper = rng.choice(PALE)
    page = Canvas(Image.new("RGB", (SIZE, SIZE), paper))
    colour, face = COLOURS[layout["colour"]], rng.choice(("sans", "sans", "serif", "stix"))
    _header(page, rng, layout, colour, face)
    banner_first = rng.random() < 0.3
    _banner(page, rng, layout["region"], colour, face, 84 if banner_first else 340)
    top = 132 if banner_first else 84
    parts = [(name, int(share)) for name, share in zip(layout["labels"], layout["values"], strict=True)]
    tints = [mix(colour, WHITE, share) for share in (0, 0.35, 0.6, 0.78)]
    rng.choice((_rows, _rows, _tiles, _split, _strip))(page, rng, parts, tints, face, (top, top + 248))
    return page


def _header(page: Canvas, rng: random.Random, layout: dict, colour: Colour, face: str) -> None:
    """The topic and the year, in a band of the header's colour."""
    ink, topic = ink_on(colour), layout["topic"].capitalize()
    page.pen.rectangle([0, 0, SIZE, 78], fill=colour)
    if rng.random() < 0.5:
        title = rng.choice((f"{topic} in figures", f"Facts: {topic}", f"{topic} report"))
        page.text((MARGIN, 27), title, fit([title], 350, 31, face), ink, "topic", face, anchor="lm")
        page.text((MARGIN, 60), rng.choice(("Year {}", "in {}", "Data of {}")).format(layout["year"]), 23, ink, "year",
                  face, anchor="lm")  # fmt: skip
    else:
        page.text((MARGIN, 39), topic, fit([topic], 210, 38, face), ink, "topic", face, anchor="lm")
        if boxed := rng.random() < 0.5:
            page.pen.rounded_rectangle([274, 18, 380, 60], 12, fill=ink)
        page.text((327, 39), layout["year"], 29, colour if boxed else ink, "year", face)


def _banner(page: Canvas, rng: random.Random, region: str, colour: Colour, face: str, top: int) -> None:
    """The region, in a banner of 44 pixels with a small globe."""
    filled = rng.random() < 0.5
    fill = mix(colour, INK, 0.3) if filled else mix(colour, WHITE, 0.82)
    ink, pen, y = ink_on(fill), page.pen, top + 22
    pen.rectangle([0, top, SIZE, top + 44], fill=fill)
    for narrow in (15, 6, 0):
        pen.ellipse([34 - narrow, y - 15, 34 + narrow, y + 15], outline=ink, width=2)
    pen.line([(19, y), (49, y)], fill=ink, width=2)
    words = rng.choice(("Region: {}", "Area: {}", "Where: {}", "Region shown: {}")).format(region)
    page.text((66, y), words, 25, ink, "region", face, anchor="lm")


def _share(page: Canvas, xy, share: int, size: int, face: str, fill: Colour = INK, anchor="mm") -> None:
    page.text(xy, f"{share}%", size, fill, "", face, anchor=anchor)


def _rows(page: Canvas, rng: random.Random, parts, tints, face: str, span: tuple[int, int]) -> None:
    """A row for each good, with a gauge of its share."""
    gauge, left_first = rng.choice((_pie, _ring, _glass, _bar, _people)), rng.random() < 0.5
    height = (span[1] - span[0]) / len(parts)
    for number, (name, share) in enumerate(parts):
        y = span[0] + height * (number + 0.5)
        if number % 2 == 0 and left_first:
            page.pen.rectangle([0, y - height / 2, SIZE, y + height / 2], fill=WHITE)
        wide = gauge in (_bar, _people)
        if wide:  # below name and share
            page.text((MARGIN, y - 13), name.capitalize(), 25, INK, f"share of {name}", face, anchor="lm")
            _share(page, (SIZE - MARGIN, y - 13), share, 27, face, INK, "rm")
            gauge(page.pen, (MARGIN, y + 14), share, tints)
        else:
            x, name_x, anchor = (42, 84, "lm") if left_first else (SIZE - 42, MARGIN, "lm")
            gauge(page.pen, (x, y), share, tints)
            page.text((name_x, y), name.capitalize(), 27, INK, f"share of {name}", face, anchor=anchor)
            _share(page, (SIZE - MARGIN if left_first else SIZE - 84, y), share, 31, face, INK, "rm")


def _pie(pen, xy, share: int, tints, radius: int = 25) -> None:
    box = [xy[0] - radius, xy[1] - radius, xy[0] + radius, xy[1] + radius]
    pen.ellipse(box, fill=tints[3], outline=INK)
    pen.pieslice(box, -90, -90 + 3.6 * share, fill=tints[0])


def _ring(pen, xy, share: int, tints, radius: int = 25) -> None:
    box = [xy[0] - radius, xy[1] - radius, xy[0] + radius, xy[1] + radius]
    pen.arc(box, 0, 360, fill=tints[3], width=radius // 3)
    pen.arc(box, -90, -90 + 3.6 * share, fill=tints[0], width=radius // 3)


def _glass(pen, xy, share: int, tints) -> None:
    x, y = xy
    pen.rectangle([x - 19, y - 25, x + 19, y + 25], fill=WHITE, outline=INK, width=2)
    pen.rectangle([x - 17, y + 23 - 0.46 * share, x + 17, y + 23], fill=tints[0])


def _bar(pen, xy, share: int, tints) -> None:
    x, y = xy
    pen.rounded_rectangle([x, y - 7, x + 360, y + 9], 8, fill=tints[3], outline=GREY)
    pen.rounded_rectangle([x, y - 7, x + 3.6 * share, y + 9], 8, fill=tints[0])


def _people(pen, xy, share: int, tints) -> None:
    """Twenty people, five percent each."""
    for number in range(20):
        x, y = xy[0] + 8 + number * 18, xy[1]
        fill = tints[0] if 5 * number < share else mix(tints[3], GREY, 0.15)
        pen.ellipse([x - 4, y - 10, x + 4, y - 2], fill=fill)
        pen.rectangle([x - 5, y, x + 5, y + 11], fill=fill)


def _tiles(page: Canvas, rng: random.Random, parts, tints, face: str, span: tuple[int, int]) -> None:
    """A tile for each good, two a row, with its share in a ring."""
    for number, (name, share) in enumerate(parts):
        alone = len(parts) == 3 and number == 2
        x, y = (SIZE / 2 if alone else 102 + 188 * (number % 2)), span[0] + 64 + 122 * (number // 2)
        page.pen.rounded_rectangle([x - 88, y - 56, x + 88, y + 56], 10, fill=WHITE, outline=tints[1], width=2)
        _ring(page.pen, (x, y - 15), share, tints, 38)
        _share(page, (x, y - 15), share, 20, face)
        page.text((x, y + 39), name.capitalize(), 25, INK, f"share of {name}", face)


def _split(page: Canvas, rng: random.Random, parts, tints, face: str, span: tuple[int, int]) -> None:
    """One pie or ring of all goods beside the list of their names."""
    right, y, start, radius = rng.random() < 0.5, sum(span) / 2, -90.0, 82
    x, left = (SIZE - 98, MARGIN) if right else (98, 200)
    for (_, share), fill in zip(parts, tints, strict=False):
        page.pen.pieslice([x - radius, y - radius, x + radius, y + radius], start, start + 3.6 * share, fill=fill,
                          outline=INK)  # fmt: skip
        start += 3.6 * share
    if rng.random() < 0.4:
        page.pen.ellipse([x - 40, y - 40, x + 40, y + 40], fill=WHITE, outline=INK)
    _list(page, parts, tints, face, left, span)


def _strip(page: Canvas, rng: random.Random, parts, tints, face: str, span: tuple[int, int]) -> None:
    """One stacked bar of all goods above the list of their names, in two columns."""
    x, y = MARGIN, span[0] + 46
    for (_, share), tint in zip(parts, tints, strict=False):
        end = x + 3.6 * share
        page.pen.rectangle([x, y - 26, end, y + 26], fill=tint, outline=INK)
        x = end
    half = (len(parts) + 1) // 2
    below = (span[0] + 84, span[1])
    _list(page, parts[:half], tints, face, MARGIN, below)
    _list(page, parts[half:], tints[half:], face, 206, below)


def _list(page: Canvas, parts, tints, face: str, left: int, span: tuple[int, int]) -> None:
    """Goods below each other: a swatch, the name, and the share under it."""
    height = (span[1] - span[0]) / max(2, len(parts))
    for number, ((name, share), tint) in enumerate(zip(parts, tints, strict=False)):
        y = span[0] + height * (number + 0.5)
        page.pen.rectangle([left, y - 24, left + 16, y + 24], fill=tint, outline=INK)
        page.text((left + 28, y - 14), name.capitalize(), 25, INK, f"share of {name}", face, anchor="lm")
        _share(page, (left + 28, y + 14), share, 26, face, INK, "lm")


# Documents


def document(layout: dict) -> Canvas:
    """A scan: letterhead, two fields, a small table with its total, the currency, a stamp; slanted, noisy, compressed."""
    rng = random.Random(layout["seed"])
    desk, paper = rng.choice(((150, 140, 130), (90, 95, 100), (200, 200, 205))), mix(WHITE, rng.choice(PALE), 1)
    page = Canvas(Image.new("RGB", (SIZE, SIZE), paper))
    face = rng.choice(("sans", "serif", "mono", "stix", "roman"))
    _letterhead(page, rng, layout["type"], face)
    _fields(page, rng, layout["fields"], face)
    _table(page, rng, layout, face)
    page.turn(rng.uniform(-2, 2), desk)
    grain = noise(rng.choice((14, 24, 36)))
    x, y = rng.randrange(512 - SIZE), rng.randrange(512 - SIZE)
    grain = grain.crop((x, y, x + SIZE, y + SIZE))
    page.image = _compressed(ImageChops.multiply(page.image, Image.merge("RGB", [grain] * 3)), rng.randint(40, 90))
    return page


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _letterhead(page: Canvas, rng: random.Random, kind: str, face: str) -> None:
    """The document's type, in one of five letterheads."""
    style, pen, ink = rng.randrange(5), page.pen, COLOURS[rng.choice(("red", "blue", "green", "purple", "brown"))]
    title = rng.choice((kind.upper(), kind.capitalize()))
    size = fit([title], 250, 36, face)
    if style == 0:  # a band
        pen.rectangle([0, 0, SIZE, 66], fill=ink)
        page.text((SIZE / 2, 36), title, size, WHITE, "document type", face)
    elif style == 1:  # a double rule
        page.text((SIZE / 2, 36), title, size, INK, "document type", face)
        for y in (62, 66):
            pen.line([(MARGIN, y), (SIZE - MARGIN, y)], fill=INK, width=2)
    else:
        page.text((MARGIN + 8, 36), title, size, ink if style == 2 else INK, "document type", face, anchor="lm")
    if style == 2:  # a logo
        pen.ellipse([SIZE - 74, 14, SIZE - 28, 60], outline=ink, width=6)
        pen.polygon([(SIZE - 51, 22), (SIZE - 36, 48), (SIZE - 66, 48)], fill=ink)
    elif style == 3:  # a bar code
        for x in range(SIZE - 96, SIZE - 24, 5):
            pen.rectangle([x, 16, x + rng.choice((1, 2, 3)), 58], fill=INK)
    elif style == 4:  # a line, and at the side a stripe
        pen.rectangle([0, 0, 10, SIZE], fill=ink)
        pen.line([(MARGIN + 8, 64), (SIZE - MARGIN, 64)], fill=ink, width=3)


def _fields(page: Canvas, rng: random.Random, fields, face: str) -> None:
    lined, bold = rng.random() < 0.4, rng.random() < 0.7
    for number, (key, value) in enumerate(fields):
        y = 92 + 34 * number
        box = page.text((MARGIN + 8, y), f"{key.capitalize()}:", 23, GREY if bold else INK, key, face, anchor="lm")
        page.text((max(112, box[2] + 10), y), value, 25, INK, "", face, bold, anchor="lm")
        if lined:
            page.pen.line([(112, y + 16), (262, y + 16)], fill=GREY)


def _table(page: Canvas, rng: random.Random, layout: dict, face: str) -> None:
    """Items and prices, the total under a rule, and the currency where there is room; a stamp beside the fields."""
    pen, left, right = page.pen, MARGIN + 8, SIZE - MARGIN - 8
    y, step = 148, 34
    head, stripes, last = rng.random() < 0.5, rng.random() < 0.4, rng.random() < 0.5
    currency = layout["currency"]
    if head or not last:
        pen.rectangle([left - 6, y, right + 6, y + 30], fill=(215, 215, 210))
        page.text((left, y + 15), rng.choice(("Item", "Goods")), 22, INK, "", face, anchor="lm")
        price = "Price" if last else f"in {currency}"
        page.text((right, y + 15), price, 22, INK, "" if last else "currency", face, anchor="rm")
        y += 32
    for number, (item, price) in enumerate(zip(layout["labels"], layout["values"], strict=True)):
        if stripes and number % 2:
            pen.rectangle([left - 6, y, right + 6, y + step], fill=(235, 235, 228))
        page.text((left, y + step / 2), item.capitalize(), 25, INK, f"price of {item}", face, anchor="lm")
        page.text((right, y + step / 2), price, 26, INK, "", face, anchor="rm")
        y += step
        pen.line([(left - 6, y), (right + 6, y)], fill=GREY)
    pen.line([(left - 6, y), (right + 6, y)], fill=INK, width=3)
    page.text((left, y + 21), rng.choice(("Total", "Total", "TOTAL")), 26, INK, "total", face, anchor="lm")
    page.text((right, y + 21), layout["total"], 29, INK, "", face, anchor="rm")
    y += 42
    if last:
        words = rng.choice(("All in {}", "Paid in {}", "Prices in {}", "Currency: {}")).format(currency)
        page.text((left, y + 16), words, 23, INK, "currency", face, anchor="lm")
        y += 30
    if SIZE - y > 44:
        _signature(pen, rng, (right - 130, y + 4, right, SIZE - 16))
    if rng.random() < 0.6:
        _stamp(page.image, rng)


def _signature(pen: ImageDraw.ImageDraw, rng: random.Random, box) -> None:
    """A line of loops in blue ink."""
    left, top, right, bottom = box
    middle, reach = (top + bottom) / 2, min(14, (bottom - top) / 2)
    loops = rng.uniform(0.35, 0.6)
    points = [(left + t * (right - left) / 60 + 6 * math.sin(t * loops * 2), middle + reach * math.sin(t * loops))
              for t in range(61)]  # fmt: skip
    pen.line(points, fill=(40, 50, 130), width=3, joint="curve")


def _stamp(image: Image.Image, rng: random.Random) -> None:
    """A round stamp, half transparent, over the free corner beside the fields."""
    ink = rng.choice(((190, 30, 40), (40, 60, 160), (30, 120, 70)))
    stamp = Image.new("L", (84, 84))
    pen = ImageDraw.Draw(stamp)
    pen.ellipse([2, 2, 81, 81], outline=190, width=5)
    pen.ellipse([14, 14, 69, 69], outline=150, width=2)
    for angle in range(rng.randrange(72), 360, 72):
        x, y = 42 + 16 * math.cos(math.radians(angle)), 42 + 16 * math.sin(math.radians(angle))
        pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=170)
    image.paste(ink, (rng.randint(284, 296), rng.randint(64, 70)), stamp)
