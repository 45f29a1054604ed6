"""The gallery: what captioners wrote, one file with nothing from outside."""

import re

import pandas as pd
import pytest
from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.models.base import Completion
from caprl_utils.prism import gallery
from caprl_utils.records import Sample


def make_samples(count):
    def image(n):
        return lambda: Image.new("RGB", (32, 24), (n % 256, 0, 99))

    return [
        Sample(f"s{n}", "mini-chart", (image(n),), f"What is value {n}?", "42", meta={"image_id": f"img{n}"})
        for n in range(count)
    ]


def make_rows(samples, scores):
    shared = {"benchmark": "mini-chart", "answer": "42"}
    return [
        shared | {"sample_id": s.id, "image_id": f"mini-chart/img{n}", "caption_index": index, "score": scores[n],
                  "caption": f"The value is 42. </script><b> {index}"}
        for n, s in enumerate(samples) for index in range(2)
    ]  # fmt: skip


@pytest.fixture
def items():
    samples = make_samples(3)
    rows = {"base": make_rows(samples, [0.0, 1.0, 0.0]), "CapRL": make_rows(samples, [1.0, 1.0, 0.0])}
    return gallery.collect(samples, rows)


def test_items_hold_what_every_captioner_wrote(items):
    assert [item["id"] for item in items] == ["mini-chart/img0", "mini-chart/img1", "mini-chart/img2"]
    assert len(items[0]["captions"]["base"]) == 2
    assert items[0]["questions"][0]["scores"] == {"base": [0.0, 0.0], "CapRL": [1.0, 1.0]}


def test_the_page_stands_alone_and_is_the_same_each_time(items, tmp_path):
    first = gallery.write(items, tmp_path / "a.html", "Captions <1>").read_bytes()
    assert first == gallery.write(items, tmp_path / "b.html", "Captions <1>").read_bytes()
    page = first.decode()
    assert "<title>Captions &lt;1&gt;</title>" in page and page.count("<img") == 3 and "<script" not in page
    assert not re.findall(r"(?:https?:)?//\w", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page))


def test_large_images_become_small(tmp_path):
    uri = gallery.data_uri(Image.new("RGB", (3000, 1500), "red"))
    assert uri.startswith("data:image/webp;base64,") and len(uri) < 5000


def test_cards_escape_what_models_wrote(items):
    text = gallery.cards(items[:1])
    assert "<b>base</b>" in text and "&lt;/script&gt;" in text and "0/2" in text and "2/2" in text


class Knows:
    """Gives the right answers of a question when the prompt's caption holds it."""

    name = model_hash = "knows"

    def __init__(self, samples):
        self.gold = {sample.question: sample.gold for sample in samples}

    def _answer(self, request):
        gold = next(gold for question, gold in self.gold.items() if question in request.prompt)
        return f" {gold}" if "told" in request.prompt else " nothing"

    def generate(self, requests, sampling, progress=None):
        return [Completion(r.id, 0, self._answer(r), 2, "stop") for r in requests]

    def choice_logprobs(self, requests, choices, progress=None):
        return [[-0.1 if choice == self._answer(r) else -9.0 for choice in choices] for r in requests]


def captions_of(names):
    told = ["all is told", *["little"] * (len(names) - 1)]
    return pd.DataFrame({"image_id": names, "index": 0, "caption": told})


def test_examples_are_written_once_and_asked_about(tmp_path):
    profile = load_profile("smoke")
    questions = gallery.write_examples(profile, tmp_path, 4)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in files}
    assert files == sorted(questions) and len({name.split("/")[0] for name in files}) == 4  # a kind each
    gallery.write_examples(profile, tmp_path, 4)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files} == times
    one = {files[0]: questions[files[0]]}
    items = gallery.folder_items(profile, captions_of(files), tmp_path, "mine", one, Knows(one[files[0]]))
    assert [item["id"] for item in items] == files
    assert items[0]["questions"][0]["scores"] == {"mine": [1.0]} and items[1]["questions"] == []
    assert [item["captions"]["mine"] for item in items] == [["all is told"], *[["little"]] * 3]


def test_images_without_questions_have_captions_only(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    items = gallery.folder_items(load_profile("smoke"), captions_of(["a.png"]), tmp_path, "mine", {}, None)
    page = gallery.write(items, tmp_path / "page.html", "mine").read_text()
    assert "<b>mine</b>" in page and "all is told" in page and "all is told" in gallery.cards(items)
