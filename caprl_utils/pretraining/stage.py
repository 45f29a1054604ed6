"""One training in runs/<profile>/pretraining/<name>/, the checks before and after it, and the resume between.

It holds train.yaml (what LLaMA-Factory was given), train.log, curve.jsonl (loss per step), final/ (the model with its
processor) and result.json. While it trains, work/ holds the checkpoints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.hashing import file_hash, folder_hash
from caprl_utils.models.weights import PARTS, part_of
from caprl_utils.paths import shown
from caprl_utils.pretraining import llamafactory
from caprl_utils.pretraining.data import DataSet
from caprl_utils.pretraining.llamafactory import TRAINS, OnStep
from caprl_utils.pretraining.sets import Training
from caprl_utils.runs import Run, checkpoints_in
from caprl_utils.schema import Profile
from caprl_utils.vlm_init.donors import read_config, read_weights

if TYPE_CHECKING:
    import torch

STAGE = "pretraining"
RECIPE = ["caprl_utils.pretraining.llamafactory"]
_LOCK = paths.ROOT / "requirements" / "llamafactory.lock"
_CACHE = ".datasets"
_SHARED = ("cutoff_tokens", "max_pixels", "precision")
_LAYOUT = ("model", "language_model", "vision_model")  # levels that one layout has and another has not
_LOGGED = re.compile(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+)")


def folder_of(profile: Profile, name: str) -> Path:
    """The run folder of a training."""
    return paths.RUNS / profile.name / STAGE / name


def open_run(profile: Profile, training: Training, model: Path, data: DataSet) -> Run:
    """The run's folder, locked; its key covers settings, data, the model that it starts from, and LLaMA-Factory."""
    settings = profile.pretraining
    parts = {
        "stage": llamafactory.stage_of(settings, training.stage, training.setting).key_part(),
        "shared": {name: getattr(settings, name) for name in _SHARED},
        "llamafactory": file_hash(_LOCK), "template": file_hash(llamafactory.SITE / "sitecustomize.py"),
        "seed": seed_of(profile, training), "start": folder_hash(model), "data": data.values["hash"],
        "num_rows": data.values["rows"],
    }  # fmt: skip
    return Run.open(profile, STAGE, training.name, parts, RECIPE)


def seed_of(profile: Profile, training: Training) -> int:
    """The seed of a training: of the order of its data and of the projector that its first stage started from."""
    return profile.seed if training.seed is None else training.seed


def train(
    profile: Profile, training: Training, model: Path, data: DataSet, on_step: OnStep = lambda *_: None
) -> dict[str, Any]:
    """Make a training, or what is left of it; returns its record. Raises UserError when LLaMA-Factory fails, or as
    soon as something else trains than should.
    """
    with open_run(profile, training, model, data) as run:
        if not run.complete:
            work, log, config = (run.folder / name for name in ("work", "train.log", "train.yaml"))
            if (checkpoint := last_whole(work)) is None:
                shutil.rmtree(work, ignore_errors=True)
            write_atomic(config, train_yaml(profile, training, model, data, work, checkpoint))
            env = llamafactory.environment(profile, run.folder / _CACHE)
            watch = _watch(training, model, run.folder, on_step)
            llamafactory.run(config, log, env, watch, profile.pretraining.nodes)
            _finish(run, profile, training, model, data)
        for name in ("work", _CACHE):  # a kill after the record was written leaves them
            shutil.rmtree(run.folder / name, ignore_errors=True)
        return run.result


def train_yaml(
    profile: Profile, training: Training, model: Path, data: DataSet, work: Path, checkpoint: Path | None
) -> str:
    """What LLaMA-Factory is given. work: its output. checkpoint: where it goes on."""
    seed = seed_of(profile, training)
    values = llamafactory.stage_arguments(profile.pretraining, training, model, data, seed, work, checkpoint)
    return f"# {training.name}, profile {profile.name}\n" + yaml.safe_dump(values, sort_keys=False)


def _watch(training: Training, model: Path, folder: Path, on_step: OnStep) -> Callable[[], None]:
    """What is looked at while it trains: its steps, and once its count of what trains, days before the end."""
    log, counted = folder / "train.log", False
    start = log.stat().st_size if log.is_file() else 0  # an earlier attempt's count lies before

    def watch() -> None:
        nonlocal counted
        llamafactory.report(folder / "work", on_step)
        if not counted and log.is_file():
            counted = assert_trainable(log, model, TRAINS[training.stage], start) is not None

    return watch


def _finish(run: Run, profile: Profile, training: Training, model: Path, data: DataSet) -> None:
    """Check what trained, keep the model and the curve, write the record: in this order."""
    work, log, trains = run.folder / "work", run.folder / "train.log", TRAINS[training.stage]
    if (counted := assert_trainable(log, model, trains)) is None:
        raise UserError(f"{shown(log)} does not say how many parameters trained")
    moved = changes(model, work)
    assert_changes(moved, trains)
    curve = read_curve(work)
    write_atomic(run.folder / "curve.jsonl", "".join(json.dumps(row) + "\n" for row in curve))
    _keep_model(work, run.folder / "final")
    values = {
        "steps": len(curve), "loss_first": curve[0]["loss"], "loss_last": curve[-1]["loss"],
        "parameters": counted, "moved": moved,
    }  # fmt: skip
    run.finish(
        values=values, n=data.values["rows"], unit="row", seeds=[seed_of(profile, training)],
        setting=training.setting, training_stage=training.stage, start=shown(model),
        captions=training.captions.name if training.captions else None, trains=list(trains),
    )  # fmt: skip


