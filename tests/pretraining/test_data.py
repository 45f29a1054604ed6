"""Rows: LLaMA-Factory's form, a user's forms, what is refused, and the check of tokens and images."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from caprl_utils.errors import UserError
from caprl_utils.pretraining import data
from caprl_utils.records import about_image
from tests.pretraining.conftest import WordCounter

TURNS = [("Please describe this image in detail.", "This is a chart."), ("What?", "The answer is 42")]


def test_written_rows_come_back_and_are_described(tmp_path):
    rows = [about_image(f"image-{i}", f"set/image-{i}.png", TURNS) for i in range(3)]
    data.write_rows(tmp_path, "align", rows)
    data.write_rows(tmp_path, "sft", rows[:1])
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert list(info) == ["align", "sft"]
    assert info["align"]["formatting"] == "sharegpt"
    assert info["align"]["columns"] == {"messages": "messages", "images": "images"}
    assert data.read_rows(tmp_path / "align.jsonl") == rows
    assert rows[0].messages[0].content.startswith("<image>Please")
    assert "<image>" not in rows[0].messages[2].content


GOOD = about_image("x", "x.png", TURNS[:1]).model_dump(mode="json")
ODD_TURNS = "expected user and assistant in turn"
BAD = {
    "up": (GOOD | {"images": ["../a.png"]}, "leads outside the media folder"),
    "absolute": (GOOD | {"images": ["/etc/a.png"]}, "leads outside the media folder"),
    "one turn": (GOOD | {"messages": GOOD["messages"][:1]}, ODD_TURNS),
    "answer first": (GOOD | {"messages": GOOD["messages"][::-1]}, ODD_TURNS),
    "no turns": (GOOD | {"messages": []}, ODD_TURNS),
    "empty": (GOOD | {"messages": [GOOD["messages"][0], {"role": "assistant", "content": " "}]}, "no text"),
    "null": (GOOD | {"messages": [{"role": "user", "content": None}]}, "valid string"),
    "other form": (GOOD | {"messages": [{"from": "human"}]}, "Field required"),
    "no images": (GOOD | {"images": []}, "(id x): 1 <image> for 0 images"),
    "two images": (GOOD | {"images": ["a.png", "b.png"]}, "(id x): 1 <image> for 2 images"),
    "no form": ({"id": 1}, "conversations"),
    "no object": ([1], "neither"),
    "a name": ("x", ""),
    "image": (GOOD | {"images": [{"bytes": "x"}]}, "valid string"),
    **{mark: (about_image("x", "x.png", [("?", f"A {mark}.")]).model_dump(mode="json"), f"(id x): {said}")
       for mark, said in (("<video>", "its text holds <video>"), ("<audio>", "its text holds <audio>"),
                          ("<image>", "2 <image> for 1 images"))},
}  # fmt: skip
LLAVA = {"id": 7, "image": "a/b.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                       {"from": "gpt", "value": "A star."}]}  # fmt: skip


@pytest.mark.parametrize("form", ["list", "lines"])
def test_a_bad_row_is_set_aside_and_the_others_stay(tmp_path, form):
    rows = [GOOD, *(row for row, _ in BAD.values()), LLAVA]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows) if form == "list" else "\n".join(map(json.dumps, rows)))
    first, *found, last = data.read_rows(file)
    assert first == about_image("x", "x.png", TURNS[:1]) and (last.id, last.images) == ("7", ("a/b.png",))
    assert [m.role for m in last.messages] == ["user", "assistant"]
    for number, (row, (_, said)) in enumerate(zip(found, BAD.values(), strict=True), start=2):
        assert isinstance(row, data.BadRow) and row.startswith(f"row {number}") and said in row


@pytest.mark.parametrize("form", ["list", "lines"])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n  ", "\ufeff\r\n"])
def test_signs_that_editors_leave_do_not_count_and_a_foreign_encoding_spoils_its_row(tmp_path, form, before):
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Un café."}]
    lines = [json.dumps({"image": "a.png", "conversations": turns}, ensure_ascii=False).encode(code)
             for code in ("utf-8", "latin-1", "utf-8")]  # fmt: skip
    file, last = tmp_path / "rows.json", [b"", b" \n\n"]
    text = b"[" + b",".join(lines) + b"]\n" if form == "list" else b"\r\n".join([*lines, *last])
    file.write_bytes(before.encode() + text)
    good, bad, _ = data.read_rows(file)
    assert good.messages[1].content == "Un café." and bad.startswith("row ") and "not UTF-8" in bad


def test_only_the_rows_that_are_drawn_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*(json.dumps(GOOD | {"id": str(i)}) for i in range(20)), *["{"] * 20]))
    drawn = data.read_rows(file, 10, seed=3)
    assert drawn == data.sample(data.read_rows(file), 10, seed=3)
    with pytest.raises(UserError, match="41 rows are asked for, the data set has 40"):
        data.read_rows(file, 41)


@given(st.binary(max_size=200))
def test_whatever_bytes_a_file_has_rows_or_one_message_come_out(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    try:
        assert all(isinstance(row, data.BadRow) for row in data.read_rows(file))
    except UserError as error:
        assert "any.json" in str(error)


def test_files_and_sets_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([GOOD, GOOD])[:-9])
    with pytest.raises(UserError, match=r"rows\.json is not valid JSON"):
        data.read_rows(tmp_path / "rows.json")
    with pytest.raises(UserError, match="no data file"):
        data.read_rows(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="would be empty"):
        data.write_rows(tmp_path, "align", [])


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_a_larger_sample_holds_the_smaller(small, large, seed):
    rows = list(range(40))
    small, large = sorted((small, large))
    assert set(data.sample(rows, small, seed)) <= set(data.sample(rows, large, seed))
    assert len(data.sample(rows, large, seed)) == large


def row(name, answer="one two"):
    file = name if "." in name else f"{name}.png"
    return about_image(name, file, [("What is this?", answer)])


@pytest.fixture
def media(tmp_path):
    Image.new("RGB", (140, 140)).save(tmp_path / "good.png")
    Image.new("RGB", (1400, 1400)).save(tmp_path / "large.png")
    Image.new("RGB", (4000, 4)).save(tmp_path / "stripe.png")
    (tmp_path / "text.png").write_text("no picture")
    Image.effect_noise((200, 200), 80).convert("RGB").save(tmp_path / "photo.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:-3000])
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-40])
    return tmp_path


def test_a_photo_on_its_side_counts_upright(media):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (120, 90)).save(media / "side.jpg", exif=exif)
    assert data.image_size(media / "side.jpg") == (90, 120)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("large", "2505 tokens (2500 of images) are over the cutoff 64"), ("missing", "no image"),
        ("text", "not an image"), ("cut", "truncated or corrupt"), ("cut.jpg", "truncated or corrupt"),
        ("stripe", "aspect ratio too large (4000 x 4)"),
    ],
)  # fmt: skip
def test_a_row_that_would_stop_the_training_is_named(media, name, said):
    bad, longest, _ = data.token_budgets([row("good"), row(name)], media, {"model": WordCounter()}, 64)
    assert [*bad] == [1] and said in bad[1] and bad[1].startswith(f"row {name}: ") and longest["model"] == 30
    with pytest.raises(UserError, match=f"row {name}: "):
        data.refuse([*bad.values()], 2, "align", 0.0)
    data.refuse([*bad.values()], 2, "align", 0.5)


def test_each_image_is_opened_once_for_all_models(media, monkeypatch):
    opened = []
    plain = data.image_size
    monkeypatch.setattr(data, "image_size", lambda path: opened.append(path.name) or plain(path))
    counters = {"one": WordCounter(), "other": WordCounter()}
    _, longest, total = data.token_budgets([row("good"), row("photo.jpg")], media, counters, 64)
    assert opened == ["good.png", "photo.jpg"] and total == dict.fromkeys(counters, 30 + 54)
    assert longest == dict.fromkeys(counters, 54)


def test_llama_factory_resizes_before_the_processor():
    assert data.resized(140, 140, 802816) == (140, 140)
    assert data.resized(2000, 1000, 802816) == (1267, 633)
    assert data.resized(8, 8, 802816) == (32, 32)
