"""The third cell of a notebook: what it prints, what it prepares, what it refuses."""

import os

import pytest

from caprl_utils import notebook, paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.files import write_json


@pytest.fixture(autouse=True)
def clean_environment():
    """`start` sets environment variables for the kernel it runs in."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_start_prints_profile_settings_commit_and_versions(capsys):
    context = notebook.start("04 Prism", "smoke", seed=3, show=("rl.steps", "models.policy"))
    shown = capsys.readouterr().out
    for text in ("04 Prism", "profile   smoke", "seed      3", "commit    ", "torch "):
        assert text in shown
    assert f"rl.steps {context.profile.rl.steps}" in " ".join(shown.split())
    assert "models.policy.path" in shown and "models.captioner_7b" not in shown
    assert str(paths.ROOT) not in shown


def test_start_prepares_the_process_and_only_offline_profiles_lose_the_hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    notebook.prepare_process(load_profile("paper"))
    assert "HF_HUB_OFFLINE" not in os.environ
    notebook.prepare_process(load_profile("smoke", {"torch_threads": 3}))
    assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["OMP_NUM_THREADS"] == "3"


def test_a_missing_input_names_the_target_that_makes_it(runs_folder):
    told = "rl/policy is missing; make it: make 03_caprl_rl_training PROFILE=smoke"
    with pytest.raises(UserError, match=told):
        notebook.start("04", "smoke", needs={"rl/policy": "03_caprl_rl_training"})
    write_json(runs_folder / "smoke" / "rl" / "policy" / "result.json", {})
    notebook.start("04", "smoke", needs={"rl/policy": "03_caprl_rl_training"})


@pytest.mark.parametrize("seed", [-1, "0", 1.0, True])
def test_a_bad_seed_and_an_unknown_setting_to_show_are_named(seed):
    with pytest.raises(UserError, match="parameter seed"):
        notebook.start("04", "smoke", seed=seed)
    with pytest.raises(UserError, match=r"no setting 'rl\.stepz'"):
        notebook.start("04", "smoke", show=("rl.stepz",))