def read_curve(work: Path) -> list[dict[str, Any]]:
    """Loss, learning rate and gradient norm of every step, from the trainer's own state, which outlives resumes."""
    history = json.loads((work / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate")
    curve = [{name: row.get(name) for name in names} for row in history if "loss" in row]
    # LLaMA-Factory logs some numbers as text
    return [{name: float(v) if isinstance(v, str) else v for name, v in row.items()} for row in curve]


def _keep_model(work: Path, final: Path) -> None:
    """The model's files without checkpoints and logs, as one rename."""
    half = final.with_name(".final")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    for file in work.iterdir():
        if file.is_file() and not file.name.startswith(("train", "all_results", "README", "training_")):
            os.link(file, half / file.name)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(half, final)


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None; broken ones after it are deleted."""
    for checkpoint in reversed(checkpoints_in(folder)):
        if is_whole(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that resuming needs is there and whole: a kill may come while one is written, without a mark.

    DeepSpeed's own shards are trusted once `latest`, which it writes last, names them.
    """
    names = ["config.json", "tokenizer_config.json", "trainer_state.json", "processor_config.json"]
    if (checkpoint / "preprocessor_config.json").is_file():
        names[-1] = "preprocessor_config.json"  # of older versions
    try:
        for name in names:
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        read_weights(checkpoint)
    except (OSError, ValueError, UserError):
        return False
    if (checkpoint / "latest").is_file():
        return True
    states = [checkpoint / name for name in ("optimizer.pt", "scheduler.pt")]
    randoms = checkpoint.glob("rng_state*.pth")
    return all(map(zipfile.is_zipfile, states)) and any(map(zipfile.is_zipfile, randoms))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a model, mapped from disk. A tied head is left out. Raises UserError when there are none."""
    tied = "lm_head.weight" if read_config(folder).get("tie_word_embeddings") else ()
    return {name: one for name, one in read_weights(folder).items() if not name.endswith(tied)}


def counts(folder: Path) -> dict[str, int]:
    """Parameters per part."""
    found = dict.fromkeys(PARTS, 0)
    for name, tensor in tensors(folder).items():
        found[part_of(name)] += tensor.numel()
    return found


def assert_trainable(log: Path, model: Path, trains: Iterable[str], start: int = 0) -> dict[str, int] | None:
    """Compare LLaMA-Factory's last count in its log (from byte `start` on) with the parts that should train.

    Returns {"trainable", "all"}, None while the log says nothing. Raises UserError when they differ.
    """
    logged = _LOGGED.findall(log.read_bytes()[start:].decode("utf-8", errors="replace"))
    if not logged:
        return None
    trained, everything = (int(text.replace(",", "")) for text in logged[-1])
    parts = counts(model)
    wanted, total = sum(parts[part] for part in trains), sum(parts.values())
    if (trained, everything) != (wanted, total):
        raise UserError(
            f"{shown(log)}: {trained:,} of {everything:,} parameters trained, expected {wanted:,} of {total:,} "
            f"({', '.join(sorted(trains))} of {shown(model)}: {parts})"
        )
    return {"trainable": trained, "all": everything}


def changes(before: Path, after: Path) -> dict[str, float]:
    """Part -> how far it moved: norm of the change over norm of the part before. 0.0 means bit for bit the same.

    Tensor by tensor, so memory is that of one. Raises UserError when the two hold different tensors.
    """
    old, new = ({_plain(name): (name, one) for name, one in tensors(f).items()} for f in (before, after))
    if odd := sorted(old.keys() ^ new.keys()):
        raise UserError(f"{shown(before)} and {shown(after)} hold different tensors, first {odd[0]}")
    moved, norm = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    for plain, (name, tensor) in old.items():
        part, first = part_of(name), tensor.double()
        moved[part] += float((new[plain][1].double() - first).square().sum())
        norm[part] += float(first.square().sum())
    return {part: (moved[part] / norm[part]) ** 0.5 if norm[part] else moved[part] for part in PARTS}


def _plain(name: str) -> str:
    """A tensor's name without the levels in which layouts differ."""
    return ".".join(piece for piece in name.split(".") if piece not in _LAYOUT)


def assert_changes(found: Mapping[str, float], trains: Iterable[str]) -> None:
    """Raise UserError when a frozen part moved or a part that should train stood still."""
    for part, moved in found.items():
        if (moved > 0) != (part in trains):
            told = f"the {part} {'moved' if moved > 0 else 'did not move'} ({moved:.2e} of its norm)"
            raise UserError(f"{told}, but {', '.join(trains)} should train; the model is not what the stage asked for")
