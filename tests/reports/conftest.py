"""Finished runs with known scores, written by the same code that real runs use."""

import json

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.prism import scores
from caprl_utils.runs import Run

BENCHMARKS = ("mini-chart", "mini-scene")
IMAGES = 40


def prism_run(profile, name, right, tokens=20.0):
    """A Prism run in which the first `right` of every 20 images are answered right, with two captions
    each.
    """
    shared = {"question": "What is it?", "options": [], "gold": "7", "answer": "7", "letter_mass": None}
    shared |= {"parsed": "7", "reason": None, "finish_reason": "stop"}
    shared["num_tokens"] = None if tokens is None else int(tokens)
    rows = [
        {
            **shared,
            "benchmark": benchmark,
            "sample_id": f"s{n}",
            "image_id": f"{benchmark}/i{n}",
            "caption_index": index,
            "caption": f"caption {index} of {n}",
            "score": float(n % 20 < right),
        }
        for benchmark in BENCHMARKS
        for n in range(IMAGES)
        for index in range(2)
    ]
    with Run.open(profile, "prism", name, {"right": right}, ["caprl_utils.prism.scores"]) as run:
        scores.write_samples(run.folder / "samples.parquet", rows, name)
        summary = scores.summarise(rows, profile.prism.bootstrap_draws, profile.seed)
        run.finish(
            **summary, unit="sample", label=name, captions_per_image=2, reader={"name": "r", "mode": "choice"}
        )


def rl_run(profile, seed=0, steps=12):
    """A training run's curve."""
    folder = paths.RUNS / profile.name / "rl" / f"caprl-seed{seed}"
    folder.mkdir(parents=True)
    rows = [{"step": n, "reward": 0.3 + 0.03 * n, "completion_tokens": 20.0 + n} for n in range(1, steps + 1)]
    (folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(name="prism_run")
def prism_run_fixture():
    """The function prism_run."""
    return prism_run


@pytest.fixture(name="rl_run")
def rl_run_fixture():
    """The function rl_run."""
    return rl_run


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """Profile mini with one RL training a row, and with runs and reports in a folder of the test."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    mini = load_profile("mini", {"prism.bootstrap_draws": 500, "rl.seeds": [0]})
    return mini.model_copy(update={"ablations": mini.ablations.model_copy(update={"more_seeds": {}})})


@pytest.fixture
def finished(profile):
    """Base, CapRL, 72B, a floor and the training are done."""
    prism_run(profile, "base-3b", right=8)
    prism_run(profile, "caprl-seed0", right=14, tokens=40.0)
    prism_run(profile, "base-72b", right=18, tokens=45.0)
    prism_run(profile, "floor-empty", right=1, tokens=0.0)
    rl_run(profile)
    return profile
