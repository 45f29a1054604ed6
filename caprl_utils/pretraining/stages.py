"""One training: its run folder, the checks before and after it, and the resume between.

runs/<profile>/pretraining/<name>/ holds train.yaml (what LLaMA-Factory was given), train.log, curve.jsonl (loss
per step), final/ (the model with its processor) and result.json. While it trains, work/ holds the checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.hashing import file_hash, folder_hash
from caprl_utils.paths import shown
from caprl_utils.pretraining import arguments, checkpoints, launch, weights
from caprl_utils.pretraining.arguments import Chat, Files
from caprl_utils.pretraining.sets import Training
from caprl_utils.runs import Run
from caprl_utils.schema import Profile

STAGE = "pretraining"
_LOCK = paths.ROOT / "requirements" / "llamafactory.lock"
_CACHE = ".datasets"
_MODULES = ["caprl_utils.pretraining.stages"]
_SHARED = ("cutoff_tokens", "max_pixels", "min_pixels", "lr_schedule", "warmup_ratio", "precision")


@dataclass(frozen=True)
class Inputs:
    """What a training starts from. data_hash: of rows and images. model: the folder that it trains."""

    model: Path
    data_folder: Path
    dataset: str
    data_hash: str
    media: Path
    num_rows: int


def folder_of(profile: Profile, name: str) -> Path:
    """The run folder of a training."""
    return paths.RUNS / profile.name / STAGE / name


def chat_of(model: Path) -> Chat:
    """How conversations of a model are written: template by its class, system turn by its own chat template."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    template = arguments.LLAVA if config["model_type"] == "llava" else arguments.QWEN
    files = [model / name for name in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")]
    text = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    writes_system = "You are a helpful assistant" in text
    if template == arguments.QWEN:
        return Chat(template, None if writes_system else "")
    return Chat(template)


def seed_of(profile: Profile, training: Training) -> int:
    """The seed of a training: of the order of its data and of the projector that its first stage started from."""
    return profile.seed if training.seed is None else training.seed


def open_run(profile: Profile, training: Training, inputs: Inputs) -> Run:
    """The run's folder, locked; its key covers settings, data, the model that it starts from, and LLaMA-Factory."""
    parts = _settings_parts(profile, training) | {
        "start": folder_hash(inputs.model), "data": inputs.data_hash, "num_rows": inputs.num_rows,
    }  # fmt: skip
    return Run.open(profile, STAGE, training.name, parts, _MODULES)


def _settings_parts(profile: Profile, training: Training) -> dict[str, Any]:
    settings = profile.pretraining
    return {
        "stage": arguments.stage_of(settings, training.stage, training.setting).key_part(),
        "shared": {name: getattr(settings, name) for name in _SHARED},
        "llamafactory": file_hash(_LOCK), "template": file_hash(launch.SITE / "sitecustomize.py"),
        "seed": seed_of(profile, training),
    }  # fmt: skip


def train(
    profile: Profile,
    training: Training,
    inputs: Inputs,
    on_step: launch.OnStep = lambda *_: None,
) -> dict[str, Any]:
    """Make a training, or what is left of it; returns its record.

    Raises UserError when LLaMA-Factory fails, or when something else trains than should, as soon as that is seen.
    """
    with open_run(profile, training, inputs) as run:
        if not run.complete:
            work, log, config = (run.folder / name for name in ("work", "train.log", "train.yaml"))
            checkpoint = checkpoints.last_whole(work)
            if checkpoint is None:
                shutil.rmtree(work, ignore_errors=True)
            write_atomic(config, _yaml(profile, training, inputs, work, checkpoint))
            env = launch.environment(profile, run.folder / _CACHE)
            watch = _watch(profile, training, inputs, run.folder, on_step)
            launch.run(config, log, env, watch, profile.pretraining.nodes)
            _finish(run, profile, training, inputs, work, log)
        for name in ("work", _CACHE):  # a kill after the record was written leaves them
            shutil.rmtree(run.folder / name, ignore_errors=True)
        return run.result


def _watch(
    profile: Profile, training: Training, inputs: Inputs, folder: Path, on_step: launch.OnStep
) -> Callable[[], None]:
    """What is looked at while it trains: its steps, and once its count of what trains, days before the end."""
    log, counted = folder / "train.log", False
    trains = arguments.stage_of(profile.pretraining, training.stage, training.setting).trains
    start = log.stat().st_size if log.is_file() else 0  # an earlier attempt's count lies before

    def watch() -> None:
        nonlocal counted
        launch.report(folder / "work", on_step)
        if not counted and weights.logged_counts(log, start) is not None:
            weights.assert_trainable(log, inputs.model, trains)
            counted = True

    return watch


def _yaml(profile: Profile, training: Training, inputs: Inputs, work: Path, checkpoint: Path | None) -> str:
    settings, seed = profile.pretraining, seed_of(profile, training)
    files = Files(inputs.model, inputs.data_folder, inputs.dataset, inputs.media, work, checkpoint)
    stage = arguments.stage_of(settings, training.stage, training.setting)
    save_every = min(settings.save_every, arguments.num_steps(stage, inputs.num_rows))
    values = arguments.stage_arguments(
        settings, training.stage, chat_of(inputs.model), files, seed, save_every, training.setting
    )
    return arguments.to_yaml(values, f"{training.name}, profile {profile.name}")


def _finish(
    run: Run, profile: Profile, training: Training, inputs: Inputs, work: Path, log: Path
) -> dict[str, Any]:
    """Check what trained, keep the model and the curve, write the record: in this order."""
    trains = arguments.stage_of(profile.pretraining, training.stage, training.setting).trains
    counted = weights.assert_trainable(log, inputs.model, trains)
    moved = weights.changes(inputs.model, work)
    weights.assert_changes(moved, trains)
    curve = read_curve(work)
    write_atomic(run.folder / "curve.jsonl", "".join(json.dumps(row) + "\n" for row in curve))
    _keep_model(work, run.folder / "final")
    losses = [row["loss"] for row in curve]
    values = {
        "steps": len(curve), "loss_first": losses[0], "loss_last": losses[-1],
        "parameters": counted, "moved": moved,
    }  # fmt: skip
    return run.finish(
        values=values, n=inputs.num_rows, unit="row", seeds=[seed_of(profile, training)],
        setting=training.setting, training_stage=training.stage, start=shown(inputs.model),
        captions=training.captions.name if training.captions else None, trains=list(trains),
    )  # fmt: skip


def read_curve(work: Path) -> list[dict[str, Any]]:
    """Loss, learning rate and gradient norm of every step, from the trainer's own state, which outlives resumes."""
    file = work / "trainer_state.json"
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{shown(file)} holds no history of the training ({error})") from None
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate")
    curve = [{name: _number(row.get(name)) for name in names} for row in history if "loss" in row]
    if not curve:
        raise UserError(f"{shown(file)} has no step with a loss: nothing was trained")
    return curve


def _number(value: Any) -> Any:
    """LLaMA-Factory logs some numbers as text."""
    return float(value) if isinstance(value, str) else value


def _keep_model(work: Path, final: Path) -> None:
    """The model's files without checkpoints and logs, as one rename."""
    half = final.with_name(".final")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    for file in sorted(work.iterdir()):
        is_log = file.name.startswith(("train", "all_results", "README", "training_"))
        if file.is_file() and not is_log:
            os.link(file, half / file.name)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(half, final)
