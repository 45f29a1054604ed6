"""Curated questions as parquet.

qa.parquet         the kept questions in CapRL-QA-75K's schema
leaking.parquet    those answered with and without the image, in the same schema (paper, Table 6)
questions.parquet  all questions with their measurements

All are written row group by row group to a temporary name and renamed when complete.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from caprl_utils.curation.filtering import Verdict, judge, truth_of
from caprl_utils.curation.index import RowIndex
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.images import ImageItem
from caprl_utils.paths import shown
from caprl_utils.records import Answered, Extracted, ImageQA, Question
from caprl_utils.schema import Curation

if TYPE_CHECKING:
    import pyarrow as pa

QA_FILE, LEAKING_FILE, QUESTIONS_FILE = "qa.parquet", "leaking.parquet", "questions.parquet"
_QA_ROWS, _QUESTION_ROWS = 100, 5000  # rows of a row group: images are large


@cache
def qa_schema() -> pa.Schema:
    """Arrow schema of CapRL-QA-75K, with the metadata by which `datasets` decodes the images."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    question = {"question": text, "choices": List(text), "answer": text}
    return Features(
        {
            "id": text,
            "image": Image(),
            "prompt": List({"role": text, "content": text}),
            "data_source": text,
            "reward_model": {"ground_truth": List(question)},
        }
    ).arrow_schema


@cache
def questions_schema() -> pa.Schema:
    """Arrow schema of questions.parquet; `truth` is what the image source knows, if it knows its images."""
    import pyarrow as pa

    text, number, real = pa.string(), pa.int32(), pa.float64()
    return pa.schema(
        [
            ("id", text), ("image_id", text), ("kind", text), ("number", number), ("question", text),
            ("options", pa.list_(text)), ("answer", text), ("visual_accuracy", real), ("text_accuracy", real),
            ("other_accuracy", real), ("open_correct", pa.bool_()), ("unparsed", number), ("verdict", text),
            ("truth", text),
        ]
    )  # fmt: skip


class TableWriter:
    """A parquet file that appears under its name only when it is complete."""

    def __init__(self, path: Path, schema: pa.Schema, group_rows: int) -> None:
        import pyarrow.parquet as pq

        self.path, self._schema, self._group_rows = path, schema, group_rows
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._rows: list[dict[str, Any]] = []
        with full_disk_as_user_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = pq.ParquetWriter(self._temporary, schema)

    def add(self, row: dict[str, Any]) -> None:
        """Add one row."""
        self._rows.append(row)
        if len(self._rows) == self._group_rows:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        with full_disk_as_user_error(self.path):
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._rows:
            self._flush()
        self._file.close()
        if error is None:
            with open(self._temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._temporary, self.path)
        else:
            self._temporary.unlink(missing_ok=True)


def write_qa(path: Path, rows: Iterable[ImageQA]) -> int:
    """Write images with their questions in CapRL-QA-75K's schema; returns how many."""
    count = 0
    with TableWriter(path, qa_schema(), _QA_ROWS) as table:
        for count, row in enumerate(rows, start=1):  # noqa: B007 - the count is the result
            table.add(row.to_row())
    return count


def read_qa(path: Path) -> Iterator[ImageQA]:
    """Read a file in CapRL-QA-75K's schema, ours or the released one, a few rows at a time.

    Raises UserError naming file and row for a row that is not in that form.
    """
    import pyarrow.parquet as pq

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


def write_tables(
    folder: Path,
    images: Iterable[ImageItem],
    extracted: RowIndex[Extracted],
    answered: RowIndex[Answered],
    settings: Curation,
) -> dict[str, Any]:
    """Judge every answered question, write the three tables, and return counts and rates for the record."""
    verdicts: Counter[str] = Counter()
    known: Counter[tuple[str, bool | None, str]] = Counter()
    totals: Counter[str] = Counter()
    with (
        TableWriter(folder / QA_FILE, qa_schema(), _QA_ROWS) as qa,
        TableWriter(folder / LEAKING_FILE, qa_schema(), _QA_ROWS) as leaking,
        TableWriter(folder / QUESTIONS_FILE, questions_schema(), _QUESTION_ROWS) as table,
    ):
        for item in images:
            found, answers = extracted.get(item.id), answered.get(item.id)
            if found is None or answers is None:
                continue
            sets: dict[Verdict, list[Question]] = {Verdict.KEPT: [], Verdict.LEAKS: []}
            for judged in judge(found, answers, settings):
                question = judged.as_question()
                truth = truth_of(question, item.meta)
                table.add({**judged.model_dump(mode="json"), "kind": item.kind, "truth": truth})
                verdicts[judged.verdict] += 1
                totals["unparsed"] += judged.unparsed
                if truth is not None:
                    known[truth, judged.open_correct, judged.verdict] += 1
                if judged.verdict in sets:
                    sets[judged.verdict].append(question)
            totals["images"] += bool(sets[Verdict.KEPT])
            for target, chosen in ((qa, sets[Verdict.KEPT]), (leaking, sets[Verdict.LEAKS])):
                if chosen:
                    row = ImageQA(id=item.id, image=item.encoded(), path=item.path, questions=tuple(chosen))
                    target.add(row.to_row())
    return {
        "questions_kept": verdicts[Verdict.KEPT],
        "images_kept": totals["images"],
        "verdicts": dict(verdicts),
        "unparsed_answers": totals["unparsed"],
        "truth": _truth_rates(known),
    }


def _truth_rates(known: Counter[tuple[str, bool | None, str]]) -> dict[str, Any] | None:
    """How the filter did where the source knows its images; None where it does not.

    leaking_removed: share of the questions made to leak that are gone. sound_seen_kept: of the sound ones
    whose answer the filter model names without options, the share that is kept. precision: share of sound
    ones among the kept.
    """
    if not known:
        return None
    kept, leaking, seen = Verdict.KEPT, _pick(known, truth="leaking"), _pick(known, truth="sound", seen=True)
    kept_all = _pick(known, verdict=kept)
    return {
        "leaking": leaking,
        "leaking_removed": _share(leaking - _pick(known, truth="leaking", verdict=kept), leaking),
        "sound_seen": seen,
        "sound_seen_kept": _share(_pick(known, truth="sound", seen=True, verdict=kept), seen),
        "sound": _pick(known, truth="sound"),
        "sound_kept": _share(_pick(known, truth="sound", verdict=kept), _pick(known, truth="sound")),
        "kept": kept_all,
        "precision": _share(_pick(known, truth="sound", verdict=kept), kept_all),
    }


def _pick(
    known: Counter[tuple[str, bool | None, str]],
    truth: str | None = None,
    seen: bool | None = None,
    verdict: str | None = None,
) -> int:
    wanted = (truth, seen, verdict)
    fits = (
        count
        for key, count in known.items()
        if all(want is None or want == value for want, value in zip(wanted, key, strict=True))
    )
    return sum(fits)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
