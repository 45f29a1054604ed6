"""Cards of captions for notebooks and the quick start's page: an image, what was written about it with true and false
statements marked, and which questions a reader answers from it. HTML that needs nothing else: images are data URIs.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from caprl_utils.files import write_atomic
from caprl_utils.images import as_rgb
from caprl_utils.prism.benchmarks import averaged
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.scores import gold_option
from caprl_utils.prism.sources import image_ids
from caprl_utils.prism.told import sentences
from caprl_utils.records import Sample
from caprl_utils.schema import Profile

MAX_SIDE_PIXELS = 384  # ours: 2,000 images of this size stay near 30 MB
SHOWN_PIXELS = 190
Tick = tuple[bool, str]  # whether it went well, and what
GREEN, RED, GREY = "#1b6e3c", "#a8322a", "#777777"
_MARKS = {  # kind of a sentence -> how it stands; all others are false
    None: "{}", "true": f"<span style='color:{GREEN}'>{{}}</span>", "repeat": f"<s style='color:{GREY}'>{{}}</s>",
}  # fmt: skip
_FALSE = f"<b style='color:{RED}'>✗ {{}}</b>"
_PAGE = "font:15px/1.4 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem"
LEGEND = f"{_MARKS['true'].format('true')}, {_FALSE.format('false')}, {_MARKS['repeat'].format('said before')}"


def data_uri(image: Image) -> str:
    """The image, scaled down if need be, as a data URI: PNG of few colours for drawings, WebP for photographs."""
    small, buffer = as_rgb(image).copy(), io.BytesIO()
    small.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS))
    drawn = small.getcolors(maxcolors=4096) is not None
    if drawn:
        small.quantize(64).save(buffer, format="PNG", optimize=True)
    else:
        small.save(buffer, format="WEBP", quality=75)
    return f"data:image/{'png' if drawn else 'webp'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def marked(caption: str, meta: Mapping[str, Any]) -> str:
    """A caption in HTML, its true, false and repeated statements marked where the image's facts are known."""
    kinds = sentences(caption, meta)
    return " ".join(_MARKS.get(kind, _FALSE).format(html.escape(text)) for text, kind in kinds)


def card(
    image: Image, captions: Mapping[str, str | None], meta: Mapping[str, Any],
    ticks: Mapping[str, Sequence[Tick]] | None = None,
) -> str:  # fmt: skip
    """An image beside captions of it, by who wrote them, each with its ticks and crosses below. None: who looked."""
    parts = []
    for name, caption in captions.items():
        text = "(looks at the image)" if caption is None else marked(caption, meta) or "(nothing)"
        parts.append(f"<p style='margin:4px 0'><b>{html.escape(name)}:</b> {text}</p>")
        signs = [(GREEN, "✓", what) if good else (RED, "✗", what) for good, what in (ticks or {}).get(name, ())]
        lines = [f"<span style='color:{colour}'>{sign}</span> {html.escape(what)}" for colour, sign, what in signs]
        parts.append(f"<p style='margin:2px 0 8px 1em;font-size:90%'>{'<br>'.join(lines)}</p>" if lines else "")
    cell = "vertical-align:top;text-align:left;padding:8px;white-space:normal"
    picture = f"<img src='{data_uri(image)}' width='{SHOWN_PIXELS}' alt='the image'>"
    return (
        f"<table style='width:100%;max-width:940px'><tr><td style='{cell};width:{SHOWN_PIXELS}px'>{picture}</td>"
        f"<td style='{cell}'>{''.join(parts)}</td></tr></table>"
    )


def card_of(sample: Sample, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A card of a sample's image with each captioner's first caption and the questions that were answered from it, with
    their right answers, and what the reader said where that was wrong. rows: captioner -> rows of its samples.parquet.
    """
    place, captions, ticks = (image_ids(sample)[0], 0), {}, {}
    for name, some in rows.items():
        for row in some:
            if (row["image_id"], row["caption_index"]) == place:
                captions.setdefault(name, row["caption"])
                text = f"{row['question'].splitlines()[0]} {gold_option(row['gold'], row['options']) or row['gold']}"
                said = gold_option(str(row["parsed"]), row["options"]) or str(row["answer"] or "nothing").strip()
                good = row["score"] == 1
                who = "the model" if row["caption"] is None else "the reader"
                ticks.setdefault(name, []).append((good, text if good else f"{text} ({who}: {said[:60]})"))
    return card(sample.images[0](), captions, sample.meta, ticks)


def write(cards: Sequence[str], file: Path, title: str) -> Path:
    """Write cards as one HTML file; the same cards give the same bytes."""
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
    write_atomic(file, f"{head}<body style='{_PAGE}'><h1>{html.escape(title)}</h1>{''.join(cards)}</body>")
    return file


def write_examples(profile: Profile, folder: Path, num_images: int) -> dict[str, list[Sample]]:
    """Write some images of the benchmarks in the profile's average as PNG files; returns file -> questions about it."""
    found: dict[str, list[Sample]] = {}
    by_benchmark = [load_samples(profile, [name]) for name in averaged(profile.prism.benchmarks)]
    for sample in (sample for row in zip(*by_benchmark, strict=False) for sample in row):  # all kinds in turn
        file = f"{sample.benchmark}/{image_ids(sample)[0].rpartition('/')[2]}.png"
        if file not in found and len(found) < num_images:
            save_png(sample.images[0](), folder / file)
            found[file] = []
        if file in found:
            found[file].append(sample)
    for other in {*folder.rglob("*.png")} - {folder / file for file in found}:
        other.unlink()  # of other benchmarks, written before
    return found


def save_png(image: Image, path: Path) -> None:
    """Write a PNG; one that is there already keeps its time, by which captioning knows its images."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    if not path.is_file() or path.read_bytes() != buffer.getvalue():
        write_atomic(path, buffer.getvalue())
