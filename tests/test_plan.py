"""The plan: what each notebook costs, and what is missing with its remedy."""

import pytest

from caprl_utils import run
from caprl_utils.config import load_profile, names_of, read_yaml
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.schema import Profile


def plan(name):
    return "\n".join(run.plan(load_profile(name)))


def test_the_paper_profile_names_every_missing_thing_and_one_gpu_needs_no_server(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "visible_gpus", list)
    monkeypatch.setattr(run, "ENVIRONMENT", tmp_path)
    table, missing = plan("paper").split("missing:")
    assert "servers                              0 of 7 here" in table and "GPU-hours" not in table
    for part in ("16 GPUs at once, 16,000 GPU-hours", "in all: 18,649 GPU-hours",
                 "GPUs: 16 at once, this machine has 0",
                 "hf download Qwen/Qwen2.5-VL-3B-Instruct",
                 "make serve MODEL=Qwen/Qwen2.5-VL-72B-Instruct PORT=8000", "data/pretraining/CapRL-5M.json",
                 "hf download --repo-type dataset lmms-lab-encoder/ChartQA"):  # fmt: skip
        assert part in missing, part
    text = plan("one_gpu")  # none of its trainings asks that judge
    assert "GPUs at once: 1 " in text and not any(word in text for word in ("server", "72B", "UnifiedReward"))


def test_nothing_is_missing_for_the_mini_world(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ENVIRONMENT", tmp_path)
    assert "nothing is missing" in plan("mini")
    monkeypatch.setattr(run, "ENVIRONMENT", tmp_path / "none")
    assert "make setup-llamafactory" in plan("mini")
    run.check(load_profile("mini"), ["01_qa_curation", "03_caprl_rl_training"])  # these go without it


def test_a_server_that_only_an_earlier_notebook_asked_may_be_gone(monkeypatch):
    monkeypatch.setattr(run, "visible_gpus", list)
    monkeypatch.setattr(run, "_have", lambda path, kind: True)
    with pytest.raises(UserError, match=r"\(prism_reader\)") as told:
        run.check(load_profile("paper"), ["04_prism_evaluation", "06_tables_and_figures"])
    for gone in ("question_writer", "reward_reader", "images.source", "LLaMA-Factory"):
        assert gone not in str(told.value), gone


def test_a_notebook_takes_what_it_took_here_or_what_is_published_at_this_machines_pace(runs_folder, monkeypatch):
    monkeypatch.setattr(run, "REPORTED", runs_folder / "published.json")
    write_json(run.REPORTED, {"mini": {"01": 50.0, "03": 1000.0, "04": 700.0}})
    assert run.known_times("mini")["04"] == 700.0 and run.known_times("smoke") == {}
    write_json(runs_folder / "mini" / "notebooks" / "times.json", {"01": 65.0, "03": 2035.0})
    assert run.known_times("mini") == {"01": 65.0, "03": 2035.0, "04": 1400.0}
    assert [run.duration(s) for s in (5, 65, 605, 3605)] == ["0:05", "1:05", "10:05", "1:00:05"]
    for profile, costs in read_yaml(run.ESTIMATES).items():
        assert profile in names_of(Profile) and set(costs) <= set(run.CHAIN)
