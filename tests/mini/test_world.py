"""The mini world: seeded, true, varied; its benchmarks never show a training image."""

import random

import pytest

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.mini import source
from caprl_utils.mini.world import KINDS, distractors, picture


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_a_function_of_its_seed(kind):
    first, again, other = picture("rl", 7, kind), picture("rl", 7, kind), picture("rl", 7, kind, seed=1)
    assert first == again and first.facts != other.facts


def test_splits_share_no_picture():
    """Figures have few facts, so some come again, but drawn by a seed of their own."""
    splits = ("zoo", "rl", "benchmark", "pretraining")
    for kind in KINDS:
        facts = {split: {picture(split, i, kind).facts for i in range(200)} for split in splits}
        drawn = {split: {picture(split, i, kind).layout["seed"] for i in range(200)} for split in splits}
        for split in splits:
            assert len(facts[split]) == 200 or kind == "geometry"
            if split != "benchmark":
                assert not facts[split] & facts["benchmark"] or kind == "geometry"
                assert not drawn[split] & drawn["benchmark"]


def test_a_split_nobody_knows_is_named():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        picture("test", 0)


@pytest.mark.parametrize("index", range(5))
def test_facts_have_their_value_among_the_options_and_keys_are_unique(index):
    shown = picture("rl", index)
    keys = [fact.key for fact in shown.facts]
    assert len(set(keys)) == len(keys)
    for fact in shown.facts:
        assert fact.value in fact.options
        wrong = distractors(random.Random(index), fact, shown.facts)
        assert len(set(wrong)) == min(3, len(fact.options) - 1) and fact.value not in wrong


@pytest.mark.parametrize("name", list(source.BENCHMARK_KINDS))
def test_benchmark_samples_are_answerable_and_seeded(name):
    samples = source.benchmark(name, 10)
    again = source.benchmark(name, 10)
    assert [s.id for s in samples] == [s.id for s in again] and len({s.id for s in samples}) == 10
    for sample in samples:
        answer = sample.options[prompts.LETTERS.index(sample.gold)] if sample.options else sample.gold
        assert answer in sample.meta["true_caption"]


def test_wrong_names_are_named():
    with pytest.raises(UserError, match="no mini benchmark 'mini-maps'"):
        source.benchmark("mini-maps")
    with pytest.raises(UserError, match="has no cartoons"):
        source.image_at("rl", 0, ["cartoons"])
