"""Every loader on a small file with the real columns, and every way such a file can be wrong."""

import base64
import io
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.prism import loading
from caprl_utils.prism.benchmarks import get_benchmark, load_registry
from caprl_utils.prism.layouts import CANNOT_ANSWER, split_options
from caprl_utils.prism.loading import how_to_get, inside, load, load_samples
from caprl_utils.prism.scoring import score_answers


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(colour=(200, 10, 10), size=(6, 4)):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def picture(colour=(200, 10, 10)):
    return {"bytes": png(colour), "path": None}


P, OTHER = picture(), picture((0, 0, 255))

CELLS = {
    "<image>": P, "<other image>": OTHER, "<bytes>": png(), "<base64>": base64.b64encode(png()).decode(),
}  # fmt: skip


def decoded(value):
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if isinstance(value, dict):
        return {key: decoded(item) for key, item in value.items()}
    return CELLS.get(value, value)


def read_layouts():
    """Benchmark -> (rows with the columns of the hub layout, image columns, first question, its options and gold)."""
    file = Path(__file__).parents[1] / "data" / "benchmark-rows.jsonl"
    for one in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        first = one["question"], tuple(one["options"]), one["gold"]
        yield one["benchmark"], (decoded(one["rows"]), one["image_columns"], first)


LAYOUTS = dict(read_layouts())


def write(folder, rows, image_columns, parquet=False):
    """A saved dataset (quick to open) or a parquet file with Image features, as the hub serves them."""
    from datasets import Dataset, List
    from datasets import Image as ImageFeature

    data = Dataset.from_list(rows)
    for column in image_columns:
        feature = List(ImageFeature()) if isinstance(column, list) else ImageFeature()
        data = data.cast_column(column[0] if isinstance(column, list) else column, feature)
    if not parquet:
        data.save_to_disk(folder)
        return folder
    folder.mkdir(parents=True)
    data.to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


@pytest.mark.parametrize("key", LAYOUTS)
def test_hub_layouts(key, tmp_path):
    rows, image_columns, first = LAYOUTS[key]
    in_parquet = key in ("chartqa", "infovqa", "seed2k", "mme_realworld")
    loaded = load(key, path=write(tmp_path / "hub", rows, image_columns, in_parquet))
    sample = loaded[0]
    assert (sample.question, sample.options, sample.gold) == first
    assert sample.benchmark == key and sample.meta["image_id"]
    assert "secret" not in str(sample.meta)
    assert sample.images[0]().size == (6, 4)
    text = sample.gold[0] if isinstance(sample.gold, list) else sample.gold
    assert score_answers([(sample, text)], "standard")[0].value == (
        None if key in ("charxiv", "mmvet") else 1.0
    )


def test_all_hub_benchmarks_are_covered():
    hub = {key for key, facts in load_registry().items() if facts.hub is not None}
    assert hub == {*LAYOUTS, "visulogic", "gqa", "captionqa"}


def test_mmmu_images_and_open_questions(tmp_path):
    rows, image_columns, _ = LAYOUTS["mmmu"]
    closed, open_question = load("mmmu", path=write(tmp_path / "hub", rows, image_columns))
    assert len(closed.images) == 3
    assert (open_question.gold, open_question.meta["question_type"]) == (["24/7", "3.429"], "open")


def test_mmmu_pro_vision_configuration(tmp_path):
    row = {"id": "v1", "image": P, "options": "['x', 'y']", "answer": "A", "subject": "Art"}
    sample = load("mmmu_pro", path=write(tmp_path / "hub", [row], ["image"]))[0]
    assert (sample.question, len(sample.images)) == ("", 1)


def test_filters_and_groups(tmp_path):
    rows, image_columns, _ = LAYOUTS["mathverse"]
    assert len(load("mathverse", path=write(tmp_path / "a", rows, image_columns))) == 1
    rows, image_columns, _ = LAYOUTS["seed2k"]
    assert len(load("seed2k", path=write(tmp_path / "b", rows, image_columns))) == 1
    rows, image_columns, _ = LAYOUTS["mmbench"]
    base, rotation = load("mmbench", path=write(tmp_path / "c", rows, image_columns))
    assert base.meta["image_id"] == rotation.meta["image_id"] == "7"
    assert rotation.meta["rotation"] == 1


def test_questions_about_one_image_share_its_id(tmp_path):
    row = LAYOUTS["chartqa"][0][0]
    rows = [row, {**row, "question": "Other?"}, {**row, "image": OTHER}]
    found = load("chartqa", path=write(tmp_path / "hub", rows, ["image"]))
    ids = [sample.meta["image_id"] for sample in found]
    assert ids[0] == ids[1] != ids[2]


