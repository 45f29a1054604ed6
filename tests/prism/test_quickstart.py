"""Example images and gallery items of notebook 00, with a reader that looks for the answer in the caption."""

import pandas as pd
from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.models import Completion
from caprl_utils.prism import gallery, quickstart


class Knows:
    """Names the right answer when the prompt's caption holds it, else something wrong."""

    name = model_hash = "knows"

    def __init__(self, samples):
        self.gold = {sample.question: sample for sample in samples}

    def _right(self, prompt):
        return "told" in prompt

    def _sample(self, prompt):
        return next(s for question, s in self.gold.items() if question in prompt)

    def generate(self, requests, sampling, progress=None):
        texts = [self._sample(r.prompt).gold if self._right(r.prompt) else "nothing" for r in requests]
        return [Completion(r.id, 0, f" {t}", 2, "stop") for r, t in zip(requests, texts, strict=True)]

    def choice_logprobs(self, requests, choices, progress=None):
        found = []
        for r in requests:
            gold = f" {self._sample(r.prompt).gold}" if self._right(r.prompt) else choices[-1]
            found.append([-0.1 if choice == gold else -9.0 for choice in choices])
        return found


def captions_of(names):
    return pd.DataFrame(
        {"image_id": n, "index": 0, "caption": "all is told" if k == 0 else "little"}
        for k, n in enumerate(names)
    )


def test_examples_are_written_once_and_asked_about(tmp_path):
    samples = quickstart.write_examples(load_profile("smoke"), tmp_path, 4)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == sorted({sample.meta["file"] for sample in samples}) and len(files) == 4
    assert len({name.split("/")[0] for name in files}) == 4  # a kind each
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.png"))]
    quickstart.write_examples(load_profile("smoke"), tmp_path, 4)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.png"))] == times
    one = [s for s in samples if s.meta["file"] == files[0]]
    items = quickstart.gallery_items(captions_of(files), tmp_path, "mine", one, Knows(one))
    assert [item["id"] for item in items] == files
    assert items[0]["score"] == {"mine": 1.0} and items[1]["score"] == {}
    assert [item["captions"]["mine"] for item in items] == [["all is told"], *[["little"]] * 3]


def test_images_without_questions_have_captions_only(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    items = quickstart.gallery_items(captions_of(["a.png"]), tmp_path, "mine")
    page = gallery.write(items, tmp_path / "page.html", "mine").read_text()
    assert '"labels": ["mine"]' in page and "all is told" in page and "all is told" in gallery.cards(items)
