"""The registry; every loader on a small file with the real columns, and every way such a file can be wrong."""

import json
import random
import shutil
from unittest.mock import Mock

import pytest

from caprl_utils import paths, prompts
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import benchmarks_of_table, get_benchmark, load_registry, overview
from caprl_utils.prism.evaluate import how_to_ask
from caprl_utils.prism.layouts import CANNOT_ANSWER
from caprl_utils.prism.loading import how_to_get, inside, load, load_samples
from caprl_utils.schema import PRISM_BENCHMARKS
from tests.rows import LAYOUTS, OTHER, captionqa_row, collection, picture, png, write, write_gqa, write_visulogic

P = picture()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def loaded(tmp_path):
    """Loads rows of a benchmark like its first, each with what is changed in it, from a copy of its data."""

    def make(key, *changes, **how):
        rows, image_columns, _ = LAYOUTS[key]
        made = [rows[0] | change for change in changes] or rows
        return load(key, path=write(tmp_path / f"hub{random.random()}", made, image_columns), **how)

    return make


def test_what_a_row_tells_reaches_the_prompt(loaded):
    """Answer type, decimals, unit, hint, paragraph and earlier turns; options that stand in the question."""

    def asked(key, change, mode="choice", caption="A chart."):
        return how_to_ask(loaded(key, change)[0], caption, mode, "authors")[1]

    assert asked("charxiv", {"reasoning_a_type": 4, "reasoning_a": "0.25"}) == (
        "Here is a detailed caption of an image: A chart.. Please answer the question based on the caption.\n"
        "Which line?\nAnswer with a number with 2 decimal places."
    )
    free = {"choices": None, "question_type": "free_form", "answer_type": "float", "precision": 2.0, "answer": "1.25"}
    told = "\nType? (Unit: cm)\nGive the final value, a number with 2 decimal places, at the end."
    assert asked("mathvista", free | {"unit": "cm"}).endswith(told)
    told = "\nParagraph: Sales rose.\nQ: First?\nA: 1\nSecond?\nAnswer true or false only"
    assert told in asked("chartqapro", {"Paragraph": "Sales rose.", "Question Type": "Fact Checking"})
    hint = {"choices": None, "query": "Hint: Give an integer, e.g., 1.\nQuestion: Type?"}
    assert asked("mathvista", hint, "greedy", None) == "Type?\nGive an integer, e.g., 1."
    assert asked("mathvista", hint, "sampled").endswith(f"Give an integer, e.g., 1.\n{prompts.THINK}")


@pytest.mark.parametrize(("question", "options"), [
    ("Which?\nOptions: A: red, B: a blue, dotted one", ("red", "a blue, dotted one")),
    ("Which? (A) red (B) blue", ("red", "blue")), ("Which of A and B?", ()), ("Which? A: red, C: blue", ()),
    ("Which?\nA. 3 cm; B. 4 cm; C. A. Smith", ("3 cm", "4 cm", "A. Smith")),
])  # fmt: skip
def test_options_of_mmstar_stand_in_the_question(question, options, loaded):
    (sample,) = loaded("mmstar", {"question": question})
    assert (sample.question, sample.options) == ("Which?" if options else question, options)


def test_mmmu_images_open_questions_and_pictures_that_hold_the_question(loaded, tmp_path):
    closed, open_question = loaded("mmmu")
    assert len(closed.images) == 3 and closed.meta["image_numbers"] == [1, 2, 3]
    assert (open_question.gold, open_question.meta["question_type"]) == (["24/7", "3.429"], "open")
    row = {"id": "v1", "image": P, "options": "['x', 'y']", "answer": "A", "subject": "Art"}
    (sample,) = load("mmmu_pro", path=write(tmp_path / "hub", [row], ["image"]))
    assert (sample.question, len(sample.images)) == ("", 1)


