"""Which trainings stand behind the tables."""

import pytest

from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.pretraining import sets

PAPER = load_profile("paper")
SETTINGS = PAPER.pretraining


def test_table_1_has_the_papers_rows_and_shares_the_alignment():
    found = sets.all_trainings(SETTINGS, ("table1",))
    assert len({t.name for t in found}) == len(found)
    stages = [t.stage for t in found]
    assert (stages.count("align"), stages.count("further"), stages.count("sft")) == (3, 12, 15)
    assert len(sets.final_names(SETTINGS, ("table1",))) == 15


def test_items_share_trainings_and_every_start_comes_before():
    parts = [len(sets.all_trainings(SETTINGS, (item,))) for item in ("table1", "table2", "figure4")]
    assert len(sets.all_trainings(SETTINGS)) < sum(parts)
    done = set()
    for training in sets.all_trainings(SETTINGS):
        assert training.start is None or training.start in done, training
        done.add(training.name)


def test_rows():
    rows = {t.name: t.num_rows(SETTINGS) for t in sets.all_trainings(SETTINGS)}
    assert rows["qwen2.5-3b-caprl-5m-further"] == 5_000_000
    assert rows["qwen2.5-3b-caprl-1m-further"] == 1_000_000
    assert rows["qwen2.5-3b-caprl-1m-x0.2-further"] == 200_000
    assert rows["qwen2.5-3b-align"] == 558_000


def test_another_seed_repeats_the_trainings_of_its_setting():
    settings = load_profile("mini", {"pretraining.more_seeds": {"mini-qwen-7b": [5]}}).pretraining
    found = {t.name: t for t in sets.all_trainings(settings)}
    seeds = [t.seed for t in found.values() if t.setting == "mini-qwen-3b"]
    assert seeds.count(1) == seeds.count(None)
    further = found["mini-qwen-7b-caprl-1m-further-seed5"]
    assert further.start == "mini-qwen-7b-align-seed5" and found[further.start].model == "mini-qwen-7b-seed5"
    assert found["mini-qwen-7b-caprl-1m-sft-seed5"].start == further.name
    names = sets.final_names(settings, ("table2",))
    assert names[:5] == [sets.final_name("mini-qwen-3b", captions) for captions in sets.TABLE_2]
    assert names[5:] == [f"{name}-seed1" for name in names[:5]]
    assert not any(t.seed for t in sets.all_trainings(load_profile("smoke").pretraining))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"more_seeds": {"mini-qwen-3": [1]}}, "no setting: 'mini-qwen-3'; did you mean mini-qwen-3b?"),
        ({"align_of": {"mini-qwen-7": {"num_epochs": 2}}}, "align_of names no setting: 'mini-qwen-7'"),
        ({"more_seeds": {"mini-qwen-3b": [1, 1]}}, "holds one seed twice"),
        ({"more_seeds": {"mini-qwen-3b": [0]}}, "0 is the profile's own seed"),
        ({"more_seeds": {"mini-qwen-3b": [-1]}}, "more_seeds"),
        ({"nodes": 2}, "parallel_runs 2 needs nodes 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(changed, said):
    with pytest.raises(UserError) as error:
        load_profile("mini", {"pretraining": changed})
    assert said in str(error.value)
