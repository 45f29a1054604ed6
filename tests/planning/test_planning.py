"""The plan: sums by hand, the state of each notebook, and what is missing with its remedy."""

import pytest

from caprl_utils import gpus, provenance
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.planning import __main__ as page
from caprl_utils.planning import graph, missing
from caprl_utils.pretraining import launch, plan
from caprl_utils.pretraining.sets import wanted

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
                 "hf download --repo-type dataset lmms-lab-encoder/ChartQA", "llamafactory.slurm"):  # fmt: skip
        assert part in text, part


def test_nothing_is_missing_for_the_mini_world(runs_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(missing, "ENVIRONMENT", tmp_path)
    assert page.lines(load_profile("mini"), CHAIN)[-1] == "nothing is missing"
    monkeypatch.setattr(missing, "ENVIRONMENT", tmp_path / "none")
    assert "make setup" in page.lines(load_profile("mini"), CHAIN)[-1]


def test_a_mistake_in_a_name_is_told():
    with pytest.raises(UserError, match="did you mean 01_qa_curation"):
        graph.steps(load_profile("mini"), ["01_qa_curatio"])


def test_each_stage_has_its_commands(runs_folder):
    (step,) = graph.steps(load_profile("paper"), CHAIN[2:3])
    assert "$ sbatch configs/slurm/llamafactory.slurm" in step.details
    started = [line for line in step.details if "llamafactory-cli train" in line]
    trainings = wanted(load_profile("paper").pretraining)
    assert {line.split("/")[-2] for line in started} == {training.name for training in trainings}
    variables = next(line for line in step.details if "`export PATH=" in line)
    for part in (
        "NNODES=2",
        "NPROC_PER_NODE=8",
        "FORCE_TORCHRUN=1",
        "PYTHONPATH=caprl_utils/pretraining/site",
    ):
        assert part in variables, part


def test_images_are_counted_once_and_all_captions_are_written(runs_folder):
    profile = load_profile("paper")
    (step,) = graph.steps(profile, CHAIN[2:3])
    assert plan.image_gb(profile) == pytest.approx(8.558e6 * 120_000 / 1e9)
    assert sum(plan.captions_by_caprl(profile).values()) == 7_000_000
    assert step.disk_gb == pytest.approx(
        1027 + sum(row.disk_gb for row in plan.plan_pretraining(profile)), rel=1e-3
    )
    writing = 2 * 3.75e9 * 7e6 * 2100 / (990e12 * 0.1) / 3600
    training = sum(row.hours * row.gpus for row in plan.plan_pretraining(profile))
    assert step.gpu_hours == pytest.approx(writing + training)


def test_a_model_of_unknown_size_leaves_its_steps_out_and_says_so(runs_folder):
    own = {"path": "somebody/vlm-13b"}
    profile = load_profile(
        "paper", {"models": {"question_writer": own}, "pretraining.settings": ["mini-qwen-3b"]}
    )
    text = page.lines(profile, CHAIN[:3])
    assert "  size of question_writer unknown" in text
    (total,) = (line for line in text if line.startswith("in all:"))
    assert "; without 01_qa_curation: size of question_writer unknown" in total
    assert "; without 04_llamafactory_pretraining: size of setting mini-qwen-3b unknown" in total
    assert "GPU-hours" in total and any(
        "nothing is known about the size of 'somebody/vlm-13b'" in t for t in text
    )