def test_visulogic_reads_images_beside_its_jsonl(tmp_path):
    (tmp_path / "v" / "images").mkdir(parents=True)
    (tmp_path / "v" / "images" / "0.png").write_bytes(png())
    row = {"image_path": "images/0.png", "question": "Next?", "label": "C", "id": "0", "tag": "x"}
    (tmp_path / "v" / "data.jsonl").write_text(json.dumps(row) + "\n")
    sample = load("visulogic", path=tmp_path / "v" / "data.jsonl")[0]
    assert sample.gold == "C" and sample.images[0]().size == (6, 4)


def test_gqa_joins_images(tmp_path):
    rows = [{"id": "q1", "imageId": "n1", "question": "Dog?", "answer": "yes", "fullAnswer": "Yes."}]
    facts = get_benchmark("gqa").hub
    write(tmp_path / "gqa" / facts.config, rows, [])
    images = [{"id": "n1", "image": P}, {"id": "n2", "image": OTHER}]
    write(tmp_path / "gqa" / facts.images_config, images, ["image"])
    sample = load("gqa", path=tmp_path / "gqa")[0]
    assert sample.meta["image_id"] == "n1" and sample.images[0]().getpixel((0, 0)) == (200, 10, 10)
    write(tmp_path / "other" / facts.config, rows, [])
    write(tmp_path / "other" / facts.images_config, images[1:], ["image"])
    with pytest.raises(UserError, match="first: n1"):
        load("gqa", path=tmp_path / "other")


def captionqa_row(identity):
    return {
        "id": identity, "images": [P],
        "questions": [
            {"question": "Colour of it?", "choices": ["red", "blue", "green"], "answer": "blue", "category": ["a"]},
            {"question": "Is it day?", "choices": ["yes", "no"], "answer": "yes", "category": ["b"]},
            {"question": "Broken?", "choices": ["x"], "answer": "x", "category": ["b"]},
        ],
    }  # fmt: skip


def test_captionqa_copies_the_sequential_shuffle(tmp_path):
    data = write(tmp_path / "hub", [captionqa_row("nat_001"), captionqa_row("nat_002")], [["images"]])
    samples = load("captionqa", path=data)
    assert [sample.id for sample in samples] == ["nat_001-0", "nat_001-1", "nat_002-0", "nat_002-1"]
    generator = random.Random(0)
    all_choices = [["red", "blue", "green", CANNOT_ANSWER], ["yes", "no"]] * 2
    for sample, choices, gold in zip(samples, all_choices, ["blue", "yes"] * 2, strict=True):
        order = list(range(len(choices)))
        generator.shuffle(order)
        assert list(sample.options) == [choices[place] for place in order]
        assert sample.options["ABCD".index(sample.gold)] == gold
    assert samples[0].options["ABCD".index(samples[0].meta["cannot_answer"])] == CANNOT_ANSWER
    assert samples[1].meta["cannot_answer"] is None


def test_rendered_benchmarks_come_from_their_maker(monkeypatch):
    facts = get_benchmark("mini-chart").model_copy(update={"loader": "tests.prism.test_loaders:maker"})
    monkeypatch.setattr("caprl_utils.prism.loading.get_benchmark", lambda key: facts)
    assert load("mini-chart", num_samples=3, seed=1) == ["mini-chart", 3, 1]


def maker(key, num_samples, seed):
    return [key, num_samples, seed]


# --- what can be wrong ---


def test_a_wrong_column_is_named_with_the_nearest(tmp_path):
    row = {"image": P, "Question": "How many?", "answer": "12", "type": "human_test"}
    file = write(tmp_path / "hub", [row], ["image"])
    with pytest.raises(UserError, match=r"'question' \(there is 'Question'\).*ChartQA"):
        load("chartqa", path=file)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("mathvista", {"answer_type": "poem"}, "unknown answer type 'poem'"),
        ("mmstar", {"answer": "E"}, "unknown answer 'E'"),
        ("ai2d", {"answer": "9"}, "unknown answer '9'"),
        ("charxiv", {"reasoning_q_source": 9}, "reasoning_q_source"),
        ("wemath", {"option": "three or four"}, "options are not of the form"),
        ("chartqa", {"answer": None}, "holds nothing"),
        ("infovqa", {"answers": []}, "test has no answers"),
    ],
)
def test_a_bad_row_is_set_aside_with_its_reason(key, change, message, tmp_path, monkeypatch, caplog):
    rows, image_columns, _ = LAYOUTS[key]
    file = write(tmp_path / "hub", [rows[0], {**rows[0], **change}], image_columns)
    with pytest.raises(UserError, match="1 of 2 rows"):
        load(key, path=file)
    monkeypatch.setattr(loading, "MAX_REJECTED_SHARE", 0.5)
    assert len(load(key, path=file)) == 1
    assert message in caplog.text and "row 1" in caplog.text


