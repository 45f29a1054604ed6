"""The YAML of a stage, LLaMA-Factory as a process (a script in its place shows what becomes of it), and what it made.

test_llamafactory.py asks the real one.
"""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.base import PARTS, part_of
from caprl_utils.pretraining import llamafactory, pretrain
from caprl_utils.pretraining.data import DataSet
from caprl_utils.pretraining.sets import Training, folder_of
from caprl_utils.runs import last_checkpoint

ALONE = {"deepspeed": None, "nodes": 1, "gpus_per_node": 0}
SOME = DataSet("align", Path("data"), Path("media"), {"hash": "hash", "rows": 10_000})
ALIGN = Training("t", "mini-qwen-3b", "align")
NEW = {"model.visual.blocks.0.w": 2.0, "model.visual.merger.mlp.0.w": 3.0, "model.language_model.layers.0.w": 4.0}
OLD = {"visual.blocks.0.w": 2.0, "visual.merger.mlp.0.w": 3.0, "model.layers.0.w": 4.0}


def model(folder, values):
    """Five numbers of one value in every tensor."""
    folder.mkdir(parents=True)
    save_file({name: torch.full((5,), value) for name, value in values.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return folder


# The YAML


@pytest.fixture
def made(tmp_path):
    """A stage's YAML as keys and values."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')

    def make(name, checkpoint=None, **changed):
        profile, training = load_profile("paper", {"pretraining": changed}), Training("t", "qwen2.5-3b", name)
        return yaml.safe_load(llamafactory.train_yaml(profile, training, tmp_path, SOME, tmp_path / "out", checkpoint))

    return make


@pytest.mark.parametrize(
    ("stage", "rate", "batch", "frozen"),
    [("align", 1e-3, 256, [True, False, True]), ("further", 4e-5, 256, [False] * 3), ("sft", 2e-5, 128, [False] * 3)],
)  # fmt: skip
def test_the_papers_values(stage, rate, batch, frozen, made):
    found = made(stage)
    assert found["learning_rate"] == rate
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] * 16 == batch
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    assert [found[f"freeze_{part}"] for part in parts] == frozen
    assert (found["cutoff_len"], found["lr_scheduler_type"], found["warmup_ratio"]) == (6144, "cosine", 0.1)
    assert found["image_max_pixels"] == 1024 * 28 * 28 and found["bf16"] and found["num_train_epochs"] == 1
    assert found["deepspeed"].endswith("configs/llamafactory/deepspeed_zero3.json")
    assert found["stage"] == "sft" and found["packing"] is False


def test_without_deepspeed_a_resume_loads_the_checkpoint_as_the_model(made, tmp_path):
    found, sharded = made("align", "out/checkpoint-3", **ALONE), made("align", "out/checkpoint-3")
    assert found["model_name_or_path"] == found["resume_from_checkpoint"] == "out/checkpoint-3"
    assert found["use_cpu"] and "deepspeed" not in found
    assert sharded["model_name_or_path"] == str(tmp_path)
    assert sharded["resume_from_checkpoint"] == "out/checkpoint-3" and sharded["data_shared_file_system"]


def test_what_saves_memory_on_gpus_is_used_where_it_is_installed(made, monkeypatch, tmp_path):
    monkeypatch.setattr(llamafactory, "ENVIRONMENT", tmp_path)
    assert not {"enable_liger_kernel", "flash_attn"} & made("sft").keys()
    for package in ("liger_kernel", "flash_attn"):
        (tmp_path / "lib" / "python3.11" / "site-packages" / package).mkdir(parents=True)
    assert made("sft")["enable_liger_kernel"] and made("sft")["flash_attn"] == "fa2"
    assert "enable_liger_kernel" not in made("sft", **ALONE)


def test_a_batch_that_does_not_divide_is_refused(made):
    with pytest.raises(UserError, match="batch_size 256 is no multiple of 28"):
        made("align", gpus_per_node=7)


def test_no_system_turn_where_the_models_template_has_none(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert llamafactory.chat_of(tmp_path) == {"template": "qwen2_vl", "default_system": ""}
    (tmp_path / "chat_template.jinja").write_text("You are a helpful assistant.")
    assert llamafactory.chat_of(tmp_path) == {"template": "qwen2_vl"}
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert llamafactory.chat_of(tmp_path) == {"template": "caprl_llava"}


def test_a_setting_may_align_at_its_own_pace():
    changed = {"align_of": {"mini-internlm-clip": {"num_epochs": 6, "learning_rate": 0.01}}}
    settings = load_profile("mini", {"pretraining": changed}).pretraining
    own = llamafactory.stage_of(settings, "align", "mini-internlm-clip")
    assert (own.num_epochs, own.learning_rate) == (6, 0.01) and own.batch_size == settings.align.batch_size
    assert llamafactory.stage_of(settings, "align", "mini-qwen-3b") == settings.align
    assert llamafactory.stage_of(settings, "sft", "mini-internlm-clip") == settings.sft


# The process


def program(monkeypatch, folder, text=""):
    """An environment with a package that stands for LLaMA-Factory; text: what its command line does."""
    scripts, package = folder / "environment" / "bin", folder / "site" / "llamafactory"
    (package / "train").mkdir(parents=True)
    (package / "train" / "tuner.py").touch()
    (package / "cli.py").write_text(f"def main():\n    {text or 'pass'}\n")
    scripts.mkdir(parents=True)
    for name, line in (("llamafactory-cli", ""), ("python", f'exec {sys.executable} "$@"')):
        (scripts / name).write_text(f"#!/bin/sh\n{line}\n")
        (scripts / name).chmod(0o755)
    monkeypatch.setattr(llamafactory, "ENVIRONMENT", scripts.parent)
    monkeypatch.setattr(llamafactory, "SITE", package.parent)


def test_several_nodes_are_started_by_slurm(monkeypatch, tmp_path):
    program(monkeypatch, tmp_path)
    paper = load_profile("paper")
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    with pytest.raises(UserError, match=r"2 nodes \(here: none\).*configs/slurm/llamafactory\.slurm"):
        pretrain.pretrain(paper)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setattr(pretrain.assembly, "assemble", lambda *_: None)
    assert len(pretrain.assemble(paper)) == 3
    started = llamafactory.command(tmp_path / "train.yaml", 2)
    assert started[:2] == ["srun", "--nodes=2"] and started[-2:] == ["train", str(tmp_path / "train.yaml")]
    found = llamafactory.environment(paper)
    assert (found["NNODES"], found["NPROC_PER_NODE"], found["FORCE_TORCHRUN"]) == ("2", "8", "1")
    assert str(llamafactory.SITE) in found["PYTHONPATH"]
    subprocess.run(["bash", "-n", str(paths.CONFIGS / "slurm" / "llamafactory.slurm")], check=True)


def test_what_a_training_on_a_cpu_is_started_with(tmp_path, monkeypatch):
    found = llamafactory.environment(load_profile("mini"))
    assert found["OMP_NUM_THREADS"] == "1"  # side by side the threads are shared
    assert found["MPLBACKEND"] == "Agg"  # a notebook's way of plotting stays in the notebook
    monkeypatch.setattr(llamafactory, "ENVIRONMENT", tmp_path)
    with pytest.raises(UserError, match="make setup-llamafactory"):
        llamafactory.command(tmp_path / "train.yaml")


def test_a_wrong_count_ends_the_training_when_it_is_logged(monkeypatch, tmp_path):
    said = "print('trainable params: 10 || all params: 15', flush=True)"
    program(monkeypatch, tmp_path, f"import time; {said}; time.sleep(300)")
    (tmp_path / "train.log").write_text("trainable params: 5 || all params: 15\n")  # of an earlier attempt
    start, first = time.monotonic(), model(tmp_path / "model", NEW)
    with pytest.raises(UserError, match="10 of 15 parameters trained, expected 5 of 15"):
        llamafactory.run_to_end(load_profile("smoke"), ALIGN, first, tmp_path, lambda *_: None)
    assert time.monotonic() - start < 60


def test_a_complete_training_is_not_made_again_and_what_a_kill_left_is_removed(tmp_path, runs_folder, monkeypatch):
    profile, first, ran = load_profile("smoke"), model(tmp_path / "model", NEW), []
    monkeypatch.setattr(llamafactory, "run_to_end", lambda *_: ran.append(1))
    monkeypatch.setattr(llamafactory, "_finish", lambda run, *_: run.finish(values={"steps": 1}, n=4, unit="row"))
    llamafactory.train(profile, ALIGN, first, SOME)
    work = folder_of(profile, "t") / "work"
    (work / "checkpoint-2").mkdir(parents=True)
    assert llamafactory.train(profile, ALIGN, first, SOME)["values"] == {"steps": 1}
    assert len(ran) == 1 and not work.exists()
    monkeypatch.setattr(llamafactory, "SITE", tmp_path)
    (tmp_path / "sitecustomize.py").write_text("another template")
    llamafactory.train(profile, ALIGN, first, SOME)
    assert len(ran) == 2


# Checkpoints and weights


def checkpoint(folder):
    model(folder, NEW)
    for name in ("tokenizer_config.json", "trainer_state.json", "processor_config.json"):
        (folder / name).write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data", "x" * 100)
    return folder


FILES = ("trainer_state.json", "processor_config.json", "config.json", "model.safetensors", "optimizer.pt",
         "rng_state.pth")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_the_newest_whole_checkpoint_is_taken_and_every_file_counts(tmp_path, name, how):
    assert last_checkpoint(tmp_path, llamafactory.is_whole) is None
    file = checkpoint(tmp_path / "checkpoint-12") / name
    checkpoint(tmp_path / "checkpoint-2")
    checkpoint(tmp_path / "checkpoint-10")
    assert llamafactory.is_whole(file.parent)
    file.unlink() if how == "missing" else file.write_bytes(file.read_bytes()[:-1])
    assert last_checkpoint(tmp_path, llamafactory.is_whole).name == "checkpoint-10" and not file.parent.exists()


@pytest.mark.parametrize("layout", [NEW, OLD])
def test_the_count_of_the_log_must_be_the_stages_in_both_layouts(tmp_path, layout):
    folder, log = model(tmp_path / "model", layout), tmp_path / "train.log"
    log.write_text("[INFO] trainable params: 5 || all params: 15 || trainable%: 33.3333\n")
    assert llamafactory.assert_trainable(log, folder, ["projector"])
    with pytest.raises(UserError, match="5 of 15 parameters trained, expected 15 of 15"):
        llamafactory.assert_trainable(log, folder, PARTS)
    with pytest.raises(UserError, match=r"no config\.json; is it a model folder"):
        llamafactory.assert_trainable(log, tmp_path, PARTS)
    log.write_text("nothing")
    assert not llamafactory.assert_trainable(log, folder, ["projector"])
    assert part_of("vision_tower.vision_model.encoder.w") == "vision_tower"
    assert part_of("multi_modal_projector.linear_1.weight") == "projector"


def test_what_moved_is_measured_across_layouts(tmp_path):
    before = model(tmp_path / "before", OLD)
    after = model(tmp_path / "after", NEW | {"model.visual.merger.mlp.0.w": 3.3})
    moved = llamafactory.assert_changes(before, after, ["projector"])
    assert moved["vision_tower"] == moved["language_model"] == 0
    assert moved["projector"] == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(UserError, match="projector moved"):
        llamafactory.assert_changes(before, after, ["language_model"])
    with pytest.raises(UserError, match="vision_tower did not move"):
        llamafactory.assert_changes(before, after, ["projector", "vision_tower"])
    with pytest.raises(UserError, match="different tensors"):
        llamafactory.assert_changes(before, model(tmp_path / "other", {"model.visual.blocks.0.w": 2.0}), PARTS)


# Evaluation


def test_benchmarks_are_the_papers_where_they_are_not_rendered():
    assert pretrain.benchmarks_of(load_profile("mini")) == load_profile("mini").prism.benchmarks
    for name in ("paper", "one_gpu"):
        found = pretrain.benchmarks_of(load_profile(name))
        assert len(found) == 12 and "mmbench" in found and "mathverse" not in found


@pytest.mark.integration
def test_evaluations_run_side_by_side_and_go_on(monkeypatch, tmp_path, runs_folder):
    """With a zoo model in the place of trained ones; the second call reads back."""
    changed = {"prism": {"num_samples": 2, "benchmarks": ["mini-chart"]}}
    profile = load_profile("smoke", changed)
    names = ["mini-qwen-3b-vanilla-sft-seed0", "mini-qwen-3b-caprl-1m-sft-seed0", "mini-qwen-3b-vanilla-sft-seed1"]
    for name in names:
        final = folder_of(profile, name) / "final"
        final.parent.mkdir(parents=True)
        final.symlink_to(paths.ZOO / "base")
    seen = []
    told = lambda self, count=1, note=None: seen.append((self.label, note))  # noqa: E731
    monkeypatch.setattr(pretrain.Progress, "update", told)
    records = pretrain.evaluate(profile, names)
    assert list(records) == names and all(r["values"]["average"] is not None for r in records.values())
    assert {note for label, note in seen if label == "evaluations"} == set(names)
    alone = load_profile("smoke", changed | {"pretraining.parallel_runs": 1})
    assert pretrain.evaluate(alone, names) == records


def test_caprl_train_takes_tables_and_experiments(monkeypatch, capsys):
    from caprl_utils.__main__ import train
    from caprl_utils.rl import experiments

    asked = []
    record = {"values": {"average": 0.5}}
    monkeypatch.setattr(pretrain, "pretrain", lambda _, items: asked.append(items) or {"a-sft": record})
    monkeypatch.setattr(experiments, "run_all", lambda _, names: asked.append(names) or [])
    train(["table1", "figure4"], profile="smoke")
    train(["caprl", "table2"], profile="smoke")
    assert asked == [["table1", "figure4"], ["caprl"], ["table2"]]  # pretraining needs the captioner
    assert "a-sft  average 0.500" in capsys.readouterr().out
