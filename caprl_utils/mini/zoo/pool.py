"""Pictures of the zoo's split, drawn once for all lessons: a chart costs more to draw than a small model to look at."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from caprl_utils import paths
from caprl_utils.mini.render import anchors, render
from caprl_utils.mini.world import KINDS, Picture, picture
from caprl_utils.mini.zoo.models import SIDE
from caprl_utils.mini.zoo.packing import IMAGE_TOKENS_PER_SIDE
from caprl_utils.progress import track

SIZE, CHUNK = 24_000, 400
_MOST_FACTS = 16


def picture_of(number: int) -> Picture:
    """Picture `number` of the pool."""
    return picture("zoo", number, KINDS[number % len(KINDS)])


def _draw(chunk: int) -> None:
    """Draw one chunk into its file: pixels (CHUNK, SIDE, SIDE, 3) and the facts' cells (CHUNK, _MOST_FACTS)."""
    pixels = np.zeros((CHUNK, SIDE, SIDE, 3), np.uint8)
    cells = np.full((CHUNK, _MOST_FACTS), -1, np.int8)
    for row in range(CHUNK):
        shown = picture_of(chunk * CHUNK + row)
        pixels[row] = np.asarray(render(shown).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        places = anchors(shown)
        for place, fact in enumerate(shown.facts):
            column, line = places[fact.key]
            cells[row, place] = line * IMAGE_TOKENS_PER_SIDE + column
    np.save(_file(chunk, "cells"), cells)
    temporary = _file(chunk).with_suffix(".tmp.npy")
    np.save(temporary, pixels)
    temporary.rename(_file(chunk))


def _file(chunk: int, what: str = "pixels") -> Path:
    return paths.RUNS / "zoo" / "pool" / f"{chunk:03d}-{what}.npy"


def draw(processes: int = 2) -> None:
    """Draw what is missing."""
    _file(0).parent.mkdir(parents=True, exist_ok=True)
    missing = [chunk for chunk in range(SIZE // CHUNK) if not _file(chunk).exists()]
    with ProcessPoolExecutor(processes) as workers:
        for _ in track(workers.map(_draw, missing), "drawing the pool", total=len(missing)):
            pass


@functools.lru_cache(maxsize=1)
def _all() -> tuple[list[np.ndarray], np.ndarray]:
    """Pixels by chunk, left in their files, and all cells (SIZE, _MOST_FACTS)."""
    draw()
    chunks = range(SIZE // CHUNK)
    cells = np.concatenate([np.load(_file(chunk, "cells")) for chunk in chunks])
    return [np.load(_file(chunk), mmap_mode="r") for chunk in chunks], cells


def cells(number: int) -> list[int]:
    """The cell of each fact of a picture, in the order of its facts."""
    return [int(cell) for cell in _all()[1][number] if cell >= 0]


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
