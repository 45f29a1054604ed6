"""What notebook 01 shows: images, how a question fared, how many questions are left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image, ImageDraw

from caprl_utils import prompts
from caprl_utils.curation import pipeline
from caprl_utils.curation.extract import QuestionSet
from caprl_utils.curation.keep import measured
from caprl_utils.curation.pipeline import Job
from caprl_utils.images import ImageItem

_CELL, _CAPTION = 140, 16  # pixels


def contact_sheet(items: Sequence[ImageItem], columns: int = 6) -> Image.Image:
    """All images on one sheet with their ids, for the human check that nothing unsafe is among them."""
    lines = -(-len(items) // columns)
    sheet = Image.new("RGB", (columns * _CELL, lines * (_CELL + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, item in enumerate(items):
        left, top = number % columns * _CELL, number // columns * (_CELL + _CAPTION)
        small = item.image.copy()
        small.thumbnail((_CELL - 8, _CELL - 8))
        sheet.paste(small, (left + 4, top + 4))
        name = Path(item.id).stem
        draw.text((left + 4, top + _CELL), name if len(name) <= 22 else f"…{name[-21:]}", fill="black")
    return sheet


def accuracies(job: Job) -> pd.DataFrame:
    """Every answered question with its accuracies, before any verdict."""
    rows = job.rows(pipeline.ANSWERED).read(QuestionSet)
    return pd.DataFrame(measured(row.id, question) for row in rows for question in row.questions)


def rounds(job: Job, image_id: str, number: int) -> list[dict[str, Any]]:
    """How the filter model answered one question: one row per round, letters as the model saw them."""
    answered = job.rows(pipeline.ANSWERED).get(image_id, QuestionSet)
    question = next(one for one in answered.questions if one.number == number)
    options = dict(zip(prompts.LETTERS, (*question.options, pipeline.NONE), strict=False))
    shown = zip(pipeline.orders(job, image_id, question), question.visual, question.text, strict=True)
    return [
        {
            "round": round_, "options shown": ", ".join(question.options[index] for index in order),
            "with image": options.get(visual, "no letter"), "without image": options.get(text, "no letter"),
            "right": question.answer_text,
        }
        for round_, (order, visual, text) in enumerate(shown, start=1)
    ]  # fmt: skip


def draw_funnel(steps: Sequence[tuple[str, int]]) -> None:
    """How many questions are left after each step, and their share of the first."""
    import matplotlib.pyplot as plt

    names, counts = zip(*reversed(steps), strict=True)
    axes = plt.subplots(figsize=(7.5, 2.0), constrained_layout=True)[1]
    bars = axes.barh(names, counts, color="#0b3c6f")
    axes.bar_label(bars, [f"{count:,} ({count / counts[-1]:.0%})" for count in counts], padding=3)
    axes.set(xlabel="questions", xlim=(0, 1.25 * counts[-1]), title="From what was asked for to what is kept")
    axes.spines[["top", "right"]].set_visible(False)
    plt.show()
