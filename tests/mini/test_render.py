"""Pictures of the mini world: nothing is cut, words do not cover each other, every fact has a cell of its own."""

import itertools

import matplotlib
import numpy as np
import pytest

from caprl_utils.mini.canvas import SIZE, overlap
from caprl_utils.mini.render import CELL, CELLS, anchors, drawn, render
from caprl_utils.mini.world import KINDS, UNSEEN, picture


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_has_the_same_pixels_again(kind):
    shown = picture("rl", 7, kind)
    first = render(shown)
    drawn.cache_clear()
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 3}):  # as a notebook may set it
        assert np.array_equal(first, render(shown)) and not np.array_equal(first, render(picture("rl", 8, kind)))
    assert first.size == (SIZE, SIZE) and first.mode == "RGB"
    first.putpixel((0, 0), (1, 2, 3))
    assert not np.array_equal(first, render(shown)), "the caller's changes stay with the caller"


@pytest.mark.parametrize("kind", (*KINDS, *UNSEEN))
def test_no_word_is_cut_or_covered_and_every_fact_has_a_cell_of_its_own(kind):
    for shown in (picture("rl", number, kind) for number in range(4)):
        boxes, cells = drawn(shown).boxes, anchors(shown)
        for text, (left, top, right, bottom) in boxes:
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE, text
        assert overlap(box for _, box in boxes) < 60, boxes
        assert list(cells) == [fact.key for fact in shown.facts] and len(set(cells.values())) == len(cells)
        assert all(0 <= place < CELLS for cell in cells.values() for place in cell)
        for item in shown.layout["labels"] if kind == "document" else ():  # a label's cell is where the label stands
            left, top, right, bottom = dict(boxes)[item.capitalize()]
            column, row = cells[f"price of {item}"]
            assert abs((left + right) / 2 - (column + 0.5) * CELL) <= CELL
            assert abs((top + bottom) / 2 - (row + 0.5) * CELL) <= CELL


def test_objects_of_a_scene_stand_in_the_order_that_is_told():
    for number in range(20):
        shown = picture("rl", number, "scene")
        places, objects = drawn(shown).places, list(dict.fromkeys(shown.layout["objects"]))
        columns = [places[f"colour of {name}"][0] for name in objects]  # of several the leftmost
        assert all(after - before >= 50 for before, after in itertools.pairwise(columns))
