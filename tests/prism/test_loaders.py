"""Every loader on a small file with the real columns, and every way such a file can be wrong."""
# ruff: noqa: E501 (rows of tables)

import base64
import io
import json

import pytest
from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.prism import loading
from caprl_utils.prism.benchmarks import get_benchmark, load_registry
from caprl_utils.prism.layouts import CANNOT_ANSWER, split_options
from caprl_utils.prism.loading import how_to_get, inside, load, load_samples
from caprl_utils.prism.scoring import score


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

# benchmark -> (rows with the columns of the hub layout, image columns, (question, options, gold) of the first sample)
LAYOUTS = {
    "chartqa": (
        [{"image": P, "question": "How many?", "answer": "12", "type": "human_test"}],
        ["image"], ("How many?", (), "12"),
    ),
    "chartqapro": (
        [{"image": png(), "Question": ["First?", "Second?"], "Answer": ["1", "12."], "Year": ["YES", "NO"],
          "Question Type": "Conversational", "Paragraph": ""}],
        [], ("Second?", (), "12."),
    ),
    "infovqa": (
        [{"image": P, "question": "Who?", "answers": ["Ann", "ann"], "questionId": "7", "answer_type": ["x"],
          "image_url": "u.png", "operation/reasoning": [], "ocr": "secret", "data_split": "val"}],
        ["image"], ("Who?", (), ["Ann", "ann"]),
    ),
    "docvqa": (
        [{"image": P, "question": "When?", "answers": ["1990"], "questionId": "8", "question_types": ["form"],
          "docId": 3, "ucsf_document_id": "abc", "ucsf_document_page_no": "2", "data_split": "val"}],
        ["image"], ("When?", (), ["1990"]),
    ),
    "mmmu": (
        [{**{f"image_{n}": P for n in range(1, 8)}, "id": "validation_Art_1", "question": "See <image 2> and <image 1>.",
          "options": "['red', 'blue <image 3>']", "answer": "B", "explanation": "", "img_type": "['Photo']",
          "topic_difficulty": "Easy", "question_type": "multiple-choice", "subfield": "x"},
         {**{f"image_{n}": P for n in range(1, 8)}, "id": "validation_Math_2", "question": "How long is <image 1>?",
          "options": "[]", "answer": "['24/7', '3.429']", "explanation": "", "img_type": "[]",
          "topic_difficulty": "Hard", "question_type": "open", "subfield": "y"}],
        [f"image_{n}" for n in range(1, 8)],
        ("See <image 2> and <image 1>.", ("red", "blue <image 3>"), "B"),
    ),
    "mmmu_pro": (
        [{**{f"image_{n}": P for n in range(1, 8)}, "id": "t1", "question": "<image 1> Which?",
          "options": str(list("abcdefghij")), "answer": "J", "subject": "Art", "img_type": "[]",
          "topic_difficulty": "Easy"}],
        [f"image_{n}" for n in range(1, 8)], ("<image 1> Which?", tuple("abcdefghij"), "J"),
    ),
    "mathverse": (
        [{"image": P, "question": "Angle?", "answer": "60", "sample_index": "5", "problem_index": "1",
          "problem_version": version, "question_type": "free-form", "metadata": {"split": "testmini"},
          "query_wo": "q", "query_cot": "q", "question_for_eval": "Angle?"}
         for version in ("Vision Intensive", "Text Only")],
        ["image"], ("Angle?", (), "60"),
    ),
    "charxiv": (
        [{"image": P, "reasoning_q": "Which line?", "reasoning_a": "blue", "reasoning_q_source": 1,
          "figure_path": "images/1.jpg", "subplot_loc": "N/A", "subplot_row": 1, "subplot_col": 1,
          **{f"descriptive_q{n}": n for n in range(1, 5)}, **{f"descriptive_a{n}": "x" for n in range(1, 5)}}],
        ["image"], ("Which line?", (), "blue"),
    ),
    "wemath": (
        [{"image_path": P, "question": "Area?", "option": "A. 3 cm; B. 4 cm; C. No correct answer", "answer": "C",
          "ID": "g1", "split": "testmini", "knowledge concept": "area", "key": "2steps_1", "question number": 1,
          "knowledge concept description": "d"}],
        ["image_path"], ("Area?", ("3 cm", "4 cm", "No correct answer"), "C"),
    ),
    "mathvision": (
        [{"id": "1", "question": "<image1> Which?", "options": ["A", "B"], "image": "images/1.jpg",
          "decoded_image": P, "answer": "B", "solution": None, "level": 3, "subject": "counting"}],
        ["decoded_image"], ("<image1> Which?", ("A", "B"), "B"),
    ),
    "mmstar": (
        [{"index": 0, "question": "Which? A: x, B: y", "image": P, "answer": "A", "category": "c",
          "l2_category": "d", "meta_info": {"source": "s"}}],
        ["image"], ("Which? A: x, B: y", (), "A"),
    ),
    "seed2k": (
        [{"image": [P], "question": "Where?", "choice_a": "in", "choice_b": "on", "choice_c": "at", "choice_d": "by",
          "answer": "D", "data_id": "9", "data_type": kind, "question_id": "101", "question_type_id": 1,
          "segment": None} for kind in ("image", "video")],
        [["image"]], ("Where?", ("in", "on", "at", "by"), "D"),
    ),
    "realworldqa": (
        [{"image": P, "question": "How many? Answer with one word.", "answer": "4", "image_path": "1.webp"}],
        ["image"], ("How many? Answer with one word.", (), "4"),
    ),
    "mathvista": (
        [{"pid": "1", "question": "Type?", "image": "images/1.jpg", "decoded_image": P,
          "choices": ["scalene", "isosceles"], "unit": None, "precision": 1.0, "answer": "isosceles",
          "question_type": "multi_choice", "answer_type": "text", "metadata": {"split": "testmini"}, "query": "q"}],
        ["decoded_image"], ("Type?", ("scalene", "isosceles"), "isosceles"),
    ),
    "seedbench2_plus": (
        [{"image": P, "question": "Which?", "choice_A": "a", "choice_B": "b", "choice_C": "c", "choice_D": "d",
          "answer": "C", "question_id": "1", "question_image_type": "Chart"}],
        ["image"], ("Which?", ("a", "b", "c", "d"), "C"),
    ),
    "mme_realworld": (
        [{"index": 1, "bytes": base64.b64encode(png()).decode(), "question": "Colour?", "answer": "E",
          "multi-choice options": ["(A) red", "(B) blue", "(C) green", "(D) black", "(E) none of them"],
          "category": "x", "l2-category": "y"}],
        [], ("Colour?", ("red", "blue", "green", "black", "none of them"), "E"),
    ),
    "mmbench": (
        [{"image": P, "question": "Which?", "hint": "Look.", "A": "x", "B": "y", "C": "nan", "D": "nan", "answer": "B",
          "index": index, "category": "c", "L2-category": "d", "source": "s", "comment": "nan", "split": "dev"}
         for index in (7, 1_000_007)],
        ["image"], ("Look.\nWhich?", ("x", "y"), "B"),
    ),
    "mmvet": (
        [{"image": P, "question": "x = ?", "answer": "-1<AND>-5", "question_id": "v1_0", "capability": "ocr,math"}],
        ["image"], ("x = ?", (), "-1<AND>-5"),
    ),
    "ai2d": (
        [{"image": P, "question": "Which?", "options": ["a", "b", "c", "d"], "answer": "2"}],
        ["image"], ("Which?", ("a", "b", "c", "d"), "C"),
    ),
}  # fmt: skip


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
    result = score(sample, sample.gold[0] if isinstance(sample.gold, list) else sample.gold)
    assert result.value == (None if key in ("charxiv", "mmvet") else 1.0)


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
    ids = [
        sample.meta["image_id"] for sample in load("chartqa", path=write(tmp_path / "hub", rows, ["image"]))
    ]
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
            {"question": "Colour of the car?", "choices": ["red", "blue", "green"], "answer": "blue", "category": ["a"]},
            {"question": "Is it day?", "choices": ["yes", "no"], "answer": "yes", "category": ["b"]},
            {"question": "Broken?", "choices": ["x"], "answer": "x", "category": ["b"]},
        ],
    }  # fmt: skip


