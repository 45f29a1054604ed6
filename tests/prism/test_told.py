"""What captions say against known facts: the mini world's sentences, the kinds of false ones, means by image."""

import pytest

from caprl_utils.mini.source import truth
from caprl_utils.mini.world import KINDS, caption, picture
from caprl_utils.prism.told import COLUMNS, by_image, counts, kind_of, summary
from caprl_utils.registry import world_of

META = {"world": "mini-world", "facts": {"topic": "sales", "value of Rome": "20", "value of Oslo": "40"}, "known": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_true_caption_tells_every_fact_once_and_nothing_else(kind):
    shown = picture("benchmark", 3, kind)
    meta = truth(shown)
    found, world = counts(caption(shown.facts, kind), meta), world_of(meta)
    facts = len(meta["facts"])
    assert found == dict.fromkeys(COLUMNS, 0) | {"facts": facts, "told": facts, "statements": facts}
    told = " ".join(world.sentence(key, value) for key, value in meta["facts"].items())
    assert world.statements(told) == [*meta["facts"].items()]


def test_every_kind_of_false_statement_is_counted():
    text = "This is a chart. The topic is sales. The topic is sales. The topic is prices. Rome has a value of 20."
    text += " The value of Cairo is 20. The sugar is receipt. The value of Oslo is"  # the last was cut off
    ones = dict.fromkeys(("wrong", "not_shown", "garbled", "repeats", "contradictions"), 1)
    assert counts(text, META) == {"facts": 3, "told": 2, "statements": 6} | ones
    assert kind_of(("value of Rome", "40"), META) == "wrong"
    assert counts("", META)["statements"] == 0


def test_without_known_facts_nothing_is_measured():
    assert set(counts("The topic is sales.", {}).values()) == {None} == set(counts(None, META).values())
    rows = [{"benchmark": "b", "model": "m", "image_id": "i", "caption_index": 0, "num_tokens": 7, **counts("x", {})}]
    assert by_image(rows, "told") == {} and by_image(rows, "tokens") == {"b": {("i", "i"): 7}}


def test_measures_are_of_all_captions_of_an_image_and_each_caption_counts_once():
    texts = ("The topic is sales.", "The topic is prices. The value of Cairo is 5. The value of Rome is 20.")
    rows = [
        {"benchmark": "b", "model": "m", "image_id": "i", "caption_index": index, "num_tokens": 5, **counts(text, META)}
        for index, text in enumerate(texts) for _ in range(2)  # two questions about the image
    ]  # fmt: skip
    found = {name: by_image(rows, name)["b"]["i", "i"] for name in ("told", "false share", "false count", "not shown")}
    assert found == {"told": 2 / 6, "false share": 2 / 4, "false count": 1.0, "not shown": 1 / 4}
    assert by_image(rows, "tokens", 0.5)["b"]["i", "i"] == 2.5
    whole = summary(rows[::2])
    assert {name: whole[name] for name in found} == found and whole["contradict"] == 0
    assert summary([])["told"] is None
