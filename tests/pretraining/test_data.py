"""Data files: LLaMA-Factory's form, a user's forms, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_utils.errors import UserError
from caprl_utils.pretraining import data

TURNS = [("Please describe this image in detail.", "This is a chart."), ("What?", "The answer is 42")]


def test_written_rows_come_back_and_are_described(tmp_path):
    rows = [data.about_image(f"image-{i}", f"set/image-{i}.png", TURNS) for i in range(3)]
    assert data.write_examples(tmp_path, "align", rows) == 3
    data.write_examples(tmp_path, "sft", rows[:1])
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert list(info) == ["align", "sft"]
    assert info["align"]["formatting"] == "sharegpt"
    assert info["align"]["columns"] == {"messages": "messages", "images": "images"}
    assert data.read_examples(tmp_path / "align.jsonl") == rows
    assert rows[0].messages[0].content.startswith("<image>Please")
    assert "<image>" not in rows[0].messages[2].content


def test_llava_files_are_read_as_list_and_as_lines(tmp_path):
    row = {"id": 7, "image": "a/b.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                         {"from": "gpt", "value": "A star."}]}  # fmt: skip
    for text in (json.dumps([row, row]), json.dumps(row) + "\n" + json.dumps(row)):
        (tmp_path / "llava.json").write_text(text)
        first, _ = data.read_examples(tmp_path / "llava.json")
        assert (first.id, first.images) == ("7", ("a/b.png",))
        assert [m.role for m in first.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": []}, "1 <image> for 0 images"),
        ({"images": ["a.png", "b.png"]}, "1 <image> for 2 images"),
        ({"images": ["../a.png"]}, "leads outside the media folder"),
        ({"images": ["/etc/a.png"]}, "leads outside the media folder"),
        ({"messages": [{"role": "user", "content": "<image>?"}]}, "expected user and assistant in turn"),
        ({"messages": [{"role": "assistant", "content": "<image>"}]}, "expected user and assistant in turn"),
        ({"messages": []}, "expected user and assistant in turn"),
        (
            {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": " "}]},
            "no text",
        ),
        ({"messages": [{"from": "human"}]}, "row 2"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, said):
    good = json.loads(data.about_image("x", "x.png", TURNS[:1]).model_dump_json())
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(UserError, match="row 2") as error:
        data.read_examples(file)
    assert said in str(error.value) and "rows.jsonl" in str(error.value)


@pytest.mark.parametrize("mark", ["<video>", "<audio>", "<image>"])
def test_a_mark_that_stands_for_no_medium_sets_the_row_aside(tmp_path, mark):
    rows = [
        data.about_image(f"r{n}", "x.png", [("What?", text)])
        for n, text in enumerate(("A cat.", f"A {mark}."))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(row.model_dump_json() for row in rows))
    good, bad = data.read_rows(file)
    assert good == rows[0] and isinstance(bad, data.BadRow) and mark in bad.reason and "id r1" in str(bad)
    assert data.mark_in(f"A {mark}.") == mark and data.mark_in("A cat.") is None
    with pytest.raises(UserError, match="row 2"):
        data.read_examples(file)


@pytest.mark.parametrize("text", ["{", "[{]", '{"id": 1}\n{"id"'])
def test_a_file_that_is_no_json_is_named(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=r"rows\.json"):
        data.read_examples(tmp_path / "rows.json")


def test_a_missing_file_and_an_empty_set_are_refused(tmp_path):
    with pytest.raises(UserError, match="no data file"):
        data.read_examples(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="would be empty"):
        data.write_examples(tmp_path, "align", [])


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_a_larger_sample_holds_the_smaller(small, large, seed):
    rows = list(range(40))
    small, large = sorted((small, large))
    assert set(data.sample(rows, small, seed)) <= set(data.sample(rows, large, seed))
    assert len(data.sample(rows, large, seed)) == large


def test_too_small_a_set_is_named():
    with pytest.raises(UserError, match="5 rows are asked for, the data set has 3"):
        data.sample([1, 2, 3], 5, 0)
