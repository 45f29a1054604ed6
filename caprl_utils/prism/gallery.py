"""A gallery of captions (notebook 00): images, what was written about them, which questions were hit and missed.

`write` makes one HTML file that needs nothing else: images as data URIs, no script, no request to anywhere.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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

_PAGE = "font:15px/1.4 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem"
MAX_SIDE_PIXELS = 384  # ours: 2,000 images of this size stay near 30 MB
_COLOURS = {True: "#1b6e3c", False: "#a8322a"}
Rows = Sequence[Mapping[str, Any]]  # of samples.parquet


def collect(samples: Sequence[Sample], rows: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """One item per image, with the captions of every captioner.

    rows: label -> rows of an evaluation. Items hold `id`, `open`, `captions` (label -> texts) and `questions`
    (question, options, gold, scores and answers by label).
    """
    items: dict[str, dict[str, Any]] = {}
    questions: dict[tuple[str, str], dict[str, Any]] = {}
    for sample in samples:
        first = image_ids(sample)[0]
        item = items.setdefault(first, _item(first, sample.images[0]))
        gold = sample.gold if isinstance(sample.gold, str) else ", ".join(map(str, sample.gold))
        question = {"question": sample.question, "options": list(sample.options), "gold": gold}
        questions[sample.benchmark, sample.id] = question | {"scores": {}, "answers": {}}
        item["questions"].append(questions[sample.benchmark, sample.id])
    for label, found in rows.items():
        for row in found:
            question = questions[row["benchmark"], row["sample_id"]]
            texts = items[row["image_id"]]["captions"]
            if row["caption"] is not None and row["caption_index"] >= len(texts.get(label, [])):
                texts.setdefault(label, []).append(row["caption"])
            question["scores"].setdefault(label, []).append(row["score"])
            question["answers"].setdefault(label, []).append(row["answer"])
    return [*items.values()]


def _item(image_id: str, image: Callable[[], Image]) -> dict[str, Any]:
    return {"id": image_id, "open": image, "captions": {}, "questions": []}


def data_uri(image: Image) -> str:
    """The image, scaled down if need be, as a data URI: PNG when small, WebP otherwise."""
    small = as_rgb(image).copy()
    small.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS))
    buffer, kind = io.BytesIO(), "png" if max(image.size) <= 256 else "webp"
    small.save(buffer, format=kind.upper(), **({"optimize": True} if kind == "png" else {"quality": 75}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write(items: Rows, file: Path, title: str) -> Path:
    """Write the cards of all items as one HTML file; the same items give the same bytes."""
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
    write_atomic(file, f"{head}<body style='{_PAGE}'><h1>{html.escape(title)}</h1>{cards(items)}</body>")
    return file


def cards(items: Rows) -> str:
    """Items as plain HTML: image, first caption of each captioner, questions with hit or miss."""
    page = ""
    for item in items:
        page += "<div style='display:flex;gap:14px;margin:10px 0;border-top:1px solid #ccc;padding-top:8px'>"
        page += f"<img alt='{html.escape(item['id'])}' src='{data_uri(item['open']())}' style='width:168px'>"
        page += "<div style='max-width:640px'>"
        for label, (text, *_) in item["captions"].items():
            page += f"<p style='margin:2px 0'><b>{html.escape(label)}</b>: {html.escape(text)}</p>"
        page += f"<ul style='margin:6px 0'>{''.join(map(_card_question, item['questions']))}</ul></div></div>"
    return page


def _card_question(question: Mapping[str, Any]) -> str:
    marks = []
    for label, scores in question["scores"].items():
        hits = sum(score == 1 for score in scores)
        answers = ", ".join(dict.fromkeys(str(answer) for answer in question["answers"][label]))
        text = html.escape(f"{label} {hits}/{len(scores)} ({answers})")
        marks.append(f"<span style='color:{_COLOURS[hits * 2 > len(scores)]}'>{text}</span>")
    option = gold_option(question["gold"], question["options"])
    gold = html.escape(question["gold"] + (f") {option}" if option else ""))
    return f"<li>{html.escape(question['question'])} <b>{gold}</b>: {'; '.join(marks)}</li>"


# --- the quick start (notebook 00) ---


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


def folder_items(
    profile: Profile, captions: pd.DataFrame, folder: Path, label: str,
    questions: Mapping[str, Sequence[Sample]], reader: Backend | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Items for the captioned images of a folder, in the order of the captions.

    captions: a captions file. label: what the captioner is called. questions: about some of the images, by file (see
    `write_examples`); `reader` answers them from the captions alone.
    """
    texts = captions.sort_values("index").groupby("image_id")["caption"].apply(list).to_dict()
    asked = {file: found for file, found in questions.items() if file in texts}
    files = {image_ids(sample)[0]: file for file, found in asked.items() for sample in found}
    samples = [sample for found in asked.values() for sample in found]
    given = {i: written_captions(i, texts[file], label, lambda text: None) for i, file in files.items()}
    rows = preview(profile, samples, given, reader) if samples and reader else []
    items = {files[item["id"]]: item for item in collect(samples, {label: rows})}
    empty = {file: _item(file, partial(open_image, folder / file)) for file in texts}
    return [(empty | items)[f] | {"id": f, "captions": {label: found}} for f, found in texts.items()]
