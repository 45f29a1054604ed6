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
from caprl_utils.files import appearing
from caprl_utils.mini.render import CELL, CELLS, anchors, drawn, render
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.world import KINDS, Picture, picture
from caprl_utils.mini.zoo.models import SIDE
from caprl_utils.mini.zoo.packing import END, IMAGE_TOKENS
from caprl_utils.progress import track

CHUNK = 400  # pictures in a file
PARTS = {"all": range(24_000), "hard": range(48_000), "fresh": range(48_000, 72_000), "last": range(72_000, 80_000)}
"""Numbers of pictures by who sees them: the vision tower, the tower at the end (more charts and scenes, what it finds
hard), language models that look through it, and captioners at the end: what a model knows by heart would teach the next
to trust it too much."""
ROW = np.dtype([("pixels", np.uint8, (SIDE, SIDE, 3)), ("words", np.int16, (IMAGE_TOKENS, 3))])


def picture_of(number: int) -> Picture:
    """Picture `number` of the pool."""
    hard = number in PARTS["hard"] and number not in PARTS["all"]
    kinds = ("chart", "scene", "chart", "scene", "chart") if hard else KINDS
    return picture("zoo", number, kinds[number % len(KINDS)])


def fact_ids(shown: Picture) -> list[tuple[int, int, int]]:
    """Ids of each fact's key, value and the key told next; after the last one the turn ends."""
    convert = shared_tokenizer().convert_tokens_to_ids
    keys = [convert(f" {fact.word}") for fact in shown.facts]
    values = [convert(f" {fact.value}") for fact in shown.facts]
    return [*zip(keys, values, [*keys[1:], convert(END)], strict=True)]


def cell_words(shown: Picture) -> np.ndarray:
    """(cells, 3): ids of the words that each cell's token stands for, -1 where there is none.

    The cell of a fact has its three words; one in which a value stands written (by the middle of the word) has that,
    ready to be copied.
    """
    found, values = np.full((CELLS, CELLS, 3), -1), {fact.value.lower(): fact.value for fact in shown.facts}
    for text, (left, top, right, bottom) in drawn(shown).boxes:
        for hit in re.finditer(r"[A-Za-z]+|[0-9]+", text):
            if value := values.get(hit[0].lower()):
                x = left + (right - left) * (hit.start() + hit.end()) / 2 / len(text)
                place = int((top + bottom) / 2 // CELL), int(x // CELL)
                found[place][1] = shared_tokenizer().convert_tokens_to_ids(f" {value}")
    for (column, line), ids in zip(anchors(shown).values(), fact_ids(shown), strict=True):
        found[line, column] = ids
    return found.reshape(IMAGE_TOKENS, 3)


def _draw(file: Path) -> None:
    """Draw the pictures of one file."""
    rows = np.empty(CHUNK, ROW)
    for place, row in enumerate(rows):
        shown = picture_of(int(file.stem) * CHUNK + place)
        row["pixels"] = np.asarray(render(shown).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        row["words"] = cell_words(shown)
    with appearing(file, "tmp.npy") as temporary:
        np.save(temporary, rows)


@functools.cache
def _chunks(part: str) -> dict[int, np.ndarray]:
    """The pictures of a part, left in their files; what is missing is drawn."""
    folder, numbers = paths.RUNS / "zoo" / "pictures", PARTS[part]
    folder.mkdir(parents=True, exist_ok=True)
    files = {chunk: folder / f"{chunk:03d}.npy" for chunk in range(numbers.start // CHUNK, -(-numbers.stop // CHUNK))}
    missing = [file for file in files.values() if not file.exists()]
    with ProcessPoolExecutor(2) as workers:
        list(track(workers.map(_draw, missing), "drawing the pool", total=len(missing)))
    return {chunk: np.load(file, mmap_mode="r") for chunk, file in files.items()}


def _row(number: int) -> np.void:
    part = next(part for part, numbers in PARTS.items() if number in numbers)
    return _chunks(part)[number // CHUNK][number % CHUNK]


def words(numbers: Sequence[int]) -> torch.Tensor:
    """(pictures, cells, 3): their `cell_words`."""
    rows = [_row(number)["words"] for number in numbers]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def pixels(numbers: Sequence[int], rng: random.Random | None) -> torch.Tensor:
    """(pictures, 3, SIDE, SIDE) bytes; with a generator each is lighter or darker and has less or more contrast."""
    shown = []
    for number in numbers:
        image = _row(number)["pixels"]
        if rng:
            changed = image.astype(np.float32) * rng.uniform(0.9, 1.1) + rng.uniform(-12, 12)
            image = np.clip(changed, 0, 255).astype(np.uint8)
        shown.append(image)
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)