def test_filters_groups_and_questions_about_one_image(loaded):
    assert len(loaded("mathverse")) == len(loaded("seed")) == 1
    base, rotation = loaded("mmbench")
    assert base.meta["image_id"] == rotation.meta["image_id"] == "7" and rotation.meta["rotation"] == 1
    ids = [s.meta["image_id"] for s in loaded("chartqa", {}, {"question": "Other?"}, {"image": OTHER})]
    assert ids[0] == ids[1] != ids[2]
    found = loaded("wemath", {}, *({"key": f"2steps_{s}", "image_path": OTHER} for s in (2, "multi")))
    assert [s.id for s in found] == ["g1-2steps_1", "g1-2steps_2", "g1-2steps_multi"]
    first, second, multi = (s.meta["image_id"] for s in found)
    assert {s.meta["ID"] for s in found} == {"g1"} and second == multi != first
    rows = [{"index": number + turn * 1_000_000} for number in range(5) for turn in range(2)]
    one, again = (loaded("mmbench", *rows, num_samples=4, seed=3) for _ in range(2))  # subsets keep groups
    assert [s.id for s in one] == [s.id for s in again]
    assert len(one) == 4 and len({s.meta["image_id"] for s in one}) == 2


def test_visulogic_reads_images_beside_its_jsonl_which_is_split_at_line_ends_only(tmp_path):
    folder = write_visulogic(tmp_path / "v")
    file, asked = folder / "data.jsonl", ["a\u2028b?", "a\x85b?"]
    for path in (folder, file):
        sample = load("visulogic", path=path)[0]
        assert sample.gold == "C" and sample.images[0]().size == (6, 4)
    rows = [json.loads(file.read_text()) | {"id": str(n), "question": text} for n, text in enumerate(asked)]
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    assert [sample.question for sample in load("visulogic", path=file)] == asked


def test_gqa_joins_images(tmp_path):
    sample = load("gqa", path=write_gqa(tmp_path / "gqa", {"n1": P, "n2": OTHER}))[0]
    assert sample.meta["image_id"] == "n1" and sample.images[0]().getpixel((0, 0)) == (200, 10, 10)
    with pytest.raises(UserError, match="first: n1"):
        load("gqa", path=write_gqa(tmp_path / "other", {"n2": OTHER}))


def test_captionqa_captions_all_views_and_copies_the_sequential_shuffle(tmp_path):
    rows = [captionqa_row("nat_001") | {"images": [P, OTHER]}, captionqa_row("nat_002")]
    samples = load("captionqa", path=write(tmp_path / "hub", rows, [["images"]]))
    assert [image().getpixel((0, 0)) for image in samples[0].images] == [(200, 10, 10), (0, 0, 255)]
    assert [sample.id for sample in samples] == ["nat_001-0", "nat_001-1", "nat_002-0", "nat_002-1"]
    generator = random.Random(0)
    all_choices = [["red", "blue", "green", CANNOT_ANSWER], ["yes", "no"]] * 2
    for sample, choices, gold in zip(samples, all_choices, ["blue", "yes"] * 2, strict=True):
        generator.shuffle(choices := [*choices])
        assert list(sample.options) == choices and choices["ABCD".index(sample.gold)] == gold
        cannot = sample.meta["cannot_answer"]
        assert choices["ABCD".index(cannot)] == CANNOT_ANSWER if "green" in choices else cannot is None


# --- what can be wrong ---


def test_wrong_columns_and_ids_that_stand_twice_are_named(loaded, tmp_path):
    file = write(tmp_path / "hub", [{"image": P, "Question": "How many?", "answer": "12"}], ["image"])
    with pytest.raises(UserError, match=r"ChartQA: 'question'; did you mean Question\?"):
        load("chartqa", path=file)
    with pytest.raises(UserError, match="1 ids stand twice, first '1'"):
        loaded("mathvista", {}, {})


