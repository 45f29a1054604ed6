"""Which trainings stand behind the tables."""

import pytest

from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.pretraining import sets

SETTINGS = load_profile("paper").pretraining


def test_table_1_has_the_papers_rows_and_shares_the_alignment():
    found = sets.all_trainings(SETTINGS, ("table1",))
    stages = [t.stage for t in found]
    assert [stages.count(stage) for stage in sets.STAGES] == [3, 12, 15] and len({t.name for t in found}) == len(found)
    assert len(sets.final_names(SETTINGS, ("table1",))) == 15


def test_items_share_trainings_and_every_start_comes_before():
    whole = sets.all_trainings(SETTINGS)
    assert len(whole) < sum(len(sets.all_trainings(SETTINGS, (item,))) for item in ("table1", "table2", "figure4"))
    names = [t.name for t in whole]
    assert all(t.start is None or names.index(t.start) < names.index(t.name) for t in whole)
    rows = {t.name.removeprefix("qwen2.5-3b-").removesuffix("-seed0"): t.num_rows(SETTINGS) for t in whole}
    wanted = {"caprl-5m-further": 5_000_000, "caprl-1m-further": 1_000_000, "caprl-1m-x0.2-further": 200_000,
              "align": 558_000}  # fmt: skip
    assert {name: rows[name] for name in wanted} == wanted


def test_every_seed_makes_all_trainings():
    settings = load_profile("mini", {"pretraining.seeds": [0, 5]}).pretraining
    found = {t.name: t for t in sets.all_trainings(settings)}
    seeds = [t.seed for t in found.values()]
    assert seeds.count(0) == seeds.count(5) == len(seeds) / 2
    further = found["mini-qwen-7b-caprl-1m-further-seed5"]
    assert further.start == "mini-qwen-7b-align-seed5" and found[further.start].seed == 5
    assert found["mini-qwen-7b-caprl-1m-sft-seed5"].start == further.name
    names = sets.final_names(settings, ("table2",))
    assert names == [sets.final_name("mini-qwen-3b", captions, seed) for seed in (0, 5) for captions in sets.TABLE_2]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"align_of": {"mini-qwen-7": {"num_epochs": 2}}}, "align_of names no setting: 'mini-qwen-7'"),
        ({"align_of": {"mini-qwen-3b": {"learning_rate": -1}}}, "align_of"),
        ({"seeds": [1, 1]}, "[1, 1] holds one seed twice"),
        ({"seeds": [-1]}, "pretraining.seeds"),
        ({"seeds": []}, "pretraining.seeds"),
        ({"nodes": 2}, "parallel_runs 2 needs nodes 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(changed, said):
    with pytest.raises(UserError) as error:
        load_profile("mini", {"pretraining": changed})
    assert said in str(error.value)
