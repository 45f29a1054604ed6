"""The check before training: image tokens against the cutoff, images that are missing or broken."""

import pytest
from PIL import Image

from caprl_utils.errors import UserError
from caprl_utils.pretraining import budget, data


class WordCounter:
    """A token a word, a token for every 28 x 28 pixels."""

    def image_tokens(self, width, height):
        return (width // 28) * (height // 28)

    def text_tokens(self, example):
        return sum(len(message.content.split()) for message in example.messages)


def row(name, answer="one two"):
    file = name if "." in name else f"{name}.png"
    return data.about_image(name, file, [("What is this?", answer)])


def check(rows, media):
    """Of one model."""
    return budget.check(rows, media, {"model": WordCounter()}, 64)["model"]


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


def test_tokens_are_counted(media):
    found = check([row("good")], media)
    assert (found.longest, found.image_tokens, found.bad) == (30, 25, {})
    assert "longest row 30 of 64" in found.lines()[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("large", "2505 tokens (2500 of images) are over the cutoff 64"),
        ("missing", "no image"),
        ("text", "not an image"),
        ("cut", "cannot be decoded"),
        ("cut.jpg", "cannot be decoded"),
        ("stripe", "aspect 4000 x 4"),
    ],
)
def test_a_row_that_would_stop_the_training_is_named(media, name, said):
    found = check([row("good"), row(name)], media)
    assert list(found.bad) == [1] and said in found.bad[1] and found.bad[1].startswith(f"row {name}: ")
    with pytest.raises(UserError, match=f"row {name}: "):
        budget.refuse(list(found.bad.values()), 2, "align", 0.0)
    budget.refuse(list(found.bad.values()), 2, "align", 0.5)


def test_each_image_is_opened_once_for_all_models(media, monkeypatch):
    opened = []
    plain = budget._size
    monkeypatch.setattr(budget, "_size", lambda path: opened.append(path.name) or plain(path))
    counters = {"one": WordCounter(), "other": WordCounter()}
    found = budget.check([row("good"), row("photo.jpg")], media, counters, 64)
    assert opened == ["good.png", "photo.jpg"] and found["one"] == found["other"]
    assert found["one"].image_tokens == 25 + 49


def test_llama_factory_resizes_before_the_processor():
    assert budget.resized(140, 140, 1024, 802816) == (140, 140)
    assert budget.resized(2000, 1000, 1024, 802816) == (1267, 633)
    assert budget.resized(8, 8, 1024, 802816) == (32, 32)
