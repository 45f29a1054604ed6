"""Notebook 05, whole, with the settings of one_gpu and paper: tiny models under their hub ids, a user's data files."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from caprl_utils import paths
from tests.pretraining.conftest import REAL

pytestmark = REAL
ROWS = 2


def write_files(folder) -> str:
    """Data files of a user as the profile names them; returns their media folder."""
    media = folder / "images"
    media.mkdir(parents=True)
    for number in range(ROWS):
        Image.effect_noise((320, 240), 90).convert("RGB").save(media / f"{number}.jpg")
    for name in ("align", "CapRL-1M", "DenseFusion-1M", "sft"):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Noise, of {name}."}]
        rows = [{"id": n, "image": f"{n}.jpg", "conversations": turns} for n in range(ROWS)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return str(media)


def hub_of(home, models) -> None:
    """A cache of the hub that holds these folders under hub ids, so that the paper's pair is assembled offline."""
    for name, folder in models.items():
        place, commit = home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
        (place / "snapshots").mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)
        (place / "snapshots" / commit).symlink_to(folder)


# of paper without Slurm: one pair of models on one node
ONE_PAIR = {"settings": ["qwen2.5-3b"], "items": ["figure4"], "nodes": 1, "deepspeed": None}


@pytest.mark.parametrize(("name", "less"), [("one_gpu", {}), ("paper", ONE_PAIR)])
def test_it_runs_to_its_checks(name, less, real_profile, qwen_reader, qwen_vlm, runs_folder, tmp_path, monkeypatch):
    hub_of(tmp_path / "hf", {"Qwen/Qwen2.5-3B": qwen_reader, "Qwen/Qwen2.5-VL-3B-Instruct": qwen_vlm})
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = tmp_path / "pretraining"
    stage = {
        "num_rows": ROWS,
        "batch_size": ROWS,
        "micro_batch_size": ROWS,
        "num_epochs": 2,
    }  # the first step only warms up
    profile = real_profile(name, pretraining=less | {
        "media_folder": write_files(data), "gpus_per_node": 0, "precision": "float32",
        "align": stage | {"data": str(data / "align.json")}, "sft": stage | {"data": str(data / "sft.json")},
        "further": stage | {"data": str(data / "{name}.json"), "num_rows_large": ROWS, "growth": []},
    })  # fmt: skip
    captioner = runs_folder / profile.stem / "rl" / "caprl-seed0"
    captioner.mkdir(parents=True)
    (captioner / "result.json").write_text(json.dumps({"key": "k"}))
    command = ["-m", "caprl_utils", "run", "05_llamafactory_pretraining", "-p"]
    done = subprocess.run(
        [sys.executable, *command, f"profile={profile}"], cwd=paths.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert (runs_folder / profile.stem / "reports" / "figure4.csv").is_file()
