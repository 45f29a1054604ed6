"""The gallery: what captioners wrote, one file with nothing from outside."""

import re

from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.prism import gallery
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.sources import image_ids
from caprl_utils.registry import world_of


def test_examples_are_written_once(tmp_path):
    profile = load_profile("smoke")
    questions = gallery.write_examples(profile, tmp_path, 4)
    times = {path.relative_to(tmp_path).as_posix(): path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert times.keys() == questions.keys() and len({name.split("/")[0] for name in times}) == 4  # a kind each
    gallery.write_examples(profile, tmp_path, 4)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times


def test_true_false_and_repeated_statements_are_marked():
    sample = load_samples(load_profile("smoke"), ["mini-chart"])[0]
    (key, value), *_ = sample.meta["facts"].items()
    true, false = (world_of(sample.meta).sentence(key, told) for told in (value, "99 <b>"))
    shown = gallery.marked(f"{true} {true} {false}", sample.meta)
    assert shown.count("<span") == shown.count("<s ") == shown.count("✗") == 1 and "&lt;b&gt;" in shown
    assert gallery.marked(f"{true} {false}", {}).count("✗") == 0  # nothing is known of the image
    rows = [{"image_id": image_ids(sample)[0], "caption_index": 0, "caption": None, "question": "Which?", "gold": "B",
             "options": ["a", "b"], "parsed": "A", "answer": "A", "score": 0.0}]  # fmt: skip
    card = gallery.card_of(sample, {"looks": rows, "absent": []})
    assert "(looks at the image)" in card and "Which? b (the model: a)" in card and "absent" not in card


def test_the_page_stands_alone_is_the_same_each_time_and_its_images_are_small(tmp_path):
    card = gallery.card(Image.new("RGB", (30, 20), "red"), {"mine": "all </script><b> is told"}, {})
    first = gallery.write([card], tmp_path / "a.html", "Captions <1>").read_bytes()
    assert first == gallery.write([card], tmp_path / "b.html", "Captions <1>").read_bytes()
    page = first.decode()
    assert "<title>Captions &lt;1&gt;</title>" in page and page.count("<img") == 1 and "all &lt;/script" in page
    assert not re.findall(r"(?:https?:)?//\w", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page))
    assert len(gallery.data_uri(Image.new("RGB", (3000, 1500), "red"))) < 5000
    assert gallery.data_uri(Image.effect_noise((900, 600), 90)).startswith("data:image/")
