"""A gallery of captions: images, what several captioners wrote, which questions were hit and missed.

`write` makes one HTML file that needs nothing else: images as data URIs, decoded only when they come into
        view, no request to anywhere. Sorted by disagreement of the captioners; filter box, model and
        benchmark menus, arrow keys.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.prism.prism import image_ids
from caprl_utils.prism.prism_scores import read_samples

if TYPE_CHECKING:
    from PIL.Image import Image

    from caprl_utils.prism.loaders import Sample

TEMPLATE = Path(__file__).with_suffix(".html")
MAX_SIDE_PIXELS = 384  # ours: 2,000 images of this size stay near 30 MB
_COLOURS = {True: "#1b6e3c", False: "#a8322a"}


def collect(samples: Sequence["Sample"], runs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """One item per image: captions and scores of every captioner, most disagreement first.

    runs: label -> folder of a finished Prism run. Items hold `id`, `benchmark`, `open`, `captions` (label
    -> texts), `questions` (question, options, gold, scores and answers by label), `score` (label ->
    mean), `disagreement`. Raises UserError when a run is missing or was made on other samples.
    """
    rows = {label: read_samples(folder) for label, folder in runs.items()}
    items = collect_rows(samples, rows)
    return sorted(items, key=lambda item: (-item["disagreement"], item["id"]))


def collect_rows(
    samples: Sequence["Sample"], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """`collect` from rows (see `prism_scores.score_rows`) by label, in the order of the samples."""
    items: dict[str, dict[str, Any]] = {}
    questions: dict[tuple[str, str], dict[str, Any]] = {}
    for sample in samples:
        first = image_ids(sample)[0]
        item = items.setdefault(first, _new_item(first, sample))
        questions[sample.benchmark, sample.id] = question = _new_question(sample)
        item["questions"].append(question)
    for label, found in rows.items():
        for row in found:
            if (row["benchmark"], row["sample_id"]) not in questions:
                raise UserError(
                    f"{label}: sample {row['sample_id']} of {row['benchmark']} is not in the gallery"
                )
            _add_row(items[row["image_id"]], questions[row["benchmark"], row["sample_id"]], label, row)
    for item in items.values():
        _finish(item)
    return list(items.values())


def item_without_questions(name: str, image: Callable[[], "Image"]) -> dict[str, Any]:
    """An item for an image about which nothing is asked; its captions are to be filled in."""
    return {
        "id": name, "benchmark": "", "open": image, "captions": {}, "questions": [], "score": {},
        "disagreement": 0.0,
    }  # fmt: skip


def _new_item(image_id: str, sample: "Sample") -> dict[str, Any]:
    return {
        "id": image_id,
        "benchmark": sample.benchmark,
        "open": sample.images[0],
        "captions": {},
        "questions": [],
    }


def _new_question(sample: "Sample") -> dict[str, Any]:
    gold = sample.gold if isinstance(sample.gold, str) else ", ".join(map(str, sample.gold))
    return {
        "question": sample.question,
        "options": list(sample.options),
        "gold": gold,
        "scores": {},
        "answers": {},
    }


def _add_row(item: dict[str, Any], question: dict[str, Any], label: str, row: Mapping[str, Any]) -> None:
    if row["caption"] is not None:
        texts = item["captions"].setdefault(label, [])
        if row["caption_index"] >= len(texts):
            texts.append(row["caption"])
    question["scores"].setdefault(label, []).append(row["score"])
    question["answers"].setdefault(label, []).append(row["answer"])


def _finish(item: dict[str, Any]) -> None:
    """Mean score by label over the item's questions, and how far the captioners are apart."""
    found: dict[str, list[float]] = {}
    for question in item["questions"]:
        for label, scores in question["scores"].items():
            found.setdefault(label, []).extend(score for score in scores if score is not None)
    item["score"] = {label: sum(scores) / len(scores) for label, scores in found.items() if scores}
    means = list(item["score"].values())
    item["disagreement"] = max(means) - min(means) if means else 0.0


def data_uri(image: "Image", max_side_pixels: int = MAX_SIDE_PIXELS) -> str:
    """The image, scaled down if need be, as a data URI: PNG when small, WebP otherwise."""
    small = image.convert("RGB")
    small.thumbnail((max_side_pixels, max_side_pixels))
    buffer, kind = io.BytesIO(), "png" if max(image.size) <= 256 else "webp"
    small.save(buffer, format=kind.upper(), **({"optimize": True} if kind == "png" else {"quality": 75}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write(items: Sequence[Mapping[str, Any]], file: Path, title: str) -> Path:
    """Write the gallery of `collect`'s items as one HTML file; the same items give the same bytes."""
    labels = list(dict.fromkeys(label for item in items for label in (*item["score"], *item["captions"])))
    content = [
        {**{k: v for k, v in item.items() if k != "open"}, "image": data_uri(item["open"]())}
        for item in items
    ]
    data = json.dumps({"title": title, "labels": labels, "items": content}, ensure_ascii=False)
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", html.escape(title))
    # "</" would end the script element; JSON allows the slash to be escaped
    write_atomic(file, page.replace("{{data}}", data.replace("</", "<\\/")))
    return file


def cards(items: Sequence[Mapping[str, Any]]) -> str:
    """A few items as plain HTML for a notebook: image, first caption of each captioner, questions with
    hit or miss.
    """
    return "".join(_card(item) for item in items)


def _card(item: Mapping[str, Any]) -> str:
    captions = "".join(
        f"<p style='margin:2px 0'><b>{html.escape(label)}</b>: {html.escape(texts[0])}</p>"
        for label, texts in item["captions"].items()
    )
    questions = "".join(_card_question(question) for question in item["questions"])
    return (
        "<div style='display:flex;gap:14px;margin:10px 0;border-top:1px solid #ccc;padding-top:8px'>"
        f"<img alt='{html.escape(item['id'])}' src='{data_uri(item['open']())}' style='width:168px'>"
        f"<div style='max-width:640px'>{captions}<ul style='margin:6px 0'>{questions}</ul></div></div>"
    )


def _card_question(question: Mapping[str, Any]) -> str:
    marks = []
    for label, scores in question["scores"].items():
        hits = sum(score == 1 for score in scores)
        colour = _COLOURS[hits * 2 > len(scores)]
        answers = ", ".join(dict.fromkeys(str(answer) for answer in question["answers"][label]))
        text = html.escape(f"{label} {hits}/{len(scores)} ({answers})")
        marks.append(f"<span style='color:{colour}'>{text}</span>")
    gold = html.escape(f"{question['gold']}{_option(question)}")
    return f"<li>{html.escape(question['question'])} <b>{gold}</b>: {'; '.join(marks)}</li>"


def _option(question: Mapping[str, Any]) -> str:
    """The text of a gold letter's option."""
    place = ord(question["gold"][0]) - ord("A") if len(question["gold"]) == 1 else -1
    return f") {question['options'][place]}" if 0 <= place < len(question["options"]) else ""
