"""The plan: sums by hand, the state of each notebook, and what is missing with its remedy."""

import pytest

from caprl_utils import gpus, provenance
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.planning import __main__ as page
from caprl_utils.planning import graph, missing
from caprl_utils.pretraining import launch

CHAIN = ["01_qa_curation", "03_caprl_rl_training:with_ablations=True", "04_llamafactory_pretraining",
         "05_prism_evaluation", "06_tables_and_figures"]  # fmt: skip


def test_gpus_that_hold_a_model():
    # 3.75e9 x 2 bytes fit on one; 73.4e9 x 2 / (80e9 x 0.7) = 2.6
    assert graph.serving_gpus(3.75e9) == 1 and graph.serving_gpus(73.4e9) == 4
    assert gpus.hours(990e12 * 0.1 * 3600, gpus.GENERATE_USE) == pytest.approx(1)


def test_curation_at_the_papers_size_by_hand(runs_folder):
    (step,) = graph.steps(load_profile("paper"), CHAIN[:1])
    write = 2 * 73.4e9 * 75_000 * 1900 / (990e12 * 0.1) / 3600
    read = 2 * 3.75e9 * 75_000 * 5 * 4 * 1460 / (990e12 * 0.25) / 3600
    assert step.gpu_hours == pytest.approx(write + read) and step.gpus == 5 and step.outdated


def test_the_paper_profile_names_every_missing_thing(runs_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "gpu_names", list)
    monkeypatch.setattr(launch, "ENVIRONMENT", tmp_path)
    text = "\n".join(page.lines(load_profile("paper"), CHAIN))
    for part in ("$ .venv/bin/python -m caprl_utils.runner --profile paper 03_caprl_rl_training:with_ablations=True",
                 "in all:", "dollars", "GPUs: 16 at once, this machine has 0",
                 "hf download Qwen/Qwen2.5-VL-3B-Instruct",
                 "make serve MODEL=Qwen/Qwen2.5-VL-72B-Instruct PORT=8000", "data/pretraining/CapRL-5M.json",
                 "hf download --repo-type dataset lmms-lab-encoder/ChartQA", "on node 1:"):  # fmt: skip
        assert part in text, part


def test_nothing_is_missing_for_the_mini_world(runs_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(missing, "ENVIRONMENT", tmp_path)
    assert page.lines(load_profile("mini"), CHAIN)[-1] == "nothing is missing"
    monkeypatch.setattr(missing, "ENVIRONMENT", tmp_path / "none")
    assert "make setup" in page.lines(load_profile("mini"), CHAIN)[-1]


def test_a_mistake_in_a_name_is_told():
    with pytest.raises(UserError, match="did you mean 01_qa_curation"):
        graph.steps(load_profile("mini"), ["01_qa_curatio"])
