"""The rule that keeps a question; CapRL-QA-75K's schema in and out: released files drop in, ours load elsewhere."""

import io

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.curation import keep
from caprl_utils.curation.keep import measured, qa_schema, read_qa, table_writer, verdict
from caprl_utils.errors import UserError
from caprl_utils.records import ImageQA, Question


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 60), colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def rows() -> list[ImageQA]:
    question = Question(question="Welche Farbe (x²)?", options=("rot", "50 %", "A) b", "青"), answer="D")
    return [ImageQA(id=str(i), image=png(c), path=f"{c}.png", questions=(question,) * (i + 1))
            for i, c in enumerate(("red", "blue"))]  # fmt: skip


def write_qa(path, rows):
    with table_writer(path, qa_schema(), group_rows=100) as add:
        for row in rows:
            add(row.to_row())


@pytest.mark.parametrize(
    ("visual", "text", "expected"),
    [("AAAA", "BBBB", "kept"), ("AAAB", "BBBB", "not answered with the image"),
     ("AAAA", "ABBB", "answered without the image"), ("AAAA", [None, "B", "C", "D"], "kept"),
     ("ABBB", "AAAA", "answered without the image, not with it"), ([None] * 4, "BBBB", "not answered with the image")],
)  # fmt: skip
def test_kept_is_what_is_seen_and_not_guessed_and_both_limits_are_strict(visual, text, expected):
    question = Question(question="Which?", options=("a", "b", "c", "d"), answer="A", number=2,
                        visual=tuple(visual), text=tuple(text), open_answer="A.")  # fmt: skip
    row = measured("image 7", question)
    assert row["id"] == "image 7#2" and row["open_correct"] and row["other_accuracy"] is None
    assert row["unparsed"] == [*visual, *text].count(None)
    limits = load_profile("smoke").curation
    assert verdict(row["visual_accuracy"], row["text_accuracy"], limits) == expected


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


def test_a_source_that_does_not_know_its_images_says_nothing_of_the_truth(tmp_path):
    question = Question(question="Which?", options=("a", "b"), answer="A", number=1, visual=("A",), text=("B",),
                        open_answer="a")  # fmt: skip
    rows = [measured(f"i{n}", question) | {"verdict": "kept", "truth": None} for n in range(2)]
    pq.write_table(pa.Table.from_pylist(rows, schema=keep._QUESTIONS), file := tmp_path / "questions.parquet")
    counts = keep._counts(file)
    assert counts["truth"] is None and (counts["questions_kept"], counts["images_kept"]) == (2, 2)
