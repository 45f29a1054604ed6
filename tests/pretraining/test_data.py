"""Data sets: rows in LLaMA-Factory's form and a user's, what is refused, the check of tokens and images; and from image
sets to checked files, with captions that a test wrote and a counter of words.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from caprl_utils.captions import job
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.mini.source import image_at
from caprl_utils.pretraining import data, llamafactory, pretrain, sets
from caprl_utils.pretraining.data import prepare, read_rows
from caprl_utils.pretraining.sets import Training
from caprl_utils.records import about_image
from caprl_utils.registry import SOURCES
from caprl_utils.vlm_init import assembly
from tests.pretraining.conftest import WordCounter

TURNS = [("Please describe this image in detail.", "This is a chart."), ("What?", "The answer is 42")]


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
    found = []
    first, last = read_rows(file, aside=found)
    assert first == about_image("x", "x.png", TURNS[:1]) and (last.id, last.images) == ("7", ("a/b.png",))
    assert [m.role for m in last.messages] == ["user", "assistant"]
    for number, (row, (_, said)) in enumerate(zip(found, BAD.values(), strict=True), start=2):
        assert row.startswith(f"row {number}") and said in row


@pytest.mark.parametrize("form", ["list", "lines"])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n  ", "\ufeff\r\n"])
def test_signs_that_editors_leave_do_not_count_and_a_foreign_encoding_spoils_its_row(tmp_path, form, before):
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Un café."}]
    lines = [json.dumps({"image": "a.png", "conversations": turns}, ensure_ascii=False).encode(code)
             for code in ("utf-8", "latin-1", "utf-8")]  # fmt: skip
    file, last = tmp_path / "rows.json", [b"", b" \n\n"]
    text = b"[" + b",".join(lines) + b"]\n" if form == "list" else b"\r\n".join([*lines, *last])
    file.write_bytes(before.encode() + text)
    aside = []
    good, _ = read_rows(file, aside=aside)
    (bad,) = aside
    assert good.messages[1].content == "Un café." and bad.startswith("row ") and "not UTF-8" in bad


def test_only_the_rows_that_are_drawn_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*(json.dumps(GOOD | {"id": str(i)}) for i in range(20)), *["{"] * 20]))
    bad = []
    good = read_rows(file, 10, seed=3, aside=bad)
    drawn = data.sample(range(40), 10, seed=3)
    assert [int(row.id) for row in good] == [place for place in drawn if place < 20] and len(good) + len(bad) == 10
    with pytest.raises(UserError, match="41 rows are asked for, the data set has 40"):
        read_rows(file, 41)


@given(st.binary(max_size=200))
def test_whatever_bytes_a_file_has_rows_or_one_message_come_out(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    try:
        assert read_rows(file) == []
    except UserError as error:
        assert "any.json" in str(error)


def test_files_and_sets_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([GOOD, GOOD])[:-9])
    with pytest.raises(UserError, match=r"rows\.json is not valid JSON"):
        read_rows(tmp_path / "rows.json")
    with pytest.raises(UserError, match="no data file"):
        read_rows(tmp_path / "nowhere.json")
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
    bad, longest = data.token_budgets([row("good"), row(name)], media, {"model": WordCounter()}, 64)
    assert [*bad] == [1] and said in bad[1] and bad[1].startswith(f"row {name}: ") and longest["model"] == 30


def test_llama_factory_resizes_before_the_processor():
    assert data.resized(140, 140, 802816) == (140, 140)
    assert data.resized(2000, 1000, 802816) == (1267, 633)
    assert data.resized(8, 8, 802816) == (32, 32)


# Whole data sets

SOME = data.DataSet("align", Path("data"), Path("media"), {"hash": "hash", "rows": 4})


def profile_of(**changed):
    """Profile smoke with few rows. changed: more of the section `pretraining`."""
    few = {"further": {"num_rows": 6, "num_rows_large": 7, "growth": [0.5]}, "align": {"num_rows": 2},
           "sft": {"num_rows": 2}}  # fmt: skip
    return load_profile("smoke", {"pretraining": few | changed})


@pytest.fixture
def profile():
    return profile_of()


@pytest.fixture
def captioned(monkeypatch, tmp_path):
    """Captions of every rendered set, CapRL's true ones, each other naming its image and who wrote it; the first one is
    empty, and of DenseFusion's the next three are cut, a loop, and hold a mark.
    """
    drawn = replace(SOURCES["mini-world"], image_at=cache(image_at))  # once, for captions and data
    monkeypatch.setitem(SOURCES, "mini-world", drawn)

    def caption(profile, pairs_name):
        split, total, seed = data.image_source(profile, pairs_name.split("-by-")[0]).split(":")[1:]
        shown = [drawn.image_at(split, number, None, int(seed)) for number in range(int(total))]
        rows = [{"image_id": name, "num_tokens": 4, "looped": False, "finish_reason": "stop",
                 "caption": meta["true_caption"] if pairs_name == "caprl-by-caprl" else f"{pairs_name} {name}"}
                for name, _, _, meta in shown]  # fmt: skip
        rows[0]["caption"] = " "
        if pairs_name == "densefusion-by-densefusion":
            rows[1]["finish_reason"] = "length"
            rows[2]["looped"] = True
            rows[3]["caption"] = "A film plays in <video>."
        file = tmp_path / f"{pairs_name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file

    monkeypatch.setattr(data, "caption", caption)
    monkeypatch.setattr(data, "TokenCounter", lambda *_: WordCounter())
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return {"mini-qwen-3b-seed0": model}


def test_every_data_set_is_written_and_a_smaller_one_is_part_of_the_larger(profile, captioned):
    trainings = sets.all_trainings(profile.pretraining)
    made = prepare(profile, trainings, captioned)
    assert set(made) == {t.dataset for t in trainings}
    rows = {name: read_rows(found.folder / f"{name}.jsonl") for name, found in made.items()}
    assert len(rows["align"]) == len(rows["sft"]) == 2
    half, full = ({row.images for row in rows[name]} for name in ("caprl-1m-x0.5", "caprl-1m"))
    assert half < full
    media = made["sft"].media
    assert all((media / image).is_file() for name in rows for row in rows[name] for image in row.images)
    for row in rows["densefusion-1m"]:
        assert row.messages[1].content == f"densefusion-by-densefusion {row.id}"
        assert row.messages[0].content.startswith("<image>Please describe")
    assert len(rows["sft"][0].messages) > 2 and "The answer is" in rows["sft"][0].messages[1].content
    everything = [row.images for name in ("align", "sft", "densefusion-1m") for row in rows[name]]
    assert len(set(everything)) == len(everything)
    found = made["densefusion-1m"].values  # what exports leave out is not trained on, and counted
    assert found["left_out"] == {"no caption": 1, "cut": 1, "loop": 1, "holds a mark of a medium": 1}
    assert found["rows"] == 2 and found["set_aside"] == []
    told = found["captions"]
    assert told["cut"] == told["looped"] == pytest.approx(1 / 6) and told["count"] == 6
    assert (told["tokens"], told["told"], told["statements"]) == (4, 0, pytest.approx(1 / 6))
    whole = made["caprl-1m"].values  # how true captions are is measured
    assert whole["captions"]["told"] > 0.8 and whole["captions"]["false share"] == whole["captions"]["repeats"] == 0
    # `make table1` beside a running `make figure4` must not move the data away under its trainings
    times = {name: found.folder.stat().st_ctime_ns for name, found in made.items()}
    shared = [t for t in sets.all_trainings(profile.pretraining, ("table1",)) if t.dataset in made]
    again = prepare(profile, shared, captioned)
    assert again == {name: made[name] for name in ("align", "densefusion-1m", "caprl-1m", "sft")}
    assert all(found.folder.stat().st_ctime_ns == times[name] for name, found in again.items())


def test_captions_made_otherwise_have_another_name(profile, monkeypatch):
    written = []
    monkeypatch.setattr(job, "caption_source", lambda source, out, model, _: written.append((out, model.path)))
    sampled = profile.prism.model_copy(update={"caption_temperature": 0.5})
    for one in (profile, profile, profile.model_copy(update={"prism": sampled})):
        data.caption(one, "densefusion-by-densefusion")
    assert written[0] == written[1] != written[2]
    assert all(o.name.startswith("densefusion-by-densefusion-") and path == "zoo:mid" for o, path in written)
    with pytest.raises(UserError, match="make 03_caprl_rl_training PROFILE=smoke"):
        data.caption(profile, "caprl-by-caprl")


def test_a_seed_has_its_own_projector_and_shares_the_data(monkeypatch, tmp_path):
    seeded, made = load_profile("smoke", {"pretraining.seeds": [0, 3]}), {}
    monkeypatch.setattr(assembly, "assemble", lambda name, out, seed: made.update({out.name: (name, seed)}))
    assert list(pretrain.assemble(seeded)) == ["mini-qwen-3b-seed0", "mini-qwen-3b-seed3"]
    assert made == {f"mini-qwen-3b-seed{seed}": ("mini-qwen-3b", seed) for seed in (0, 3)}
    both = [t for t in sets.all_trainings(seeded.pretraining) if t.stage == "align"]
    assert len(both) == 2 and len({training.dataset for training in both}) == 1
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    texts = [llamafactory.train_yaml(seeded, training, tmp_path, SOME, tmp_path) for training in both]
    assert "seed: 0" in texts[0] and "seed: 3" in texts[1]


ALIGN = Training("a", "mini-qwen-3b", "align")


def test_a_missing_file_is_named_before_anything_is_captioned(monkeypatch):
    monkeypatch.setattr(data, "caption", lambda *_: pytest.fail("captioned"))
    own = profile_of(sft={"data": "nowhere/sft.json"})
    with pytest.raises(UserError, match=r"no data file nowhere/sft\.json \(pretraining\.sft\.data\)"):
        prepare(own, sets.all_trainings(own.pretraining), {})


def test_rows_of_a_user_are_told_apart_by_their_place_and_bad_ones_set_aside(captioned, tmp_path):
    (tmp_path / "media").mkdir()
    Image.new("RGB", (112, 112)).save(tmp_path / "media" / "x.png")

    def row(image, answer):
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": answer}]
        return {"id": "same", "image": image, "conversations": turns}

    file = tmp_path / "blip.json"
    file.write_text(json.dumps([row("x.png", "A cat."), row("gone.png", "A dog."), row("x.png", "A cow."),
                                row("x.png", "See <image>."), row("x.png", "See <audio>.")]))  # fmt: skip
    given = {"align": {"data": str(file), "num_rows": 5}, "media_folder": str(tmp_path / "media")}
    made = prepare(profile_of(**given, max_bad_share=0.6), [ALIGN], captioned)["align"]
    told = [r.messages[1].content for r in read_rows(made.folder / "align.jsonl")]
    assert told == ["A cat.", "A cow."] and made.values["rows"] == 2 and made.values["captions"] is None
    aside = "; ".join(made.values["set_aside"])
    assert all(part in aside for part in ("2 <image> for 1 images", "holds <audio>", "row same: no image"))
    with pytest.raises(UserError, match=r"data set align: .* tokens .* over the cutoff 16"):
        prepare(profile_of(**given, cutoff_tokens=16), [ALIGN], captioned)
    with pytest.raises(UserError, match=r"data set align: 3 of 5 rows .* 2 <image> for 1 images"):
        prepare(profile_of(**given, max_bad_share=0.5), [ALIGN], captioned)


def test_trainings_wait_for_their_start_and_run_side_by_side(monkeypatch):
    done, most, running = [], 0, set()

    def train(profile, training, model, *_):
        nonlocal most
        running.add(training.name)
        most = max(most, len(running))
        assert training.start in (None, *done) and model.parent.name == (training.start or "vlm_init")
        running.remove(training.name)
        done.append(training.name)
        return {}

    profile = profile_of(parallel_runs=2)
    trainings = sets.all_trainings(profile.pretraining)
    given = {t.dataset: SOME for t in trainings}, {"mini-qwen-3b-seed0": Path("vlm_init/model")}
    monkeypatch.setattr(pretrain, "train", train)
    assert set(pretrain.train_all(profile, trainings, *given)) == {t.name for t in trainings} and most <= 2
    failing = Mock(side_effect=UserError("align failed"))
    monkeypatch.setattr(pretrain, "train", failing)
    with pytest.raises(UserError, match="align failed"):
        pretrain.train_all(profile_of(parallel_runs=1), trainings, *given)
    assert failing.call_count == 1  # the rest is not begun
