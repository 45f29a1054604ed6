"""`caprl score` on files of captions as other people have them, read by a scripted reader."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from caprl_utils import paths
from caprl_utils.__main__ import app
from caprl_utils.config import SET_ENV
from caprl_utils.errors import UserError
from caprl_utils.prism import score
from caprl_utils.prism.score import given_captions
from caprl_utils.prism.sources import images_of, other_image_captions
from caprl_utils.runs import load_result
from tests.prism.test_prism import COLOURS, Captioner, Reader, make_sample

SAMPLES = [make_sample(n) for n in range(8)]


@pytest.fixture
def run(monkeypatch):
    """Runs `caprl score ARGUMENTS` on eight questions about eight images; gives what it prints."""
    monkeypatch.setenv(SET_ENV, "")
    opened = {"zoo:x": Captioner(told=0.5)}
    monkeypatch.setattr(score, "open_backend", lambda model, profile: opened.get(model.path, Reader()))
    monkeypatch.setattr(score, "load_samples", lambda profile, names, count: SAMPLES[:count])

    def run(*arguments):
        done = CliRunner().invoke(app, ["score", *map(str, arguments), "--profile", "smoke"])
        if done.exception:
            raise done.exception
        return done.output

    return run


def llava(n):
    """A row of a LLaVA training file."""
    said = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": f"The sky is {COLOURS[n % 4]}."}]
    return {"id": f"{n:09d}", "image": f"vg/images/img{n}.jpg", "conversations": said}


def test_a_llava_file_is_scored_beside_a_placebo(run, tmp_path):
    rows = [*map(llava, [*range(6), 0, 99]), {"id": "1", "image": "img7.jpg", "conversations": []}]
    rows[6]["conversations"][1]["value"] = "It shows something else."  # img0 has two captions
    file = tmp_path / "peer captions.json"
    file.write_text(json.dumps(rows))
    printed = run(file)
    assert printed.startswith("# peer-captions, read by fake-reader")
    scored, said = (line.split("|") for line in printed.splitlines() if line.startswith("| mini-scene"))
    assert scored[2].split()[0] == "100.0"  # without a colour the fake reader says A, right for img0
    assert scored[3].split()[0] == "58.3"  # red and blue stand twice, and the nearest in length are these
    assert scored[5].strip() == scored[6].strip() == "6"
    assert said[2].strip() == "14.3"  # one reply of seven had no likely letter
    assert said[4].strip() == "0.0" and said[6].strip() == "–"  # spread; these images have no known facts
    assert "7 captions of 6 images, matched by 'image'" in printed
    assert "without a caption: 2 of 8 images: mini-scene/img6, mini-scene/img7" in printed
    assert "left out: 2 questions; first: no caption of its image" in printed
    assert "set aside: 1 rows without a caption" in printed and "1 rows of other images" in printed
    folder = paths.RUNS / "smoke" / "prism" / "peer-captions"
    assert (folder / "score.md").read_text().startswith(printed.rpartition("\n\n")[0])
    assert load_result(folder)["n"] == {"mini-scene": 6}
    assert load_result(folder.with_name("peer-captions-placebo"))["captioner"] == "another image's caption"


def test_a_model_gets_the_same_page_and_a_run_is_named_after_a_file_of_any_name(run, tmp_path):
    printed = run("zoo:x", "--num-samples", 6)
    assert "| mini-scene | 83.3 [" in printed and printed.splitlines()[-1].endswith("smoke/prism/zoo-x")
    (tmp_path / "中文.json").write_text(json.dumps({f"img{n}": "The sky is red." for n in range(2)}))
    for words, name in (((), "captions"), (("--name", "../a b"), "a-b")):
        assert run(tmp_path / "中文.json", "--num-samples", 2, *words).splitlines()[-1].endswith(f"smoke/prism/{name}")


@pytest.mark.parametrize(("name", "text", "wrong"), [
    ("torn.json", '[{"image": ', "is no sound .json file"), ("a.json", "null", "names"),
    ("a.csv", "image,caption\na.png,x\nb.png,y\n", "It names a.png, b.png; its images are mini-scene/img0, mini"),
    ("a.csv", "image,caption\nimg1.png,x\nx/img1,y\n", "'img1.png' and 'x/img1' both mean mini-scene/img1"),
    ("a.csv", "image,caption\nimg1.png,red, green and blue\n", "row 1 has more cells than the head"),
    ("a.csv", 'image,caption\nimg1.png,"red\nimg2.png,blue\n', "is no sound .csv file"),
    ("a.csv", "image,description\nimg1.png,x\nimg2.png,y\n", "2 rows name an image and have no text under caption, te"),
])  # fmt: skip
def test_what_cannot_be_matched_is_told_with_examples(name, text, wrong, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=wrong):
        given_captions(tmp_path / name, images_of(SAMPLES))


@pytest.mark.parametrize(("words", "wrong"), [
    (["none.jsonl"], "no such file"), (["none.jsonl", "--direct"], "needs a model"), ([], "name a file of captions"),
])  # fmt: skip
def test_what_cannot_be_scored_is_told(words, wrong, run):
    with pytest.raises(UserError, match=wrong):
        run(*words)


def as_csv(rows):
    return "\n".join([",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)])


@pytest.mark.parametrize(("file", "rows", "write"), [
    ("a.csv", [{"image_id": "img1", "caption": "one, two"}, {"image_id": "img2", "caption": "b"}], as_csv),
    ("a.jsonl", [{"question_id": "img1", "prompt": "?", "text": "one, two"}, {"question_id": "img2", "text": "b"}],
     lambda rows: "\n".join(map(json.dumps, rows))),
    ("a.json", {"img1": ["one, two"], "mini-scene/img2.png": "b"}, json.dumps),
    ("中文.json", [{"image": "img1", "caption": "one, two\ud83d"},
                 {"image": "img2", "caption": "b", "conversations": "[...]"}], json.dumps),
    ("a.json", {"info": {}, "annotations": [{"image": "img1.png", "caption": "one, two"},
                                            {"image": "coco/img2.jpg", "caption": "b"}]}, json.dumps),
])  # fmt: skip
def test_files_and_names_as_people_have_them(file, rows, write, tmp_path):
    (tmp_path / file).write_text(write(rows))
    source, _ = given_captions(tmp_path / file, images_of(SAMPLES))
    found = {image: [row.caption for row in rows] for image, rows in source.captions([]).items()}
    assert found == {"mini-scene/img1": ["one, two"], "mini-scene/img2": ["b"]}


def test_parquet_files_and_numbers_of_another_benchmark(tmp_path):
    for path, found, key in (("elsewhere.png", "img3", "id"), ("img5.png", "img5", "image")):
        rows = [{"id": "img3", "image": {"bytes": b"x", "path": path}, "caption": "c"}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        source, lines = given_captions(tmp_path / "a.parquet", images_of(SAMPLES))
        assert list(source.captions([])) == [f"mini-scene/{found}"]
        assert lines == [f"1 captions of 1 images, matched by {key!r}"]
    (tmp_path / "a.csv").write_text("image,caption\nmini-chart/img1.png,x\nmini-scene/img2.png,y\n")
    source, lines = given_captions(tmp_path / "a.csv", images_of(SAMPLES))
    assert list(source.captions([])) == ["mini-scene/img2"] and "1 rows of other images" in lines[1]


def test_the_placebo_is_the_nearest_in_length_of_another_picture(tmp_path):
    lengths = {1: 10, 2: 30, 3: 12, 5: 31}
    rows = [{"image": f"img{n}", "caption": f"{n}" * length} for n, length in lengths.items()]
    (tmp_path / "a.csv").write_text(as_csv(rows))
    images = images_of(SAMPLES)
    moved = other_image_captions(given_captions(tmp_path / "a.csv", images)[0], images).captions(images)
    assert {image[-1]: rows[0].caption[0] for image, rows in moved.items()} == {"1": "3", "2": "5", "3": "1", "5": "2"}
