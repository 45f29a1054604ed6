"""The rule that keeps a question; CapRL-QA-75K's schema in and out: released files drop in, ours load elsewhere."""

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caprl_utils.config import load_profile
from caprl_utils.curation.extract import QuestionSet
from caprl_utils.curation.keep import LEAKING_FILE, QA_FILE, qa_schema, read_qa, table_writer, write_tables
from caprl_utils.errors import UserError
from caprl_utils.images import ImageItem
from caprl_utils.records import ImageQA, Question
from caprl_utils.runs import RowStore
from tests.rows import png

RED = png("red", (60, 60))


@pytest.fixture
def rows() -> list[ImageQA]:
    question = Question(question="Welche Farbe (x²)?", options=("rot", "50 %", "A) b", "青"), answer="D")
    return [ImageQA(id=str(i), image=png(c, (60, 60)), path=f"{c}.png", questions=(question,) * (i + 1))
            for i, c in enumerate(("red", "blue"))]  # fmt: skip


def write_qa(path, rows):
    with table_writer(path, qa_schema(), group_rows=100) as add:
        for row in rows:
            add(row.to_row())


def test_kept_is_what_is_seen_and_not_guessed_and_both_limits_are_strict(tmp_path):
    """Of images of which the source knows nothing: so nothing is said of the truth."""
    cases = [
        ("AAAA", "BBBB", "kept"), ("AAAB", "BBBB", "not answered with the image"),
        ("AAAA", "ABBB", "answered without the image"), ("AAAA", [None, "B", "C", "D"], "kept"),
        ("ABBB", "AAAA", "answered without the image, not with it"),
        ([None] * 4, "BBBB", "not answered with the image"),
    ]  # fmt: skip
    questions = [
        Question(question="Which?", options=("a", "b", "c", "d"), answer="A", number=number, visual=tuple(visual),
                 text=tuple(text), open_answer="A.")
        for number, (visual, text, _) in enumerate(cases, start=1)
    ]  # fmt: skip
    with RowStore(tmp_path / "answered.jsonl") as answered:
        answered.append(QuestionSet(id="image 7", questions=questions))
        items = [ImageItem(name, lambda: RED) for name in ("image 6", "image 7")]  # of one nothing is known
        counts = write_tables(tmp_path, items, answered, load_profile("smoke").curation)
    table = pd.read_parquet(tmp_path / "questions.parquet")
    assert list(table["verdict"]) == [said for *_, said in cases]
    assert table["id"][1] == "image 7#2" and table["open_correct"].all() and table["other_accuracy"].isna().all()
    assert list(table["unparsed"]) == [[*visual, *text].count(None) for visual, text, _ in cases]
    assert counts["truth"] is None and (counts["questions_kept"], counts["images_kept"]) == (2, 1)
    for file, numbers in ((QA_FILE, (1, 4)), (LEAKING_FILE, (3,))):
        (row,) = read_qa(tmp_path / file)
        assert row.image == RED and len(row.questions) == len(numbers)


def test_the_datasets_library_opens_the_images_and_finds_the_released_columns(rows, tmp_path):
    write_qa(tmp_path / "qa.parquet", rows)
    assert list(read_qa(tmp_path / "qa.parquet")) == rows
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "qa.parquet"), split="train",
                                   cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert loaded.column_names == ["id", "image", "prompt", "data_source", "reward_model"]
    first = loaded[0]
    assert first["image"].size == (60, 60) and first["image"].getpixel((0, 0)) == (255, 0, 0)
    assert first["prompt"] == [{"role": "user", "content": "<image> Please describe this image in detail."}]
    assert first["data_source"] == "image_caption_rl"
    truth = first["reward_model"]["ground_truth"]
    assert truth == [{"question": "Welche Farbe (x²)?", "answer": "D",
                      "choices": ["A) rot", "B) 50 %", "C) A) b", "D) 青"]}]  # fmt: skip


def test_a_file_written_elsewhere_drops_in(rows, tmp_path):
    """As pandas writes it: other string types, other key order, no metadata of ours."""
    text, shuffled = pa.large_string(), [dict(reversed(row.to_row().items())) for row in rows]
    truth = pa.struct([("answer", text), ("choices", pa.large_list(text)), ("question", text)])
    schema = pa.schema([
        ("reward_model", pa.struct([("ground_truth", pa.list_(truth))])), ("data_source", text),
        ("prompt", pa.list_(pa.struct([("content", text), ("role", text)]))),
        ("image", pa.struct([("bytes", pa.binary()), ("path", text)])), ("id", text),
    ])  # fmt: skip
    pq.write_table(pa.Table.from_pylist(shuffled, schema=schema), tmp_path / "released.parquet")
    assert list(read_qa(tmp_path / "released.parquet")) == rows


def test_a_row_in_another_form_is_named(rows, tmp_path):
    broken = rows[1].to_row()
    broken["reward_model"]["ground_truth"][0]["choices"] = ["rot", "blau"]
    pq.write_table(pa.Table.from_pylist([rows[0].to_row(), broken]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, row 2 \('1'\).*does not start with 'A\)'"):
        list(read_qa(tmp_path / "x.parquet"))
