"""The model zoo: small enough for git, loadable, and trained as its records say."""

import json
from dataclasses import replace

import pytest
import torch

from caprl_utils import paths
from caprl_utils.mini.zoo import train as zoo
from caprl_utils.mini.zoo.fitting import Schedule


def test_weights_are_at_most_20_megabytes_in_16_bit():
    files = [f for f in paths.ZOO.rglob("*.safetensors") if not f.is_symlink()]  # a shared tower counts once
    assert files and {f.parent.name for f in files} <= {n for n, r in zoo.RECIPES.items() if r.shipped}
    assert sum(f.stat().st_size for f in files) < 20 * 2**20


@pytest.mark.parametrize("name", zoo.RECIPES)
def test_every_model_has_a_record_and_a_curve_that_fell(name):
    folder = zoo.weights_folder(name)
    record = json.loads((folder / "record.json").read_text())
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert record["steps"] == zoo.RECIPES[name].schedule.steps == curve[-1]["step"] + 1
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_a_short_retraining_follows_the_curve_on_record(tmp_path):
    recipe = zoo.RECIPES["copier"]
    torch.set_num_threads(2)
    zoo.train(recipe, steps=4, folder=tmp_path)
    again = [json.loads(line)["loss"] for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    recorded = (zoo.weights_folder("copier") / "curve.jsonl").read_text().splitlines()
    for loss, line in zip(again, recorded, strict=False):
        assert loss == pytest.approx(json.loads(line)["loss"], rel=1e-3)


def test_a_stopped_training_goes_on_where_it_was(tmp_path):
    recipe = replace(zoo.RECIPES["copier"], schedule=Schedule(4), batch_size=12)
    whole = zoo.train(recipe, folder=tmp_path / "whole")
    zoo.train(recipe, steps=2, folder=tmp_path / "parts")
    parts = zoo.train(recipe, folder=tmp_path / "parts")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)