@pytest.mark.parametrize(("key", "change", "message"), [
    ("mathvista", {"answer_type": "poem"}, "unknown answer type 'poem'"),
    ("mmstar", {"answer": "E"}, "unknown answer 'E'"), ("ai2d", {"answer": "9"}, "unknown answer '9'"),
    ("ai2d", {"options": [*"abcdefghijkl"], "answer": "11"}, "12 options"),
    ("charxiv", {"reasoning_a_type": 9}, "reasoning_a_type"),
    ("wemath", {"option": "three or four"}, "options are not of the form"),
    ("chartqa", {"answer": None}, "holds nothing"), ("infovqa", {"answers": []}, "test has no answers"),
    ("mmvet", {"image": None}, "an image is needed"), ("seed", {"image": []}, "an image is needed"),
    ("mmvet", {"image": {"bytes": b"no image", "path": None}}, "not an image"),
    ("mmvet", {"image": {"bytes": png(size=(2500, 10)), "path": None}}, "2500 x 10 pixels"),
])  # fmt: skip
def test_a_row_that_cannot_be_used_is_set_aside_and_counted(key, change, message, loaded, caplog):
    row = LAYOUTS[key][0][0]
    identity = {"question_id", "questionId", "pid", "index", "ID", "figure_path"} & row.keys()
    numbered = [{name: type(row[name])(n) for name in identity} for n in range(5)]
    found = loaded(key, *numbered[:4], numbered[4] | change)
    assert len(found) == 4 and message in str(found.set_aside[key]) and message in caplog.text
    if key == "chartqa":
        with pytest.raises(UserError, match="5 of 6 rows were set aside"):
            loaded(key, {}, *[change] * 5)


def test_absent_data_say_how_to_get_them(tmp_path, monkeypatch):
    import datasets

    told = r"lmms-lab-encoder/DocVQA.*InfographicVQA.*revision.*2801 rows.*apache"
    (tmp_path / "empty").mkdir()
    for folder, message in (("nowhere", told), ("empty", "no parquet or JSONL")):
        with pytest.raises(UserError, match=message):
            load("infovqa", path=tmp_path / folder)
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=ConnectionError("offline")))
    told = r"Lin-Chen/MMStar could not be loaded \(ConnectionError: offline.*revision.*hf download"
    with pytest.raises(UserError, match=told):
        load("mmstar")


def test_saved_datasets_and_their_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    row = {"image": png(), "question": "How many?", "answer": "12", "type": "human_test"}
    data = Dataset.from_list([row])
    DatasetDict({"test": data, "train": data}).save_to_disk(tmp_path / "many")
    DatasetDict({"dev": data, "train": data}).save_to_disk(tmp_path / "other")
    assert len(load("chartqa", path=tmp_path / "many")) == 1
    with pytest.raises(UserError, match="splits dev, train"):
        load("chartqa", path=tmp_path / "other")


CARD = """---
configs:
- config_name: DocVQA
  data_files: [{split: validation, path: a/*.parquet}]
- config_name: InfographicVQA
  data_files: [{split: test, path: b/x.parquet}, {split: validation, path: b/y.parquet}]
---
"""


@pytest.mark.parametrize(("key", "files", "refused"), [
    ("chartqa", "data/train-00000-of-00001 data/test-00000-of-00001*", None),
    ("mathvision", "data/testmini-00000-of-00001 data/test-00000-of-00001*", None),
    ("infovqa", "DocVQA/validation-0 InfographicVQA/test-0 InfographicVQA/validation-0*", None),
    ("infovqa", "a/0 b/x b/y*", None),  # as the card says
    ("mmbench", "cn/dev-0 en/test-0 en/dev-0*", None), ("mmstar", "mmstar*", None), ("charxiv", "test val*", None),
    ("chartqa", "data/train-0 data/val-0", "splits train, val; ChartQA is scored on 'test'"),
    ("infovqa", "DocVQA/validation-0", "holds DocVQA; .* configuration 'InfographicVQA'"),
    ("mmmu", "Art/validation-0 Music/validation-0", "holds Art, Music"),
])  # fmt: skip
def test_of_a_downloaded_repository_only_configuration_and_split_are_read(key, files, refused, tmp_path):
    """files: each with one row; that with a star is the one to read."""
    rows, image_columns, _ = LAYOUTS[key]
    data, folder = write(tmp_path / "one", rows[:1], image_columns, parquet=True), tmp_path / "repo"
    for name in files.rstrip("*").split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data, folder / f"{name}.parquet")
    if "b/y" in files:
        (folder / "README.md").write_text(CARD)
    if refused:
        with pytest.raises(UserError, match=refused):
            load(key, path=folder)
    else:
        found = load_samples(load_profile("smoke"), [f"{key}={folder}"])
        (taken,) = found.origins[key]["files"]
        assert len(found) == 1 and taken.endswith(f"{files.split()[-1][:-1]}.parquet")


