"""What notebook 01 shows: images, what was written about them, what was rejected, how a question fared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from caprl_utils import prompts
from caprl_utils.curation import answering, pipeline
from caprl_utils.curation.export import QUESTIONS_FILE
from caprl_utils.curation.pipeline import Job
from caprl_utils.images import ImageItem
from caprl_utils.records import Answered, Extracted, Question, Rejection, Written

if TYPE_CHECKING:
    import pandas as pd

_CELL, _CAPTION = 140, 16  # pixels


def examples(job: Job, count: int) -> list[ImageItem]:
    """The first good images of the source."""
    return list(islice((item for item in job.images() if item.id in job.good_ids), count))


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
        draw.text((left + 4, top + _CELL), item.id[-22:], fill="black")
    return sheet


def written_about(job: Job, image_id: str) -> str:
    """What the question writer wrote about an image."""
    return next(row.text for row in job.read(pipeline.GENERATED, Written) if row.id == image_id)


def rejections(job: Job) -> Iterator[tuple[str, Rejection]]:
    """Every rejected piece with the id of its image."""
    for row in job.read(pipeline.EXTRACTED, Extracted):
        for piece in row.rejected:
            yield row.id, piece


def questions_table(job: Job) -> pd.DataFrame:
    """questions.parquet: every answered question with its accuracies and verdict."""
    import pandas as pd

    return pd.read_parquet(job.run.folder / QUESTIONS_FILE)


def rounds(job: Job, image_id: str, number: int) -> list[dict[str, Any]]:
    """How the filter model answered one question: one row per round, letters as the model saw them."""
    extracted = next(row for row in job.read(pipeline.EXTRACTED, Extracted) if row.id == image_id)
    answered = next(row for row in job.read(pipeline.ANSWERED, Answered) if row.id == image_id)
    question = extracted.questions[number]
    answers = next(row for row in answered.answers if row.number == number)
    table = []
    for round_, (visual, text) in enumerate(zip(answers.visual, answers.text, strict=True)):
        order = answering.shuffled(job.seed, image_id, number, round_, len(question.options))
        table.append(
            {
                "round": round_ + 1,
                "options shown": ", ".join(question.options[index] for index in order),
                "with image": _option(question, visual),
                "without image": _option(question, text),
                "right": question.answer_text,
            }
        )
    return table


def _option(question: Question, letter: str | None) -> str:
    return "no letter" if letter is None else question.options[prompts.LETTERS.index(letter)]


def funnel(values: dict[str, Any]) -> list[tuple[str, int]]:
    """Steps of the funnel with their counts, from a run's record."""
    verdicts = values["verdicts"]
    answered = values["questions_extracted"]
    leaking = sum(count for name, count in verdicts.items() if name.startswith("answered without"))
    return [
        ("asked for", values["questions_asked_for"]),
        ("well formed", answered),
        ("not answered without the image", answered - leaking),
        ("and answered with it: kept", values["questions_kept"]),
    ]