def test_a_missing_image_is_named_when_it_is_opened(tmp_path, monkeypatch, caplog):
    row = LAYOUTS["mmstar"][0][0]
    rows = [row, {**row, "image": None}, {**row, "image": {"bytes": b"no image", "path": None}}]
    monkeypatch.setattr(loading, "MAX_REJECTED_SHARE", 0.5)
    loaded = load("mmstar", path=write(tmp_path / "hub", rows, ["image"]))
    assert len(loaded) == 2 and "an image is needed" in caplog.text
    with pytest.raises(UserError, match=r"row 2.*not an image"):
        loaded[1].images[0]()


def test_absent_data_say_how_to_get_them(tmp_path):
    with pytest.raises(
        UserError, match=r"lmms-lab-encoder/DocVQA.*InfographicVQA.*revision.*2801 rows.*apache"
    ):
        load("infovqa", path=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no parquet or JSONL"):
        load("infovqa", path=tmp_path / "empty")
    assert "hf download Borise/CaptionQA" in how_to_get(get_benchmark("captionqa"))


def test_the_hub_out_of_reach_says_how_to_get_the_data(monkeypatch):
    import datasets

    def refuse(*arguments, **options):
        raise ConnectionError(f"offline {arguments} {sorted(options)}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        UserError, match=r"Lin-Chen/MMStar could not be loaded \(ConnectionError.*revision.*hf download"
    ):
        load("mmstar")


def test_saved_datasets_and_their_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    row = {"image": png(), "question": "How many?", "answer": "12", "type": "human_test"}
    data = Dataset.from_list([row])
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"test": data, "train": data}).save_to_disk(tmp_path / "many")
    DatasetDict({"dev": data, "train": data}).save_to_disk(tmp_path / "other")
    assert len(load("chartqa", path=tmp_path / "one")) == len(load("chartqa", path=tmp_path / "many")) == 1
    with pytest.raises(UserError, match="splits dev, train"):
        load("chartqa", path=tmp_path / "other")


def test_of_a_downloaded_repository_only_the_split_is_read(tmp_path):
    row = LAYOUTS["chartqa"][0][0]
    for split, answer in (("train", "1"), ("test", "2")):
        file = write(tmp_path / split, [{**row, "answer": answer}], ["image"], parquet=True)
        (tmp_path / "data").mkdir(exist_ok=True)
        file.rename(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    found = load_samples(load_profile("smoke"), [f"chartqa={tmp_path / 'data'}"])
    assert [sample.gold for sample in found] == ["2"]


def test_groups_of_wemath_have_pictures_of_their_own(tmp_path):
    row = LAYOUTS["wemath"][0][0]
    rows = [row, *({**row, "key": f"2steps_{step}", "image_path": OTHER} for step in (2, "multi"))]
    found = load("wemath", path=write(tmp_path / "hub", rows, ["image_path"]))
    assert [s.id for s in found] == ["g1-2steps_1", "g1-2steps_2", "g1-2steps_multi"]
    first, second, multi = (s.meta["image_id"] for s in found)
    assert {s.meta["ID"] for s in found} == {"g1"} and second == multi != first


def test_subsets_are_drawn_with_a_seed_and_keep_groups(tmp_path):
    row = LAYOUTS["mmbench"][0][0]
    rows = [{**row, "index": number + turn * 1_000_000} for number in range(5) for turn in range(2)]
    file = write(tmp_path / "hub", rows, ["image"])
    one, again = (load("mmbench", path=file, num_samples=4, seed=3) for _ in range(2))
    assert [s.id for s in one] == [s.id for s in again]
    assert len(one) == 4 and len({s.meta["image_id"] for s in one}) == 2


# --- images and paths ---


@pytest.mark.parametrize(
    "path", ["../out.png", "/etc/hosts", "a/../../out.png", "file://../out.png", "link.png"]
)
def test_paths_cannot_leave_their_root(path, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "out.png").write_bytes(png())
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(UserError, match="outside"):
        inside(tmp_path / "root", path, "f, row 1")


def test_options_in_one_text():
    assert split_options("A. 3 cm; B. 4 cm; C. A. Smith") == ["3 cm", "4 cm", "A. Smith"]
    assert split_options("(A) x (B) y") == ["x", "y"]
    with pytest.raises(UserError, match="A"):
        split_options("x; y")
