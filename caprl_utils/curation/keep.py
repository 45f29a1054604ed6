"""Keep what the image answers and nothing else does, and write the questions as parquet, row group by row group:

qa.parquet and leaking.parquet (paper, Table 6: answered with and without the image) in CapRL-QA-75K's schema, and
questions.parquet, all questions with their measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from caprl_utils.curation.extract import QuestionSet
from caprl_utils.errors import UserError
from caprl_utils.files import appearing
from caprl_utils.images import ImageItem, encode
from caprl_utils.paths import shown
from caprl_utils.records import ImageQA, Question, text_key
from caprl_utils.runs import RowStore
from caprl_utils.schema import Curation

QA_FILE, LEAKING_FILE, QUESTIONS_FILE = "qa.parquet", "leaking.parquet", "questions.parquet"
_QA_ROWS, _QUESTION_ROWS = 100, 5000  # rows of a row group: images are large
_TEXT, _NUMBER, _REAL = pa.string(), pa.int32(), pa.float64()
_QUESTIONS = pa.schema([
    ("id", _TEXT), ("image_id", _TEXT), ("kind", _TEXT), ("number", _NUMBER), ("question", _TEXT),
    ("options", pa.list_(_TEXT)), ("answer", _TEXT), ("visual_accuracy", _REAL), ("text_accuracy", _REAL),
    ("other_accuracy", _REAL), ("open_correct", pa.bool_()), ("unparsed", _NUMBER), ("verdict", _TEXT),
    ("truth", _TEXT),  # what the image source knows, if it knows its images
])  # fmt: skip


# The rule


KEPT, LEAKS = "kept", "answered without the image"


def verdict(visual: float, text: float, limits: Curation) -> str:
    """What the filter says about a question. Both limits are strict: one exactly at a limit is dropped."""
    visible, leaks = visual > limits.min_visual_accuracy, text >= limits.max_text_accuracy
    if visible:
        return LEAKS if leaks else KEPT
    return "answered without the image, not with it" if leaks else "not answered with the image"


def measured(image_id: str, question: Question) -> dict[str, Any]:
    """An answered question with its shares of right letters (None: no rounds). open_correct: right without options."""

    def accuracy(letters: tuple[str | None, ...]) -> float | None:
        return sum(letter == question.answer for letter in letters) / len(letters) if letters else None

    named = question.open_answer
    return {
        "id": f"{image_id}#{question.number}", "image_id": image_id,
        **question.model_dump(include={"number", "question", "options", "answer"}),
        **{f"{view}_accuracy": accuracy(getattr(question, view)) for view in ("visual", "text", "other")},
        "open_correct": None if named is None else text_key(named) == text_key(question.answer_text),
        "unparsed": (*question.visual, *question.text).count(None),
    }  # fmt: skip


# The tables


@cache
def qa_schema() -> pa.Schema:
    """Arrow schema of CapRL-QA-75K, with the metadata by which `datasets` decodes the images."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    question = {"question": text, "choices": List(text), "answer": text}
    return Features({
        "id": text,
        "image": Image(),
        "prompt": List({"role": text, "content": text}),
        "data_source": text,
        "reward_model": {"ground_truth": List(question)},
    }).arrow_schema  # fmt: skip


@contextmanager
def table_writer(path: Path, schema: pa.Schema, group_rows: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds a row to a parquet file; the file appears under its name only when it is complete."""
    rows: list[dict[str, Any]] = []

    def flush() -> None:
        file.write_table(pa.Table.from_pylist(rows, schema=schema))
        rows.clear()

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == group_rows:
            flush()

    with appearing(path) as temporary, pq.ParquetWriter(temporary, schema) as file:
        yield add
        if rows:
            flush()


def read_qa(path: Path) -> Iterator[ImageQA]:
    """Rows of a file in CapRL-QA-75K's schema, a few at a time. Raises UserError for a row in another form."""
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_QA_ROWS):
            for row in batch.to_pylist():
                number += 1
                try:
                    yield ImageQA.from_row(row)
                except (KeyError, TypeError, ValidationError, ValueError) as error:
                    raise UserError(
                        f"{shown(path)}, row {number} ({row.get('id')!r}) is not in CapRL-QA-75K's schema: "
                        f"{str(error).splitlines()[0]}. Mend or remove that row."
                    ) from None


def write_tables(folder: Path, images: Iterable[ImageItem], answered: RowStore, limits: Curation) -> dict[str, Any]:
    """Judge all questions (a `QuestionSet` an image), write the three tables; counts and rates for the record."""
    with (
        table_writer(folder / QA_FILE, qa_schema(), _QA_ROWS) as add_kept,
        table_writer(folder / LEAKING_FILE, qa_schema(), _QA_ROWS) as add_leaking,
        table_writer(folder / QUESTIONS_FILE, _QUESTIONS, _QUESTION_ROWS) as add_measured,
    ):
        for item in images:
            chosen: dict[str, list[Question]] = {}
            for question in answered.get(item.id, QuestionSet).questions if item.id in answered else ():
                row = measured(item.id, question)
                said = verdict(row["visual_accuracy"], row["text_accuracy"], limits)
                truth = _truth_of(question, item.meta) if "facts" in item.meta else None
                add_measured(row | {"kind": item.kind, "verdict": said, "truth": truth})
                chosen.setdefault(said, []).append(question)
            for said, add in ((KEPT, add_kept), (LEAKS, add_leaking)):
                if said in chosen:
                    picture = encode(item.open())[0]  # every program is to see what was asked about
                    qa = ImageQA(id=item.id, image=picture, path=item.path, questions=chosen[said])
                    add(qa.to_row())
    return _counts(folder / QUESTIONS_FILE)


def _truth_of(question: Question, meta: dict[str, Any]) -> str:
    """What an image source that knows its images (`registry.DrawnSource`) says about a question."""
    key = meta["asked"].get(question.question)
    for name, label in (("known", "leaking"), ("facts", "sound")):
        if key in meta[name]:
            return label if text_key(question.answer_text) == text_key(meta[name][key]) else "wrong answer"
    return "unknown fact"


def _counts(questions: Path) -> dict[str, Any]:
    """What a questions.parquet holds; truth: how the filter did where the source knows its images.

    leaking_removed: share of the questions made to leak that are gone. precision: share of sound ones among the kept.
    """
    columns = ["image_id", "verdict", "truth", "unparsed"]
    rows = pd.read_parquet(questions, columns=columns, dtype_backend="pyarrow")

    def share(part: pd.Series, whole: pd.Series) -> float | None:
        return float(part[whole].mean()) if whole.any() else None

    known = rows["truth"].fillna("")  # missing where the source does not know its images
    kept, leaking, sound = rows["verdict"] == KEPT, known == "leaking", known == "sound"
    truth = {
        "leaking": int(leaking.sum()), "leaking_removed": share(~kept, leaking),
        "sound": int(sound.sum()), "sound_kept": share(kept, sound), "precision": share(sound, kept),
    }  # fmt: skip
    return {
        "questions_kept": int(kept.sum()),
        "images_kept": int(rows["image_id"][kept].nunique()),
        "verdicts": {name: int(count) for name, count in rows["verdict"].value_counts().items()},
        "unparsed_answers": int(rows["unparsed"].sum()),
        "truth": truth if rows["truth"].notna().any() else None,
    }
