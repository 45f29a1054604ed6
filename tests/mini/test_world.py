"""The mini world: seeded, true, varied; its benchmarks never show a training image."""

import random

import pytest

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.mini import source
from caprl_utils.mini.world import KINDS, distractors, picture


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_functions_of_their_seed_and_splits_share_none(kind):
    """Figures have few facts, so some come again, but drawn by a seed of their own."""
    assert picture("rl", 7, kind) == picture("rl", 7, kind)
    assert picture("rl", 7, kind).facts != picture("rl", 7, kind, seed=1).facts
    splits = ("benchmark", "zoo", "rl", "pretraining")
    shown = {split: [picture(split, i, kind) for i in range(200)] for split in splits}
    facts = {split: {one.facts for one in of_split} for split, of_split in shown.items()}
    drawn = {split: {one.layout["seed"] for one in of_split} for split, of_split in shown.items()}
    assert kind == "geometry" or {len(of_split) for of_split in facts.values()} == {200}
    for split in splits[1:]:
        assert not drawn[split] & drawn["benchmark"]
        assert kind == "geometry" or not facts[split] & facts["benchmark"]


@pytest.mark.parametrize("index", range(5))
def test_facts_have_their_value_among_the_options_and_keys_are_unique(index):
    shown = picture("rl", index)
    assert len({fact.key for fact in shown.facts}) == len(shown.facts)
    for fact in shown.facts:
        wrong = distractors(random.Random(index), fact, shown.facts)
        assert len(set(wrong)) == min(3, len(fact.options) - 1) and fact.value not in wrong
        assert fact.value in fact.options


@pytest.mark.parametrize("name", list(source.BENCHMARK_KINDS))
def test_benchmark_samples_are_answerable_and_seeded(name):
    samples = source.benchmark(name, 10)
    again = source.benchmark(name, 10)
    assert [s.id for s in samples] == [s.id for s in again] and len({s.id for s in samples}) == 10
    for sample in samples:
        answer = sample.options[prompts.LETTERS.index(sample.gold)] if sample.options else sample.gold
        assert answer in sample.meta["true_caption"]


def test_wrong_names_are_named():
    with pytest.raises(UserError, match="no split 'test'"):
        picture("test", 0)
    with pytest.raises(UserError, match="no mini benchmark 'mini-maps'"):
        source.benchmark("mini-maps")
    with pytest.raises(UserError, match="has no cartoons"):
        source.image_at("rl", 0, ["cartoons"])
