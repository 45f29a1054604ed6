"""The gallery: what captioners wrote, one file with nothing from outside."""

import re

import pandas as pd
from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.prism import gallery
from tests.scripted import Says


def test_large_images_become_small(tmp_path):
    uri = gallery.data_uri(Image.new("RGB", (3000, 1500), "red"))
    assert uri.startswith("data:image/webp;base64,") and len(uri) < 5000


def knows(samples):
    """Gives the right answers of these questions when the prompt's caption holds "told"."""
    gold = {sample.question: sample.gold for sample in samples}
    return Says(lambda r: gold[next(q for q in gold if q in r.prompt)] if "told" in r.prompt else "nothing")


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
    cards = gallery.cards_of(profile, captions_of(files), tmp_path, one, knows(one[files[0]]))
    assert len(cards) == 4 and "all is told" in cards[0] and "little" in cards[1] and "<li>" not in cards[1]
    assert cards[0].count("<li>") == len(one[files[0]]) and "1/1 (" in cards[0]


def test_the_page_stands_alone_and_is_the_same_each_time(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    captions = captions_of(["a.png"]).assign(caption="all </script><b> is told")
    cards = gallery.cards_of(load_profile("smoke"), captions, tmp_path, {}, None)
    first = gallery.write(cards, tmp_path / "a.html", "Captions <1>").read_bytes()
    assert first == gallery.write(cards, tmp_path / "b.html", "Captions <1>").read_bytes()
    page = first.decode()
    assert "<title>Captions &lt;1&gt;</title>" in page and page.count("<img") == 1 and "all &lt;/script" in page
    assert not re.findall(r"(?:https?:)?//\w", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page))
