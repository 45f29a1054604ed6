"""The YAML of a stage, without LLaMA-Factory (test_llamafactory.py asks its own parser)."""

import json

import pytest
import yaml

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.pretraining import arguments
from caprl_utils.pretraining.arguments import Chat, Files

PAPER = load_profile("paper").pretraining
FILES = Files("model", "data", "align", "media", "out")


def made(stage, settings=PAPER, files=FILES, chat=Chat("qwen2_vl")):  # noqa: B008
    return arguments.stage_arguments(settings, stage, chat, files, seed=0)


@pytest.mark.parametrize(
    ("stage", "rate", "batch", "frozen"),
    [
        ("align", 1e-3, 256, (True, False, True)),
        ("further", 4e-5, 256, (False,) * 3),
        ("sft", 2e-5, 128, (False,) * 3),
    ],
)
def test_the_papers_values(stage, rate, batch, frozen):
    found = made(stage)
    assert found["learning_rate"] == rate
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] * 16 == batch
    keys = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
    assert tuple(found[key] for key in keys) == frozen
    assert (found["cutoff_len"], found["lr_scheduler_type"], found["warmup_ratio"]) == (6144, "cosine", 0.1)
    assert found["image_max_pixels"] == 1024 * 28 * 28 and found["bf16"] and found["num_train_epochs"] == 1
    assert found["deepspeed"].endswith("configs/llamafactory/deepspeed_zero3.json")
    assert found["stage"] == "sft" and found["packing"] is False


def test_yaml_keeps_numbers_numbers():
    text = arguments.to_yaml(made("further") | {"tiny": 1e-7}, "remark")
    read = yaml.safe_load(text)
    assert read["learning_rate"] == 4e-5 and read["tiny"] == 1e-7 and read["num_train_epochs"] == 1.0
    assert text.startswith("# remark\n")


def test_without_deepspeed_a_resume_loads_the_checkpoint_as_the_model():
    alone = PAPER.model_copy(update={"deepspeed": None, "nodes": 1, "gpus_per_node": 0})
    files = Files("model", "data", "align", "media", "out", checkpoint="out/checkpoint-3")
    found = made("align", alone, files)
    assert found["model_name_or_path"] == found["resume_from_checkpoint"] == "out/checkpoint-3"
    assert found["use_cpu"] and "deepspeed" not in found
    sharded = made("align", PAPER, files)
    assert (
        sharded["model_name_or_path"] == "model" and sharded["resume_from_checkpoint"] == "out/checkpoint-3"
    )


def test_a_batch_that_does_not_divide_is_refused():
    odd = PAPER.model_copy(update={"gpus_per_node": 7})
    with pytest.raises(UserError, match="batch_size 256 is no multiple of 28"):
        made("align", odd)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_files(name):
    read = json.loads((paths.CONFIGS / "llamafactory" / f"deepspeed_{name}.json").read_text())
    assert read["zero_optimization"]["stage"] == int(name[-1])
    assert read["train_batch_size"] == "auto"


def test_no_system_turn_only_where_it_is_asked_for():
    assert "default_system" not in made("sft")
    assert made("sft", chat=Chat("qwen2_vl", ""))["default_system"] == ""


def test_a_setting_may_align_at_its_own_pace():
    changed = {"align_of": {"mini-internlm-clip": {"num_epochs": 6, "learning_rate": 0.01}}}
    settings = load_profile("mini", {"pretraining": changed}).pretraining
    own = arguments.stage_of(settings, "align", "mini-internlm-clip")
    assert (own.num_epochs, own.learning_rate) == (6, 0.01) and own.batch_size == settings.align.batch_size
    assert arguments.stage_of(settings, "align", "mini-qwen-3b") == settings.align
    assert arguments.stage_of(settings, "sft", "mini-internlm-clip") == settings.sft
    with pytest.raises(UserError, match="align_of"):
        load_profile("mini", {"pretraining": {"align_of": {"mini-qwen-3b": {"learning_rate": -1}}}})
