"""The plan: what each notebook costs, and what is missing with its remedy."""

import pytest

from caprl_utils import plan
from caprl_utils.config import load_profile, names_of, read_yaml
from caprl_utils.errors import UserError
from caprl_utils.schema import Profile


def test_the_paper_profile_names_every_missing_thing(runs_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "visible_gpus", list)
    monkeypatch.setattr(plan, "ENVIRONMENT", tmp_path)
    text = "\n".join(plan.lines(load_profile("paper")))
    lines = text.splitlines()
    assert lines.index("missing:") < next(n for n, line in enumerate(lines) if "GPU-hours" in line)
    assert "servers                              0 of 7 here" in text.split("missing:")[0]
    for part in ("16 GPUs at once, 16,000 GPU-hours", "in all: 18,649 GPU-hours",
                 "GPUs: 16 at once, this machine has 0",
                 "hf download Qwen/Qwen2.5-VL-3B-Instruct",
                 "make serve MODEL=Qwen/Qwen2.5-VL-72B-Instruct PORT=8000", "data/pretraining/CapRL-5M.json",
                 "hf download --repo-type dataset lmms-lab-encoder/ChartQA"):  # fmt: skip
        assert part in text, part


def test_nothing_is_missing_for_the_mini_world(runs_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "ENVIRONMENT", tmp_path)
    assert "nothing is missing" in plan.lines(load_profile("mini"))
    monkeypatch.setattr(plan, "ENVIRONMENT", tmp_path / "none")
    assert "make setup-llamafactory" in "\n".join(plan.lines(load_profile("mini")))
    plan.check(load_profile("mini"), ["01_qa_curation", "03_caprl_rl_training"])  # these go without it


def test_one_gpu_needs_one_gpu_and_no_server():
    text = "\n".join(plan.lines(load_profile("one_gpu")))
    assert "GPUs at once: 1 " in text and "server" not in text and "72B" not in text
    assert "UnifiedReward" not in text  # none of its trainings asks that judge


def test_a_server_that_only_an_earlier_notebook_asked_may_be_gone(monkeypatch):
    monkeypatch.setattr(plan, "_have", lambda path, kind: True)
    with pytest.raises(UserError) as told:
        plan.check(load_profile("paper"), ["04_prism_evaluation", "06_tables_and_figures"])
    assert "(prism_reader)" in str(told.value)
    for gone in ("question_writer", "reward_reader", "images.source", "LLaMA-Factory"):
        assert gone not in str(told.value), gone


def test_estimates_are_of_known_profiles_and_notebooks():
    for profile, costs in read_yaml(plan.ESTIMATES).items():
        assert profile in names_of(Profile) and set(costs) <= set(plan.CHAIN)
