"""Notebook 04 as a whole for the profiles of real models, which swap only paths and counts here."""

import json
import shutil
import subprocess
import sys

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.runs import load_result


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["one_gpu", "paper"])
def test_notebook_04_ends(name, real_profile, qwen_vlm, runs_folder):
    file = real_profile(name)
    trained = runs_folder / file.stem / "rl" / "caprl-seed0"
    shutil.copytree(qwen_vlm, trained / "final")
    (trained / "result.json").write_text(json.dumps({"values": {"steps": 1}, "key": "k"}))
    notebook = f"04_prism_evaluation:profile={file}"
    command = [sys.executable, "-m", "caprl_utils", "run", notebook, "--profile", str(file)]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    record = load_result(runs_folder / file.stem / "prism" / "caprl-seed0")
    assert list(record["n"]) == load_profile(file).prism.benchmarks
    means = {key: found["mean"] for key, found in record["values"]["benchmarks"].items()}
    assert means["charxiv"] is None and means["chartqa"] is not None and record["values"]["average"] is None
    ceiling = load_result(runs_folder / file.stem / "prism" / "ceiling-image")
    assert "images" in str(ceiling["left_out"]["mmmu"])
    assert (runs_folder / file.stem / "prism" / "base-72b").exists() == (name == "paper")
