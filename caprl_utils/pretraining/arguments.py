"""One YAML per stage for `llamafactory-cli train`, from the typed settings of a profile.

python -m caprl_utils.pretraining.arguments paper        print the three files of a profile
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError, command_line
from caprl_utils.schema import Pretraining, PretrainingStage

FILES = paths.CONFIGS / "llamafactory"
STAGES = ("align", "further", "sft")
QWEN, LLAVA = "qwen2_vl", "caprl_llava"
"""Templates: LLaMA-Factory's own, and ours for LLaVA models with ChatML turns (site/sitecustomize.py)."""


@dataclass(frozen=True)
class Chat:
    """How LLaMA-Factory writes a conversation. system: None keeps the template's own, "" writes none."""

    template: str
    system: str | None = None


@dataclass(frozen=True)
class Files:
    """What a stage reads and writes. checkpoint: go on from there."""

    model: Path | str
    data_folder: Path | str
    dataset: str
    media: Path | str
    output: Path | str
    checkpoint: Path | str | None = None


def stage_of(settings: Pretraining, name: str, setting: str | None = None) -> PretrainingStage:
    """The settings of a stage by its name, as the named setting (of Table 1) trains it."""
    stage = getattr(settings, name)
    changed = settings.align_of.get(setting) if name == "align" and setting is not None else None
    return stage.model_copy(update=changed) if changed else stage


def world_size(settings: Pretraining) -> int:
    """Processes that train together."""
    return max(1, settings.nodes * settings.gpus_per_node)


def accumulation(settings: Pretraining, stage: PretrainingStage) -> int:
    """Forward passes per update. Raises UserError when the batch is no multiple of what fits in one pass."""
    at_once = world_size(settings) * stage.micro_batch_size
    if stage.batch_size % at_once:
        raise UserError(
            f"pretraining: batch_size {stage.batch_size} is no multiple of {at_once} "
            f"({settings.nodes} nodes x {settings.gpus_per_node} GPUs x micro_batch_size "
            f"{stage.micro_batch_size}); change micro_batch_size"
        )
    return stage.batch_size // at_once


def num_steps(stage: PretrainingStage, num_rows: int) -> int:
    """Updates of a stage; the last, smaller batch counts."""
    return max(1, math.ceil(math.ceil(num_rows / stage.batch_size) * stage.num_epochs))


def stage_arguments(
    settings: Pretraining,
    name: str,
    chat: Chat,
    files: Files,
    seed: int,
    save_every: int | None = None,
    setting: str | None = None,
) -> dict[str, Any]:
    """Keys and values of a stage's YAML. setting: whose (see `stage_of`).

    With a checkpoint and without DeepSpeed the model is loaded from the checkpoint: the trainer's own way loads
    nothing into a Qwen2.5-VL, says so in two warnings, and goes on from the initial weights
    (huggingface/transformers#43701). DeepSpeed has a loader of its own.
    """
    stage = stage_of(settings, name, setting)
    on_cpu = settings.gpus_per_node == 0
    resumed = files.checkpoint is not None and settings.deepspeed is None
    arguments: dict[str, Any] = {
        "model_name_or_path": str(files.checkpoint if resumed else files.model),
        "trust_remote_code": False,
        "image_min_pixels": settings.min_pixels,
        "image_max_pixels": settings.max_pixels,
        "stage": "sft",  # for captions too: `pt` would pack rows
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": "vision_tower" not in stage.trains,
        "freeze_multi_modal_projector": "projector" not in stage.trains,
        "freeze_language_model": "language_model" not in stage.trains,
        "template": chat.template,
        "dataset": files.dataset,
        "dataset_dir": str(files.data_folder),
        "media_dir": str(files.media),
        "cutoff_len": settings.cutoff_tokens,
        "packing": False,
        "output_dir": str(files.output),
        "per_device_train_batch_size": stage.micro_batch_size,
        "gradient_accumulation_steps": accumulation(settings, stage),
        "learning_rate": stage.learning_rate,
        "num_train_epochs": stage.num_epochs,
        "lr_scheduler_type": settings.lr_schedule,
        "warmup_ratio": settings.warmup_ratio,
        "bf16": settings.precision == "bf16",
        "seed": seed,
        "logging_steps": 1,
        "save_steps": save_every or settings.save_every,
        "save_total_limit": 2,
        "report_to": "none",
    }
    if chat.system is not None:
        arguments["default_system"] = chat.system
    if on_cpu:
        arguments |= {"use_cpu": True, "disable_gradient_checkpointing": True}
    else:
        arguments |= {"preprocessing_num_workers": 16, "dataloader_num_workers": 4, "ddp_timeout": 18_000_000}
    if settings.nodes > 1:
        arguments["data_shared_file_system"] = True  # one process of all reads the rows, not one a node
    if settings.deepspeed is not None:
        arguments["deepspeed"] = str(FILES / f"deepspeed_{settings.deepspeed}.json")
    if files.checkpoint is not None:
        arguments["resume_from_checkpoint"] = str(files.checkpoint)
    return arguments


def to_yaml(arguments: dict[str, Any], remark: str) -> str:
    """The file's text. Numbers keep a decimal point: YAML reads 1e-5 as text."""

    def number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
        text = f"{value:.10g}"
        if "e" in text and "." not in text:
            text = text.replace("e", ".0e")
        return dumper.represent_scalar("tag:yaml.org,2002:float", text if "." in text else f"{text}.0")

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(float, number)
    return f"# {remark}\n" + yaml.dump(arguments, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def example(profile_name: str, name: str) -> str:
    """A stage's YAML for the first setting of a profile, with the places that a run would fill in."""
    profile = load_profile(profile_name)
    setting = profile.pretraining.settings[0]
    start = {"align": "assembled", "further": "align/final", "sft": "further/final"}[name]
    files = Files(
        model=f"runs/{profile_name}/pretraining/{setting}/{start}",
        data_folder=f"runs/{profile_name}/pretraining/data",
        dataset={"align": "align", "further": "caprl-1m", "sft": "sft"}[name],
        media=profile.pretraining.media_folder,
        output=f"runs/{profile_name}/pretraining/{setting}/{name}",
    )
    arguments = stage_arguments(profile.pretraining, name, Chat(QWEN), files, profile.seed)
    if "deepspeed" in arguments:
        arguments["deepspeed"] = paths.shown(arguments["deepspeed"])
    how = f"python -m caprl_utils.pretraining.arguments {profile_name}"
    return to_yaml(arguments, f"stage {name}, setting {setting}; made by: {how}")


@command_line
def main(argv: list[str]) -> int:
    """Print the YAMLs of a profile; returns the exit status."""
    if len(argv) != 1:
        print("usage: python -m caprl_utils.pretraining.arguments PROFILE", file=sys.stderr)
        return 2
    print("\n".join(example(argv[0], name) for name in STAGES), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
