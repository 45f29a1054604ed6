"""The plan of a training, by hand."""

import pytest

from caprl_utils.config import load_profile
from caprl_utils.rl.experiment import load_experiment
from caprl_utils.rl.plan import plan_rl, size_of


def plan(name: str, experiment: str | None = None) -> dict:
    return {row["item"]: row["value"] for row in plan_rl(load_profile(name), experiment)}


def test_paper_size_by_hand():
    rows = plan("paper")
    assert rows["experiment"] == "caprl" and rows["processes"] == 16
    assert rows["captions a step"] == 1024 and rows["passes over the images"] == pytest.approx(3.072)
    # 1800 steps x 10 x 3.75e9 x 1024 x 2100 / (990e12 x 0.35) / 3600
    assert rows["GPU-hours, training"] == pytest.approx(116.36, abs=0.01)
    # 4 x 3.75 + 12 x 3.75 / 16 + 4 x 3.75 + 4 x 2100 x 2048 x 140 / 1e9
    assert rows["memory of a GPU"] == pytest.approx(15 + 2.8125 + 15 + 2.408, abs=0.01)
    assert rows["on a GPU of 80 GB"] == "fits"


def test_one_gpu_trains_adapters_by_the_profiles_preset():
    experiment, profile = load_experiment("rounds_1", "one_gpu")
    assert experiment.training.lora.rank == 64 and profile.rl.learning_rate == 1e-5 and profile.rl.rounds == 1
    assert plan("one_gpu")["on a GPU of 80 GB"] == "fits"
    assert load_experiment("rounds_1", "mini")[0].training.lora is None


def test_size_from_files_and_unknown():
    assert size_of("zoo:reader-reward").weights == pytest.approx(0.96e6, rel=0.02)
    assert size_of("zoo:reader-reward").layers == 5
    assert size_of("somebody/unknown") is None
    rows = plan("paper", "judge_vlm")
    assert rows["GPU-hours, reward"] > 0


def test_every_row_has_its_formula():
    rows = plan_rl(load_profile("one_gpu"))
    assert all(set(row) == {"part", "item", "value", "unit", "formula"} for row in rows)
    assert all(row["formula"] for row in rows if row["unit"] == "h")
