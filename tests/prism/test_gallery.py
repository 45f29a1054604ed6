"""The gallery: items by disagreement, one file with nothing from outside, and (integration) in a browser."""

import json
import re
import shutil
import subprocess

import pandas as pd
import pytest
from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.base import Completion
from caprl_utils.prism import gallery
from caprl_utils.records import Sample

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def make_samples(count):
    return [
        Sample(
            f"s{n}", "mini-chart", (lambda n=n: Image.new("RGB", (32, 24), (n % 256, 0, 99)),), f"What is value {n}?",
            gold="42", meta={"image_id": f"img{n}"},
        )
        for n in range(count)
    ]  # fmt: skip


def make_rows(samples, scores, caption="The value is 42. </script><b>"):
    return [
        {
            "benchmark": s.benchmark, "sample_id": s.id, "image_id": f"{s.benchmark}/img{n}", "caption_index": index,
            "caption": f"{caption} {index}", "answer": "42", "score": scores[n],
        }
        for n, s in enumerate(samples)
        for index in range(2)
    ]  # fmt: skip


@pytest.fixture
def items():
    samples = make_samples(3)
    rows = {"base": make_rows(samples, [0.0, 1.0, 0.0]), "CapRL": make_rows(samples, [1.0, 1.0, 0.0])}
    return gallery.collect(samples, rows)


def test_most_disagreement_comes_first(items):
    assert [item["id"] for item in items] == ["mini-chart/img0", "mini-chart/img1", "mini-chart/img2"]
    assert items[0]["disagreement"] == 1.0 and items[0]["score"] == {"base": 0.0, "CapRL": 1.0}
    assert len(items[0]["captions"]["base"]) == 2
    assert items[0]["questions"][0]["scores"] == {"base": [0.0, 0.0], "CapRL": [1.0, 1.0]}


def test_the_page_stands_alone_and_is_the_same_each_time(items, tmp_path):
    first = gallery.write(items, tmp_path / "a.html", "Captions <1>").read_bytes()
    assert first == gallery.write(items, tmp_path / "b.html", "Captions <1>").read_bytes()
    page = first.decode()
    assert "<title>Captions &lt;1&gt;</title>" in page
    assert not re.findall(r"(?:https?:)?//\w", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page))
    block = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    data = json.loads(block)
    assert data["labels"] == ["base", "CapRL"] and len(data["items"]) == 3
    assert data["items"][0]["captions"]["base"][0].startswith("The value is 42. </script><b>")


def test_large_images_become_small(tmp_path):
    uri = gallery.data_uri(Image.new("RGB", (3000, 1500), "red"))
    assert uri.startswith("data:image/webp;base64,") and len(uri) < 5000


def test_cards_escape_what_models_wrote(items):
    text = gallery.cards(items[:1])
    assert "<b>base</b>" in text and "&lt;/script&gt;" in text and "0/2" in text and "2/2" in text


def test_a_run_on_other_samples_is_refused(items):
    rows = make_rows(make_samples(3), [1.0, 1.0, 1.0])
    with pytest.raises(UserError, match="sample s2 of mini-chart is not in the gallery"):
        gallery.collect(make_samples(2), {"more": rows})


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
    return pd.DataFrame(
        {"image_id": n, "index": 0, "caption": "all is told" if k == 0 else "little"}
        for k, n in enumerate(names)
    )


def test_examples_are_written_once_and_asked_about(tmp_path):
    profile = load_profile("smoke")
    questions = gallery.write_examples(profile, tmp_path, 4)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == sorted(questions) and len(files) == 4
    assert len({name.split("/")[0] for name in files}) == 4  # a kind each
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.png"))]
    gallery.write_examples(profile, tmp_path, 4)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.png"))] == times
    one = {files[0]: questions[files[0]]}
    items = gallery.folder_items(profile, captions_of(files), tmp_path, "mine", one, Knows(one[files[0]]))
    assert [item["id"] for item in items] == files
    assert items[0]["score"] == {"mine": 1.0} and items[1]["score"] == {}
    assert [item["captions"]["mine"] for item in items] == [["all is told"], *[["little"]] * 3]


def test_images_without_questions_have_captions_only(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    items = gallery.folder_items(load_profile("smoke"), captions_of(["a.png"]), tmp_path, "mine", {}, None)
    page = gallery.write(items, tmp_path / "page.html", "mine").read_text()
    assert '"labels": ["mine"]' in page and "all is told" in page and "all is told" in gallery.cards(items)


@pytest.mark.integration
def test_the_page_works_in_a_browser(tmp_path):
    """2,000 samples: images load, no error, no request to outside."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: one of {', '.join(BROWSERS)} on PATH is needed")
    samples = make_samples(2000)
    rows = make_rows(samples, [float(n % 2) for n in range(2000)])
    page = gallery.write(gallery.collect(samples, {"base": rows}), tmp_path / "page.html", "Captions")
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=8000", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,800",
        "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    result = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    assert result == {
        "errors": [], "requests": 0, "all": "2000 of 2000 images", "loaded": True,
        "filtered": "1 of 2000 images", "moved": "mini-chart/img1",
    }  # fmt: skip


# Runs in the page: types into the filter, presses keys, notes what happened.
PROBE = """
<pre id="probe"></pre>
<script>
const errors = [];
window.addEventListener("error", (event) => errors.push(event.message));
const result = { errors };
setTimeout(() => {
  const image = document.querySelector("#detail img");
  const outside = (entry) => !entry.name.startsWith("data:");
  result.requests = performance.getEntriesByType("resource").filter(outside).length;
  result.all = document.getElementById("count").textContent;
  result.loaded = image.complete && image.naturalWidth > 0;
  const filter = document.getElementById("filter");
  filter.value = "1999?";
  filter.dispatchEvent(new Event("input"));
  result.filtered = document.getElementById("count").textContent;
  filter.value = "";
  document.getElementById("order").value = "id";
  filter.dispatchEvent(new Event("input"));
  for (let i = 0; i < 2; i++) document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowUp" }));
  result.moved = document.querySelector("#detail h2").textContent;
  document.getElementById("probe").textContent = JSON.stringify(result);
}, 1500);
</script>
"""
