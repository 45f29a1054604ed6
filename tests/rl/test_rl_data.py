import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caprl_utils import prompts
from caprl_utils.config import load_experiment
from caprl_utils.errors import UserError
from caprl_utils.rl.data import data_file, load_data
from caprl_utils.schema import Data


@pytest.fixture
def file(runs):
    return runs / "tiny" / "curation" / "main" / "qa.parquet"


def test_rows_are_what_trl_takes(file):
    rows = load_data(file, Data(), num_images=100)
    assert sorted(rows.column_names) == ["id", "image", "prompt", "questions"] and len(rows) == 6
    row = rows[0]
    assert row["prompt"] == [{"role": "user", "content": prompts.CAPTION}]
    assert row["image"].size == (140, 140)
    question = row["questions"][0]
    assert question["options"] == ["1", "2", "3", "4"] and question["answer"] in "BCD"


def test_smaller_set_is_part_of_the_larger(file):
    ids = [set(load_data(file, Data(num_images=n), num_images=100)["id"]) for n in (2, 3, 5)]
    assert [len(i) for i in ids] == [2, 3, 5] and ids[0] < ids[1] < ids[2]


def test_subsets(file):
    assert load_data(file, Data(ids=["*-01", "*-03"]), num_images=9)["id"] == ["image-01", "image-03"]
    two = load_data(file, Data(questions_per_image=2), num_images=9)
    three = load_data(file, Data(), num_images=9)
    for a, b in zip(two["questions"], three["questions"], strict=True):
        assert len(a) == 2 and all(q in b for q in a)
    with pytest.raises(UserError, match="0 images of 6 remain, the run needs 4"):
        load_data(file, Data(min_questions=4), num_images=9, min_images=4)


def test_missing_file_says_who_makes_it(runs, world):
    _, profile = load_experiment(str(world / "small.yaml"), str(world / "tiny.yaml"))
    with pytest.raises(UserError, match=r"no questions at .*nothing.parquet: notebook 01"):
        data_file(profile, Data(file="nothing.parquet"))


def test_bad_rows_are_named(tmp_path, runs):
    bad = tmp_path / "bad.parquet"
    row = {"id": "x7", "image": {"bytes": b"", "path": None}}
    pq.write_table(pa.Table.from_pylist([row | {"reward_model": {"ground_truth": [{"question": "q"}]}}]), bad)
    with pytest.raises(UserError, match=r"row 'x7'.*not in CapRL-QA-75K's schema"):
        load_data(bad, Data(), num_images=1)
    pq.write_table(pa.Table.from_pylist([{"id": "x7"}]), bad)
    with pytest.raises(UserError, match="has no column image, reward_model"):
        load_data(bad, Data(), num_images=1)
