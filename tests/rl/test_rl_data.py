import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from caprl_utils import prompts
from caprl_utils.config import load_experiment
from caprl_utils.errors import UserError
from caprl_utils.rl.data import data_file, load_data
from caprl_utils.schema import Data


@pytest.fixture
def file(runs):
    return runs / "tiny" / "curation" / "main" / "qa.parquet"


def test_rows_are_what_trl_takes(file):
    rows, pictures, _ = load_data(file, Data(), num_images=100)
    assert sorted(rows.column_names) == ["id", "image", "prompt", "questions"] and len(rows) == 6
    row, question = rows[0], rows[0]["questions"][0]
    assert row["prompt"] == [{"role": "user", "content": prompts.CAPTION}]
    assert pictures(row["image"]).size == (56, 56)
    assert question["options"] == ["1", "2", "3", "4"] and question["answer"] in "BCD"


def test_subsets_and_a_smaller_set_is_part_of_the_larger(file):
    ids = [set(load_data(file, Data(num_images=n), num_images=100).rows["id"]) for n in (2, 3, 5)]
    assert [len(i) for i in ids] == [2, 3, 5] and ids[0] < ids[1] < ids[2]
    assert load_data(file, Data(ids=["*-01", "*-03"]), num_images=9).rows["id"] == ["image-01", "image-03"]
    two = load_data(file, Data(questions_per_image=2), num_images=9).rows
    three = load_data(file, Data(), num_images=9).rows
    for a, b in zip(two["questions"], three["questions"], strict=True):
        assert len(a) == 2 and all(q in b for q in a)
    with pytest.raises(UserError, match="0 images of 6 remain, the run needs 4"):
        load_data(file, Data(min_questions=4), num_images=9, min_images=4)


def test_a_file_that_is_missing_or_lacks_columns_is_told(runs, world, tmp_path):
    _, profile = load_experiment(str(world / "small.yaml"), str(world / "tiny.yaml"))
    with pytest.raises(UserError, match=r"no questions at .*nothing.parquet: notebook 01"):
        data_file(profile, Data(file="nothing.parquet"))
    pq.write_table(pa.Table.from_pylist([{"id": "x7"}]), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="has no column image, reward_model"):
        load_data(tmp_path / "bad.parquet", Data(), num_images=1)


@pytest.fixture
def mixed(tmp_path, runs) -> Path:
    """A file with good and bad rows of all kinds, its ids integers; one row names a picture beside the file."""

    def encoded(picture, form="PNG") -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, form)
        return buffer.getvalue()

    good = encoded(Image.new("RGB", (140, 140), "red"))
    seen = Image.new("RGBA", (56, 28), (0, 0, 0, 0))
    Image.new("RGB", (100, 50), "blue").save(tmp_path / "there.png")
    images = [
        {"bytes": good, "path": None}, {"bytes": encoded(seen), "path": None}, {"bytes": None, "path": "there.png"},
        {"bytes": good[:200], "path": None}, {"bytes": encoded(Image.new("RGB", (3000, 10))), "path": None}, None,
        {"bytes": None, "path": "gone.png"}, {"bytes": None, "path": "../outside.png"}, {"bytes": b"x", "path": None},
    ]  # fmt: skip
    asked = {"question": "What?", "choices": ["A) 1", "B) 2"], "answer": "A"}
    cell = {"ground_truth": [asked]}
    rows = [{"id": i, "image": image, "reward_model": cell} for i, image in enumerate(images)]
    rows.append({"id": 99, "image": images[0], "reward_model": {"ground_truth": [asked | {"answer": "Q"}]}})
    nine = asked | {"choices": [f"{letter}) {letter}" for letter in "ABCDEFGHI"]}
    rows.append({"id": 98, "image": images[0], "reward_model": {"ground_truth": [nine]}})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mixed.parquet")
    return tmp_path / "mixed.parquet"


def test_bad_rows_are_set_aside_and_named(mixed, caplog):
    data = load_data(mixed, Data(), num_images=99, refusal=lambda picture: None)
    assert data.rows["id"] == ["0", "1", "2"]
    reasons = {"3": "truncated", "4": "aspect", "5": "empty", "6": "cannot be read", "7": "outside",
               "8": "not an image", "99": "schema", "98": "no letter for the extra"}  # fmt: skip
    assert all(word in data.set_aside[name] for name, word in reasons.items())
    assert "8 of 11 rows of" in caplog.text and "99: reward_model.ground_truth" in caplog.text
    with pytest.raises(UserError, match=r"3 images of 11 remain, the run needs 4.*8 rows are bad: 99: reward_model"):
        load_data(mixed, Data(), num_images=99, min_images=4, refusal=lambda picture: None)
    wide = load_data(mixed, Data(), num_images=99, refusal=lambda p: "too wide" if p.width > 120 else None)
    assert wide.rows["id"] == ["1", "2"] and wide.set_aside["0"] == "too wide"


def test_a_picture_is_what_curation_saw_and_within_the_limit(mixed):
    data = load_data(mixed, Data(), num_images=99, max_pixels=4000, refusal=lambda picture: None)
    pictures = [data.pictures(row["image"]) for row in data.rows]
    assert [p.mode for p in pictures] == ["RGB"] * 3 and pictures[1].getpixel((0, 0)) == (255, 255, 255)
    assert all(p.width * p.height <= 4000 for p in pictures) and pictures[1].size == (56, 28)
