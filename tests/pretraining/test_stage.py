"""Checkpoints and weights as files: whole or not, what moved."""

import json
import zipfile

import pytest

from caprl_utils.errors import UserError
from caprl_utils.models.base import PARTS, part_of
from caprl_utils.pretraining import llamafactory
from caprl_utils.runs import last_checkpoint

torch = pytest.importorskip("torch")
NEW = {"model.visual.blocks.0.w": 2.0, "model.visual.merger.mlp.0.w": 3.0, "model.language_model.layers.0.w": 4.0}
OLD = {"visual.blocks.0.w": 2.0, "visual.merger.mlp.0.w": 3.0, "model.layers.0.w": 4.0}


def model(folder, values, **config):
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({name: torch.full((5,), value) for name, value in values.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def checkpoint(folder):
    model(folder, NEW)
    for name in ("tokenizer_config.json", "trainer_state.json", "processor_config.json"):
        (folder / name).write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data", "x" * 100)
    return folder


def test_the_newest_whole_checkpoint_is_taken_and_broken_ones_go(tmp_path):
    checkpoint(tmp_path / "checkpoint-2")
    checkpoint(tmp_path / "checkpoint-10")
    broken = checkpoint(tmp_path / "checkpoint-12")
    (broken / "optimizer.pt").write_bytes((broken / "optimizer.pt").read_bytes()[:50])
    assert last_checkpoint(tmp_path, llamafactory.is_whole).name == "checkpoint-10"
    assert not broken.exists()
    assert last_checkpoint(tmp_path / "nowhere", llamafactory.is_whole) is None


JSON = ("trainer_state.json", "processor_config.json", "config.json")
FILES = (*JSON, "model.safetensors", "optimizer.pt", "rng_state.pth")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_every_file_counts(tmp_path, name, how):
    folder = checkpoint(tmp_path / "checkpoint-1")
    assert llamafactory.is_whole(folder)
    file = folder / name
    file.unlink() if how == "missing" else file.write_bytes(file.read_bytes()[:-1])
    assert not llamafactory.is_whole(folder)


def test_parts_are_known_in_both_layouts(tmp_path):
    for name, values in (("new", NEW), ("old", OLD)):
        assert llamafactory.counts(model(tmp_path / name, values)) == dict.fromkeys(PARTS, 5)
    assert part_of("vision_tower.vision_model.encoder.w") == "vision_tower"
    assert part_of("multi_modal_projector.linear_1.weight") == "projector"


def test_what_moved_is_measured_across_layouts(tmp_path):
    before = model(tmp_path / "before", OLD)
    after = model(tmp_path / "after", NEW | {"model.visual.merger.mlp.0.w": 3.3})
    moved = llamafactory.changes(before, after)
    assert moved["vision_tower"] == moved["language_model"] == 0
    assert moved["projector"] == pytest.approx(0.1, rel=1e-4)
    llamafactory.assert_changes(moved, ["projector"])
    with pytest.raises(UserError, match="projector moved"):
        llamafactory.assert_changes(moved, ["language_model"])
    with pytest.raises(UserError, match="vision_tower did not move"):
        llamafactory.assert_changes(moved, ["projector", "vision_tower"])


def test_the_count_of_the_log_must_be_the_stages(tmp_path):
    folder, log = model(tmp_path / "model", NEW), tmp_path / "train.log"
    log.write_text("[INFO] trainable params: 5 || all params: 15 || trainable%: 33.3333\n")
    assert llamafactory.assert_trainable(log, folder, ["projector"]) == {"trainable": 5, "all": 15}
    with pytest.raises(UserError, match="5 of 15 parameters trained, expected 15 of 15"):
        llamafactory.assert_trainable(log, folder, PARTS)
    log.write_text("nothing")
    assert llamafactory.assert_trainable(log, folder, ["projector"]) is None


def test_other_tensors_and_no_tensors_are_named(tmp_path):
    before = model(tmp_path / "before", NEW)
    with pytest.raises(UserError, match="different tensors"):
        llamafactory.changes(before, model(tmp_path / "after", {"model.visual.blocks.0.w": 2.0}))
    with pytest.raises(UserError, match=r"no config\.json; is it a model folder"):
        llamafactory.counts(tmp_path)
