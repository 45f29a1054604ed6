"""Pictures of the zoo's split, drawn once for all lessons: a chart costs more to draw than a small model to look at."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from caprl_utils import paths
from caprl_utils.mini.canvas import SIZE
from caprl_utils.mini.render import anchors, drawn, render
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.world import KINDS, Picture, picture
from caprl_utils.mini.zoo.models import SIDE
from caprl_utils.mini.zoo.packing import IMAGE_TOKENS, IMAGE_TOKENS_PER_SIDE
from caprl_utils.progress import track

CHUNK = 400
PARTS = {"all": range(24_000), "hard": range(48_000), "fresh": range(48_000, 72_000)}
"""Numbers of pictures by who sees them: the vision tower, the tower at the end (more charts and scenes, what it finds
hard), and language models that look through it: what it knows by heart would teach them to trust it too much."""
NUMBER = PARTS["fresh"].stop
_MOST_FACTS = 16


def picture_of(number: int) -> Picture:
    """Picture `number` of the pool."""
    hard = number in PARTS["hard"] and number not in PARTS["all"]
    kinds = ("chart", "scene", "chart", "scene", "chart") if hard else KINDS
    return picture("zoo", number, kinds[number % len(KINDS)])


def _file(chunk: int, what: str = "pixels") -> Path:
    return paths.RUNS / "zoo" / "pool" / f"{chunk:03d}-{what}.npy"


def _draw(chunk: int) -> None:
    """Draw one chunk into its files: pixels (CHUNK, SIDE, SIDE, 3), the facts' cells (CHUNK, _MOST_FACTS), and ids of
    the values that stand written in other cells (CHUNK, cells), by the middle of each word.
    """
    pixels = np.zeros((CHUNK, SIDE, SIDE, 3), np.uint8)
    cells = np.full((CHUNK, _MOST_FACTS), -1, np.int8)
    written = np.full((CHUNK, IMAGE_TOKENS), -1, np.int16)
    for row in range(CHUNK):
        shown = picture_of(chunk * CHUNK + row)
        pixels[row] = np.asarray(render(shown).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for place, (column, line) in enumerate(anchors(shown).values()):
            cells[row, place] = line * IMAGE_TOKENS_PER_SIDE + column
        values = {fact.value.lower(): fact.value for fact in shown.facts}
        for text, (left, top, right, bottom) in drawn(shown).boxes:
            for hit in re.finditer(r"[A-Za-z]+|[0-9]+", text):
                if value := values.get(hit[0].lower()):
                    x = left + (right - left) * (hit.start() + hit.end()) / 2 / len(text)
                    column, line = (int(at * IMAGE_TOKENS_PER_SIDE // SIZE) for at in (x, (top + bottom) / 2))
                    cell = line * IMAGE_TOKENS_PER_SIDE + column
                    written[row, cell] = shared_tokenizer().convert_tokens_to_ids(f" {value}")
        written[row, cells[row][cells[row] >= 0]] = -1
    np.save(_file(chunk, "cells"), cells)
    np.save(_file(chunk, "written"), written)
    temporary = _file(chunk).with_suffix(".tmp.npy")
    np.save(temporary, pixels)
    temporary.rename(_file(chunk))


@functools.lru_cache(maxsize=1)
def _all() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Pixels by chunk, left in their files, facts' cells (NUMBER, _MOST_FACTS) and written values (NUMBER, cells); what
    is missing is drawn.
    """
    _file(0).parent.mkdir(parents=True, exist_ok=True)
    chunks = range(NUMBER // CHUNK)
    missing = [chunk for chunk in chunks if not _file(chunk).exists()]
    with ProcessPoolExecutor(2) as workers:
        list(track(workers.map(_draw, missing), "drawing the pool", total=len(missing)))
    cells, written = (np.concatenate([np.load(_file(n, what)) for n in chunks]) for what in ("cells", "written"))
    return [np.load(_file(chunk), mmap_mode="r") for chunk in chunks], cells, written


def cells(number: int) -> list[int]:
    """The cell of each fact of a picture, in the order of its facts."""
    return [int(cell) for cell in _all()[1][number] if cell >= 0]


def written(number: int) -> torch.Tensor:
    """(cells,): ids of values that stand written in a picture where no fact has its cell, else -1."""
    return torch.from_numpy(_all()[2][number].astype(np.int64))


def pixels(numbers: Sequence[int], rng: random.Random | None) -> torch.Tensor:
    """(pictures, 3, SIDE, SIDE) bytes; with a generator each is lighter or darker and has less or more contrast."""
    shown = []
    for number in numbers:
        image = _all()[0][number // CHUNK][number % CHUNK]
        if rng:
            changed = image.astype(np.float32) * rng.uniform(0.9, 1.1) + rng.uniform(-12, 12)
            image = np.clip(changed, 0, 255).astype(np.uint8)
        shown.append(image)
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)
