"""What a changed setting recomputes: the trainings that depend on it, and nothing else."""

import re
import shutil

import pytest

from caprl_utils import paths
from caprl_utils.config import load_experiment, load_profile
from caprl_utils.curation import pipeline
from caprl_utils.rl import train
from caprl_utils.rl.ablations import planned


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Call with YAML over mini and the reward's rounds: (curation's key, training -> its key)."""
    questions = tmp_path / "qa.parquet"
    questions.write_bytes(b"the same questions")
    monkeypatch.setattr(train, "data_file", lambda *_: questions)

    experiments = tmp_path / "configs" / "experiments"
    shutil.copytree(paths.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(paths, "CONFIGS", tmp_path / "configs")

    def call(text="", rounds=4):
        preset = experiments / "paper.yaml"
        preset.write_text(re.sub(r"rounds: \d+", f"rounds: {rounds}", preset.read_text()))
        file = tmp_path / "mine.yaml"
        file.write_text(f"extends: mini\n{text}")
        profile = load_profile(str(file))
        found = {}
        for one in planned(profile):
            run = train.open_run(*load_experiment(one.experiment, str(file)), one.seed)
            found[one.name] = run.key
            run.close()
        return pipeline.open_job(profile).run.key, found

    return call


def differing(before, after):
    return {name for name in before if before[name] != after[name]}


def test_the_rewards_rounds_retrain_all_but_those_with_rounds_of_their_own(keys):
    curation, before = keys()
    same, after = keys(rounds=3)
    assert same == curation
    own = {f"rounds_{rounds}-seed{seed}" for rounds in (1, 2, 8) for seed in (0, 1)}
    assert set(before) - differing(before, after) == own


def test_another_seed_is_another_training_and_leaves_the_rest(keys):
    _, one = keys("rl: {seeds: [0]}")
    _, two = keys("rl: {seeds: [0, 1]}")
    assert differing(one, two) == set() and set(two) - set(one) == {"caprl-seed1"}


def test_the_ablations_size_leaves_the_main_run(keys):
    _, before = keys()
    _, after = keys("ablations: {steps: 7}")
    assert "caprl-seed0" not in differing(before, after) and "short-seed0" in differing(before, after)
