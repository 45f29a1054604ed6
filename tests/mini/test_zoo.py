"""The model zoo: small enough for git, loadable, and trained as its records say."""

import json
from dataclasses import replace

import pytest
import torch

from caprl_utils import paths
from caprl_utils.mini.zoo import models
from caprl_utils.mini.zoo.recipes import RECIPES, Schedule
from caprl_utils.mini.zoo.train import build, train

COPIER = RECIPES["copier"]


def test_weights_are_at_most_20_megabytes_in_16_bit():
    files = [f for f in paths.ZOO.rglob("*.safetensors") if not f.is_symlink()]  # a shared tower counts once
    assert files and {f.parent.name for f in files} <= {n for n, r in RECIPES.items() if r.shipped}
    assert sum(f.stat().st_size for f in files) < 20 * 2**20


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_model_has_a_record_and_a_curve_that_fell(recipe):
    record = json.loads((recipe.weights_folder / "record.json").read_text())
    lines = (recipe.weights_folder / "curve.jsonl").read_text().splitlines()
    first, last = (json.loads(line) for line in (lines[0], lines[-1]))
    assert record["steps"] == recipe.schedule.steps == last["step"] + 1
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("name", ["copier", "clip-tower"])
def test_a_short_retraining_follows_the_curve_on_record(name, tmp_path):
    recipe, steps = RECIPES[name], 2
    torch.set_num_threads(2)
    train(recipe, steps=steps, folder=tmp_path)
    again = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    recorded = (recipe.weights_folder / "curve.jsonl").read_text().splitlines()
    assert len(again) == steps
    for row, line in zip(again, recorded, strict=False):
        assert row["loss"] == pytest.approx(json.loads(line)["loss"], rel=1e-3)


def test_a_stopped_training_goes_on_where_it_was(tmp_path):
    recipe = replace(COPIER, schedule=Schedule(4), batch_size=12)
    whole = train(recipe, folder=tmp_path / "whole")
    train(recipe, steps=2, folder=tmp_path / "parts")
    parts = train(recipe, folder=tmp_path / "parts")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_takes_its_vision_tower_from_the_recipe_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    made = {}
    for seed, name in enumerate(("binder", "vision-tower")):
        made[name] = models.build_vlm(seed)
        RECIPES[name].work_folder.mkdir(parents=True)
        torch.save(made[name].state_dict(), RECIPES[name].work_folder / "model.pt")
    weights = build(RECIPES["vlm-72b"]).state_dict()
    for key, tensor in weights.items():
        assert torch.equal(tensor, made["vision-tower" if "visual." in key else "binder"].state_dict()[key])
