"""The plan: what each notebook costs, and what is missing with its remedy."""

from caprl_utils import plan
from caprl_utils.config import load_profile, names_of, read_yaml
from caprl_utils.schema import Profile


def test_the_paper_profile_names_every_missing_thing(runs_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "visible_gpus", list)
    monkeypatch.setattr(plan, "ENVIRONMENT", tmp_path)
    text = "\n".join(plan.lines(load_profile("paper")))
    for part in ("16 GPUs at once, 4,243 GPU-hours", "in all: 6,892 GPU-hours", "GPUs: 16 at once, this machine has 0",
                 "hf download Qwen/Qwen2.5-VL-3B-Instruct",
                 "make serve MODEL=Qwen/Qwen2.5-VL-72B-Instruct PORT=8000", "data/pretraining/CapRL-5M.json",
                 "hf download --repo-type dataset lmms-lab-encoder/ChartQA"):  # fmt: skip
        assert part in text, part


def test_nothing_is_missing_for_the_mini_world(runs_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "ENVIRONMENT", tmp_path)
    assert plan.lines(load_profile("mini"))[-1] == "nothing is missing"
    monkeypatch.setattr(plan, "ENVIRONMENT", tmp_path / "none")
    assert "make setup" in plan.lines(load_profile("mini"))[-1]


def test_estimates_are_of_known_profiles_and_notebooks():
    for profile, costs in read_yaml(plan.ESTIMATES).items():
        assert profile in names_of(Profile) and set(costs) <= set(plan.CHAIN)