def test_captionqa_copies_the_sequential_shuffle(tmp_path):
    import random

    data = write(tmp_path / "hub", [captionqa_row("nat_001"), captionqa_row("nat_002")], [["images"]])
    samples = load("captionqa", path=data)
    assert [sample.id for sample in samples] == ["nat_001-0", "nat_001-1", "nat_002-0", "nat_002-1"]
    generator = random.Random(0)
    for sample, choices, gold in zip(
        samples,
        [["red", "blue", "green", CANNOT_ANSWER], ["yes", "no"]] * 2,
        ["blue", "yes"] * 2,
        strict=True,
    ):
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
    facts = facts.model_copy(update={"loader": "no.such:thing"})
    with pytest.raises(UserError, match="cannot be imported"):
        load("mini-chart")


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
    rows = [
        row,
        {**row, "key": "2steps_2", "image_path": OTHER},
        {**row, "key": "2steps_multi", "image_path": OTHER},
    ]
    first, second, multi = load("wemath", path=write(tmp_path / "hub", rows, ["image_path"]))
    assert [s.id for s in (first, second, multi)] == ["g1-2steps_1", "g1-2steps_2", "g1-2steps_multi"]
    assert {s.meta["ID"] for s in (first, second, multi)} == {"g1"}
    assert second.meta["image_id"] == multi.meta["image_id"] != first.meta["image_id"]


def test_subsets_are_drawn_with_a_seed_and_keep_groups(tmp_path):
    row = LAYOUTS["mmbench"][0][0]
    rows = [{**row, "index": number + turn * 1_000_000} for number in range(5) for turn in range(2)]
    file = write(tmp_path / "hub", rows, ["image"])
    one, again = (load("mmbench", path=file, num_samples=4, seed=3) for _ in range(2))
    assert [s.id for s in one] == [s.id for s in again]
    assert len(one) == 4 and len({s.meta["image_id"] for s in one}) == 2


# --- images and paths ---


@pytest.mark.parametrize("path", ["../out.png", "/etc/hosts", "a/../../out.png", "file://../out.png"])
def test_paths_cannot_leave_their_root(path, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "out.png").write_bytes(png())
    with pytest.raises(UserError, match="outside"):
        inside(tmp_path / "root", path, "f, row 1")


def test_links_cannot_leave_their_root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "out.png").write_bytes(png())
    (tmp_path / "root" / "in.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(UserError, match="outside"):
        inside(tmp_path / "root", "in.png", "f, row 1")


def test_options_in_one_text():
    assert split_options("A. 3 cm; B. 4 cm; C. A. Smith") == ["3 cm", "4 cm", "A. Smith"]
    assert split_options("(A) x (B) y") == ["x", "y"]
    with pytest.raises(UserError, match="A"):
        split_options("x; y")