# --- the authors' files ---


def test_the_authors_files_bring_rows_and_prompts(tmp_path):
    folder = collection(tmp_path / "files", [
        {"answer": "B"}, {"answer": 3}, {"answer": ["x", "y"], "image": "bench_image_folder/2.png"},
        {"answer": "B", "prompt": "no slot"}, {"answer": None}, {"answer": "A", "image": "../out.png"},
    ])  # fmt: skip
    profile = load_profile("smoke", {"prism.evaluation_files": str(folder), "prism.benchmarks": ["seed2k"]})
    found = load_samples(profile)
    assert [sample.gold for sample in found] == ["B", "3", ["x", "y"]]
    assert found[0].question == "Where?\nA. in\nB. on" and found[0].images[0]().size == (6, 4)
    asked = how_to_ask(found[0], "It is on.", "sampled", "authors")[1]
    assert asked.endswith("based on the caption.\nWhere?\nA. in\nB. on")
    reasons = str(found.set_aside["seed2k"])
    assert all(word in reasons for word in ("vision slot", "the answer is None", "lies outside"))
    with pytest.raises(UserError, match=r"hf download internlm/CapRL-Evaluation-Files.*evaluation_files"):
        load("seed2k")
    with pytest.raises(UserError, match=r"lmm_eval_chartqa.json"):
        load("chartqa", files=folder)


# --- images and paths ---


@pytest.mark.parametrize("path", ["../out.png", "/etc/hosts", "a/../../x", "file://../out.png", "link.png"])
def test_paths_cannot_leave_their_root(path, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "out.png").write_bytes(png())
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(UserError, match="outside"):
        inside(tmp_path / "root", path, "f, row 1")


# --- the registry ---


def test_the_benchmarks_of_the_paper_and_the_branches_of_the_authors_scorer():
    for table, file in ((3, "table3_prism.csv"), (1, "table1_pretraining.csv")):
        header = (paths.PAPER / file).read_text(encoding="utf-8").splitlines()[0].split(",")
        assert len(benchmarks_of_table(table)) == len({*header[2:]} - {"Average"}) == (11 if table == 3 else 12)
    assert [facts.key for facts in benchmarks_of_table(3)] == PRISM_BENCHMARKS
    branches = {facts.key: facts.caprl.branch for facts in benchmarks_of_table(3)}
    charts = dict.fromkeys(("chartqa", "chartqapro", "charxiv"), "chart")
    assert branches == dict.fromkeys(branches, "symbolic") | charts | {"infovqa": "info"}


def test_every_benchmark_tells_where_it_is_and_unknown_ones_name_the_nearest():
    for facts in load_registry().values():
        if facts.hub is None:
            assert facts.loader or facts.key == "seed2k"
        else:
            assert facts.hub.id in how_to_get(facts) and facts.columns and facts.size
    lines = overview().splitlines()
    assert [line.split()[0] for line in lines] == list(load_registry())
    assert "2500 rows" in lines[0] and lines[0].endswith("tables 1, 2, 3")
    with pytest.raises(UserError, match="chartqapro"):
        get_benchmark("chartqapor")


@pytest.mark.parametrize(("text", "message"), [
    ("benchmarks: [{key: x, name: X, answer: short, metric: anls, colour: red}]", "colour"),
    ("benchmarks: [{key: x, name: X, answer: sometimes, metric: anls}]", "answer"),
    ("benchmarks: [&b {key: x, name: X, answer: short, metric: a}, *b]", "keys given twice: x"),
    ("benchmarks: [", "not valid YAML"),
])  # fmt: skip
def test_a_wrong_registry_is_named(tmp_path, text, message):
    file = tmp_path / "benchmarks.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_registry(file)
