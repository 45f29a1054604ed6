"""Draws the pictures of the mini world: 392 x 392 pixels, which the processor halves to 196 x 196 for the models.

Words and numbers are large enough to be read at half size. Where each fact stands is known (`anchors`), so that vision
towers can be taught what a place says.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

from PIL import Image

from caprl_utils.mini import charts, pages, shapes
from caprl_utils.mini.canvas import SIZE, Canvas
from caprl_utils.mini.world import Picture

CELLS = 7
"""Visual tokens along each side of a picture."""
CELL = SIZE // CELLS

_PAINTERS: dict[str, Callable[[dict], Canvas]] = {
    "chart": charts.draw, "infographic": pages.infographic, "document": pages.document, "scene": shapes.scene,
    "geometry": shapes.geometry,
}  # fmt: skip
_CORNERS = {
    "chart type": (0, 0), "largest": (6, 0), "smallest": (6, 1), "range": (0, 1), "trend": (0, 1),
    "header colour": (0, 0), "sky": (3, 0), "ground": (3, 6), "leftmost shape": (0, 3), "rightmost shape": (6, 3),
    "biggest shape": (0, 0), "line colour": (0, 0), "perimeter": (6, 0), "longest side": (6, 6),
    "right angle count": (0, 6),
}  # fmt: skip
"""Cells (column, row) of facts that no single place shows."""


PNGS = 4096  # ours: pictures kept drawn, 200 MB; caption sets and evaluations come back to the same ones


@functools.lru_cache(maxsize=16)
def drawn(picture: Picture) -> Canvas:
    """The image with the places of facts and the boxes of all words (for tests); not to be changed."""
    return _PAINTERS[picture.kind](picture.layout)


@functools.lru_cache(maxsize=PNGS)
def _png(picture: Picture) -> bytes:
    file = io.BytesIO()
    drawn(picture).image.save(file, "png", compress_level=1)
    return file.getvalue()


def render(picture: Picture) -> Image.Image:
    """The picture as an RGB image of 392 x 392 pixels; the same pixels at every call."""
    return Image.open(io.BytesIO(_png(picture))).copy()


def anchors(picture: Picture) -> dict[str, tuple[int, int]]:
    """The cell (column, row) of a 7 x 7 grid that stands for each fact; no cell stands for two.

    A fact with a label belongs to the label's cell, the others to a fixed one; where it is taken, to the nearest free.
    """
    places = drawn(picture).places
    middles = {(c, r): ((c + 0.5) * CELL, (r + 0.5) * CELL) for r in range(CELLS) for c in range(CELLS)}
    free, found = dict(middles), {}
    for fact in sorted(picture.facts, key=lambda fact: fact.key not in places):
        x, y = places.get(fact.key) or middles[_CORNERS[fact.relation]]
        # squared distances; rounded, so that rounding errors decide nothing
        away = {cell: round((a - x) ** 2 + (b - y) ** 2, 3) for cell, (a, b) in free.items()}
        found[fact.key] = min(away, key=away.get)
        del free[found[fact.key]]
    return {fact.key: found[fact.key] for fact in picture.facts}
