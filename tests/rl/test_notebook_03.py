"""Notebook 03, whole, with the settings of the sizes that need GPUs: zoo models stand for theirs, on this machine."""

import json
import subprocess
import sys

import pytest
import yaml

from caprl_utils import paths
from tests.rl.conftest import write_questions

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
ROLES = {
    "policy": "base", "captioner_7b": "mid", "question_writer": "strong", "question_filter": "base",
    "reward_reader": "reader-reward", "prism_reader": "reader-prism", "vlm_judge": "judge", "reward_judge": "judge",
}  # fmt: skip


@pytest.mark.parametrize(("name", "preset"), [("one_gpu", "one_gpu"), ("paper", None)])
def test_the_notebook_runs_to_its_checks(name, preset, tmp_path, runs_folder):
    """one_gpu: adapters, the answer's expectation. paper: all weights, sampled answers."""
    profile = {
        "extends": name, "torch_threads": 1, "offline": True, "prompts": "short",  # the words that zoo readers know
        "models": {role: {"path": f"zoo:{model}"} for role, model in ROLES.items()},
        "rl": {"num_images": 4, "prompts_per_step": 2, "steps": 2, "warmup_steps": 1, "max_completion_tokens": 24,
               "preset": preset, "save_every": 1},
    }  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(profile))
    write_questions(runs_folder / "tiny" / "curation" / "main" / "qa.parquet", num_images=4)
    (runs_folder / "tiny" / "curation" / "main" / "result.json").write_text(json.dumps({"key": "k"}))
    notebook = "03_caprl_rl_training:num_examples=2"
    command = [sys.executable, "-m", "caprl_utils", "run", notebook, "-p", f"profile={file}"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
