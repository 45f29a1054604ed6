"""A gallery of captions (notebook 00): images, what was written about them, which questions were hit and missed.

`write` makes one HTML file that needs nothing else: images as data URIs, no script, no request to anywhere.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.files import write_atomic
from caprl_utils.images import as_rgb, open_image
from caprl_utils.models.base import Backend
from caprl_utils.prism.evaluate import preview
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.scores import gold_option
from caprl_utils.prism.sources import image_ids, written_captions
from caprl_utils.records import Sample
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

MAX_SIDE_PIXELS = 384  # ours: 2,000 images of this size stay near 30 MB
_PAGE = "font:15px/1.4 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem"
_COLOURS = {True: "#1b6e3c", False: "#a8322a"}


def data_uri(image: Image) -> str:
    """The image, scaled down if need be, as a data URI: PNG when small, WebP otherwise."""
    small = as_rgb(image).copy()
    small.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS))
    buffer, kind = io.BytesIO(), "png" if max(image.size) <= 256 else "webp"
    small.save(buffer, format=kind.upper(), **({"optimize": True} if kind == "png" else {"quality": 75}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write(cards: Sequence[str], file: Path, title: str) -> Path:
    """Write cards as one HTML file; the same cards give the same bytes."""
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
    write_atomic(file, f"{head}<body style='{_PAGE}'><h1>{html.escape(title)}</h1>{''.join(cards)}</body>")
    return file


def write_examples(profile: Profile, folder: Path, num_images: int) -> dict[str, list[Sample]]:
    """Write some images of the profile's benchmarks as PNG files; returns file -> the questions about it."""
    found: dict[str, list[Sample]] = {}
    files: dict[str, str] = {}
    by_benchmark = [load_samples(profile, [name]) for name in profile.prism.benchmarks]
    for sample in (sample for row in zip(*by_benchmark, strict=False) for sample in row):  # all kinds in turn
        image_id = image_ids(sample)[0]
        if image_id not in files:
            if len(files) == num_images:
                continue
            files[image_id] = f"{sample.benchmark}/{image_id.rpartition('/')[2]}.png"
            save_png(sample.images[0](), folder / files[image_id])
        found.setdefault(files[image_id], []).append(sample)
    return found


def save_png(image: Image, path: Path) -> None:
    """Write a PNG; one that is there already keeps its time, by which captioning knows its images."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    if not path.is_file() or path.read_bytes() != buffer.getvalue():
        write_atomic(path, buffer.getvalue())


def cards_of(
    profile: Profile, captions: pd.DataFrame, folder: Path, questions: Mapping[str, Sequence[Sample]],
    reader: Backend | None,
) -> list[str]:  # fmt: skip
    """A card in HTML for each captioned image of a folder, in the order of the captions: image, first caption, and of
    its questions, if any, how many captions gave `reader` the right answer.

    captions: a captions file. questions: about some of the images, by file (see `write_examples`).
    """
    texts = captions.sort_values("index").groupby("image_id")["caption"].apply(list).to_dict()
    samples = [sample for file, found in questions.items() if file in texts for sample in found]
    files = {image_ids(sample)[0]: file for file, found in questions.items() for sample in found}
    given = {i: written_captions(i, texts[f], "", lambda text: None) for i, f in files.items() if f in texts}
    answered: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in preview(profile, samples, given, reader) if samples and reader else []:
        answered.setdefault(files[row["image_id"]], {}).setdefault(row["sample_id"], []).append(row)
    return [_card(file, folder / file, found[0], answered.get(file, {}).values()) for file, found in texts.items()]


def _card(name: str, file: Path, caption: str, questions: Iterable[Sequence[Mapping[str, Any]]]) -> str:
    """One image; questions: the rows of each, one for each caption."""
    image = f"<img alt='{html.escape(name)}' src='{data_uri(open_image(file))}' style='width:168px'>"
    style = "display:flex;gap:14px;margin:10px 0;border-top:1px solid #ccc;padding-top:8px"
    asked = "".join(map(_question, questions))
    told = f"<p style='margin:2px 0'>{html.escape(caption)}</p><ul style='margin:6px 0'>{asked}</ul>"
    return f"<div style='{style}'>{image}<div style='max-width:640px'>{told}</div></div>"


def _question(rows: Sequence[Mapping[str, Any]]) -> str:
    """A question with its right answer, and what the reader made of it."""
    first, hits = rows[0], sum(row["score"] == 1 for row in rows)
    option = gold_option(first["gold"], first["options"])
    answers = ", ".join(dict.fromkeys(str(row["answer"]) for row in rows))
    gold = html.escape(first["gold"] + (f") {option}" if option else ""))
    told = html.escape(f"{hits}/{len(rows)} ({answers})")
    mark = f"<span style='color:{_COLOURS[hits * 2 > len(rows)]}'>{told}</span>"
    return f"<li>{html.escape(first['question'])} <b>{gold}</b>: {mark}</li>"
