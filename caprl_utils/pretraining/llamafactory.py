"""One training by LLaMA-Factory: its YAML, its own `llamafactory-cli` run and watched, the checks before and after.

runs/<profile>/pretraining/<name>/ holds train.yaml (what LLaMA-Factory was given), train.log, curve.jsonl (loss per
step), final/ (the model with its processor) and result.json. While it trains, work/ holds the checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from caprl_utils import paths, processes, warm
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.hashing import file_hash
from caprl_utils.models.base import PARTS, model_hash, part_of
from caprl_utils.paths import shown
from caprl_utils.pretraining.data import MIN_PIXELS, DataSet
from caprl_utils.pretraining.sets import STAGE, Training
from caprl_utils.runs import Run, last_checkpoint
from caprl_utils.schema import Pretraining, PretrainingStage, Profile
from caprl_utils.vlm_init.donors import read_config, read_weights

if TYPE_CHECKING:
    import torch

RECIPE = ["caprl_utils.pretraining.llamafactory"]
ENVIRONMENT = paths.ROOT / ".venv-llamafactory"
SITE = Path(__file__).parent / "site"
TRAINS = {"align": ("projector",), "further": PARTS, "sft": PARTS}
"""Stage -> the parts that train (paper, appendix F)."""
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1}  # author script
QWEN, LLAVA = "qwen2_vl", "caprl_llava"
"""Templates: LLaMA-Factory's own, and ours for LLaVA models with ChatML turns (site/sitecustomize.py)."""
_LOCK, _CACHE, _POLL_SEC = paths.ROOT / "requirements" / "llamafactory.lock", ".datasets", 0.5
_WARM = ("llamafactory.train.tuner",)
_SHARED = ("cutoff_tokens", "max_pixels", "precision")
_LAYOUT = ("model", "language_model", "vision_model")  # levels that one layout has and another has not
_CURVE = ("step", "epoch", "loss", "grad_norm", "learning_rate")
_LOGGED = re.compile(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+)")

Tell = Callable[[int, str], None]  # of the steps done and a note


def train(
    profile: Profile, training: Training, model: Path, data: DataSet, tell: Tell = lambda *_: None
) -> dict[str, Any]:
    """Make a training, or what is left of it; returns its record. The run's key covers settings, data, the model that
    it starts from, and LLaMA-Factory. Raises UserError when LLaMA-Factory fails, or as soon as something else trains
    than should.
    """
    settings = profile.pretraining
    parts = {
        "stage": stage_of(settings, training.stage, training.setting).key_part(),
        "shared": {name: getattr(settings, name) for name in _SHARED},
        "llamafactory": file_hash(_LOCK), "template": file_hash(SITE / "sitecustomize.py"),
        "seed": training.seed, "start": model_hash(model), "data": data.values["hash"],
        "num_rows": data.values["rows"],
    }  # fmt: skip
    with Run.open(profile, STAGE, training.name, parts, RECIPE) as run:
        if not run.complete:
            work = run.folder / "work"
            if (checkpoint := last_checkpoint(work, is_whole)) is None:
                shutil.rmtree(work, ignore_errors=True)
            write_atomic(run.folder / "train.yaml", train_yaml(profile, training, model, data, work, checkpoint))
            run_to_end(profile, training, model, run.folder, tell)
            _finish(run, training, model, data)
        for name in ("work", _CACHE):  # a kill after the record was written leaves them
            shutil.rmtree(run.folder / name, ignore_errors=True)
        return run.result


# What it is given


def stage_of(settings: Pretraining, name: str, setting: str | None = None) -> PretrainingStage:
    """The settings of a stage by its name, as the named setting (of Table 1) trains it."""
    stage = getattr(settings, name)
    return stage.model_copy(update=settings.align_of.get(setting, {}) if name == "align" else {})


def num_steps(stage: PretrainingStage, num_rows: int) -> int:
    """Updates of a stage; the last, smaller batch counts."""
    return max(1, math.ceil(math.ceil(num_rows / stage.batch_size) * stage.num_epochs))


def chat_of(model: Path) -> dict[str, str]:
    """How conversations of a model are written: template by its class, no system turn where its own has none."""
    if read_config(model)["model_type"] == "llava":
        return {"template": LLAVA}
    files = [model / name for name in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")]
    text = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    return {"template": QWEN} | ({} if "You are a helpful assistant" in text else {"default_system": ""})


def train_yaml(
    profile: Profile, training: Training, model: Path, data: DataSet, work: Path, checkpoint: Path | None = None
) -> str:
    """A training's YAML. model: where it starts. work: its output. checkpoint: where it goes on, loaded as the model
    but for DeepSpeed: the trainer itself would load nothing into a Qwen2.5-VL (huggingface/transformers#43701). Raises
    UserError when the batch is no multiple of what fits in one pass.
    """
    settings, trains = profile.pretraining, TRAINS[training.stage]
    stage, resumed = stage_of(settings, training.stage, training.setting), checkpoint and settings.deepspeed is None
    at_once = max(1, settings.nodes * settings.gpus_per_node) * stage.micro_batch_size
    if stage.batch_size % at_once:
        raise UserError(
            f"pretraining: batch_size {stage.batch_size} is no multiple of {at_once} ({settings.nodes} nodes x "
            f"{settings.gpus_per_node} GPUs x micro_batch_size {stage.micro_batch_size}); change micro_batch_size"
        )
    values: dict[str, Any] = {
        "model_name_or_path": str(checkpoint if resumed else model), "trust_remote_code": False,
        "image_min_pixels": MIN_PIXELS, "image_max_pixels": settings.max_pixels,
        "stage": "sft",  # for captions too: `pt` would pack rows
        "do_train": True, "finetuning_type": "full",
        "freeze_vision_tower": "vision_tower" not in trains,
        "freeze_multi_modal_projector": "projector" not in trains,
        "freeze_language_model": "language_model" not in trains,
        **chat_of(model),
        "dataset": data.name, "dataset_dir": str(data.folder), "media_dir": str(data.media),
        "cache_dir": str(work.parent / _CACHE),  # of its data sets, of no use after the run
        "cutoff_len": settings.cutoff_tokens, "packing": False, "output_dir": str(work),
        "per_device_train_batch_size": stage.micro_batch_size,
        "gradient_accumulation_steps": stage.batch_size // at_once,
        "learning_rate": stage.learning_rate, "num_train_epochs": stage.num_epochs, **SCHEDULE,
        "bf16": settings.precision == "bf16", "seed": training.seed, "logging_steps": 1, "report_to": "none",
        "save_steps": min(settings.save_every, num_steps(stage, data.values["rows"])), "save_total_limit": 2,
        **_layout(settings),
    }  # fmt: skip
    values |= {} if checkpoint is None else {"resume_from_checkpoint": str(checkpoint)}
    return f"# {training.name}, profile {profile.name}\n" + yaml.safe_dump(values, sort_keys=False)


def _layout(settings: Pretraining) -> dict[str, Any]:
    """What depends on the machine alone."""
    if settings.gpus_per_node == 0:
        return {"use_cpu": True, "disable_gradient_checkpointing": True}
    found = {"preprocessing_num_workers": 16, "dataloader_num_workers": 4, "ddp_timeout": 18_000_000}
    if installed("liger_kernel"):  # the loss in parts: at once the logits of 4 rows of 2,500 tokens take 18 GB
        found["enable_liger_kernel"] = True
    if installed("flash_attn"):
        found["flash_attn"] = "fa2"
    if settings.nodes > 1:  # one process of all reads the rows, not one a node
        found["data_shared_file_system"] = True
    if settings.deepspeed is not None:
        found["deepspeed"] = str(paths.CONFIGS / "llamafactory" / f"deepspeed_{settings.deepspeed}.json")
    return found


def installed(package: str) -> bool:
    """Whether LLaMA-Factory's environment has a package."""
    return any(ENVIRONMENT.glob(f"lib/python*/site-packages/{package}"))


# Its process


def command(config: Path, nodes: int = 1) -> list[str]:
    """The command line. Raises UserError when LLaMA-Factory's environment is not there."""
    program = ENVIRONMENT / "bin" / "llamafactory-cli"
    if not program.is_file():
        raise UserError(f"no {shown(program)}; make it: make setup-llamafactory")
    words = [str(program), "train", str(config)]
    if nodes == 1:
        return words
    # one torchrun a node; only srun knows which node it is on
    each = ["bash", "-c", 'NODE_RANK=$SLURM_NODEID exec "$@"', "bash"]
    return ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", *each, *words]


def environment(profile: Profile) -> dict[str, str]:
    """Variables on top of ours."""
    settings = profile.pretraining
    found = {
        "PYTHONPATH": os.pathsep.join([str(SITE), str(paths.ROOT)]),
        "PATH": os.pathsep.join([str(ENVIRONMENT / "bin"), os.environ.get("PATH", "")]),  # torchrun
        "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true",
        "MPLBACKEND": "Agg",  # a notebook's own names a module that is not in that environment
        "PYTHONDONTWRITEBYTECODE": "",  # ours: where it is set, each start compiles everything again, 17 s of CPU
    }  # fmt: skip
    if settings.deepspeed is None:  # transformers would import it wherever it is installed: 3 of 15 seconds of a start
        found["CAPRL_LEAVE_OUT"] = "deepspeed"
    if settings.gpus_per_node == 0:
        threads = max(1, (profile.torch_threads or 1) // settings.parallel_runs)
        return found | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads), "FORCE_TORCHRUN": "0"}
    if settings.deepspeed is not None or settings.gpus_per_node > 1:
        found["FORCE_TORCHRUN"] = "1"
    return found | {"NPROC_PER_NODE": str(settings.gpus_per_node), "NNODES": str(settings.nodes)}


def run_to_end(profile: Profile, training: Training, model: Path, folder: Path, tell: Tell) -> None:
    """Train by the train.yaml in `folder`. How many parameters train is checked when LLaMA-Factory has counted them,
    days before the end. Raises UserError for a wrong count, and with the log's end when it fails.
    """
    log, counted, running = folder / "train.log", False, True
    start = log.stat().st_size if log.is_file() else 0  # an earlier attempt's count lies before
    words, env = command(folder / "train.yaml", profile.pretraining.nodes), environment(profile)
    if profile.pretraining.gpus_per_node == 0:
        process = warm.popen(str(ENVIRONMENT / "bin" / "python"), _WARM, "llamafactory.cli:main", words[1:], log, env)
    else:  # guarded: torchrun's workers end with it, too
        process = processes.popen(words, log, env, guarded=True)
    try:
        while running:
            running = process.poll() is None
            with contextlib.suppress(OSError, ValueError):  # the step log is not there yet, or half a line
                steps = (folder / "work" / "trainer_log.jsonl").read_bytes()
                state = json.loads(steps.rstrip(b"\n").rpartition(b"\n")[2])
                tell(state["current_steps"], f"loss {float(state['loss']):.3f}" if "loss" in state else "")
            counted = counted or assert_trainable(log, model, TRAINS[training.stage], start)
            time.sleep(_POLL_SEC if running else 0)
    finally:
        processes.stop(process)
    if process.returncode:
        told = f"llamafactory-cli ended with status {process.returncode}; the end of {shown(log)}:"
        raise UserError(f"{told}\n{processes.tail(log)}\nRun it again to go on from its last checkpoint.")
    if not counted:
        raise UserError(f"{shown(log)} does not say how many parameters trained")


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that resuming needs is there and whole: a kill may come while one is written, without a mark.
    DeepSpeed's own shards are trusted once `latest`, which it writes last, names them.
    """
    try:
        for name in ("config.json", "tokenizer_config.json", "trainer_state.json", "processor_config.json"):
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        read_weights(checkpoint)
    except (OSError, ValueError, UserError):
        return False
    if (checkpoint / "latest").is_file():
        return True
    states, randoms = (checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"), checkpoint.glob("rng_state*.pth")
    return all(map(zipfile.is_zipfile, states)) and any(map(zipfile.is_zipfile, randoms))


# What it made


def _finish(run: Run, training: Training, model: Path, data: DataSet) -> None:
    """Check what trained, keep the model and the curve, write the record: in this order."""
    work, final, half = (run.folder / name for name in ("work", "final", ".final"))
    moved = assert_changes(model, work, TRAINS[training.stage])
    # from the trainer's own state, which outlives resumes; LLaMA-Factory logs some numbers as text
    history = json.loads((work / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    curve = [
        {name: float(row[name]) if isinstance(row.get(name), str) else row.get(name) for name in _CURVE}
        for row in history if "loss" in row
    ]  # fmt: skip
    write_atomic(run.folder / "curve.jsonl", "".join(json.dumps(row) + "\n" for row in curve))
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    for file in work.iterdir():  # without checkpoints and logs
        if file.is_file() and not file.name.startswith(("train", "all_results", "README", "training_")):
            os.link(file, half / file.name)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(half, final)
    values = {"steps": len(curve), "loss_first": curve[0]["loss"], "loss_last": curve[-1]["loss"], "moved": moved}
    run.finish(
        values=values, n=data.values["rows"], unit="row", seeds=[training.seed],
        setting=training.setting, training_stage=training.stage, start=shown(model),
        captions=training.captions.name if training.captions else None, trains=list(TRAINS[training.stage]),
    )  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a model, mapped from disk, without the levels in which layouts differ in their names. A tied head is
    left out. Raises UserError when there are none.
    """
    tied = "lm_head.weight" if read_config(folder).get("tie_word_embeddings") else ()
    found = {name: one for name, one in read_weights(folder).items() if not name.endswith(tied)}
    return {".".join(part for part in name.split(".") if part not in _LAYOUT): one for name, one in found.items()}


def assert_trainable(log: Path, model: Path, trains: Iterable[str], start: int = 0) -> bool:
    """Compare LLaMA-Factory's last count in its log (from byte `start` on) with the parts that should train. False
    while the log says nothing. Raises UserError when they differ.
    """
    logged = _LOGGED.findall(log.read_bytes()[start:].decode("utf-8", errors="replace"))
    if not logged:
        return False
    trained, everything = (int(text.replace(",", "")) for text in logged[-1])
    parts = dict.fromkeys(PARTS, 0)
    for name, tensor in tensors(model).items():
        parts[part_of(name)] += tensor.numel()
    wanted, total = sum(parts[part] for part in trains), sum(parts.values())
    if (trained, everything) != (wanted, total):
        raise UserError(
            f"{shown(log)}: {trained:,} of {everything:,} parameters trained, expected {wanted:,} of {total:,} "
            f"({', '.join(sorted(trains))} of {shown(model)}: {parts})"
        )
    return True


def assert_changes(before: Path, after: Path, trains: Iterable[str]) -> dict[str, float]:
    """Part -> how far it moved: norm of the change over norm of the part before. 0.0 means bit for bit the same. Tensor
    by tensor, so memory is that of one. Raises UserError when the two hold different tensors, a frozen part moved, or a
    part that should train stood still.
    """
    old, new = tensors(before), tensors(after)
    if odd := sorted(old.keys() ^ new.keys()):
        raise UserError(f"{shown(before)} and {shown(after)} hold different tensors, first {odd[0]}")
    moved, norm = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    for name, tensor in old.items():
        part, first = part_of(name), tensor.double()
        moved[part] += float((new[name].double() - first).square().sum())
        norm[part] += float(first.square().sum())
    found = {part: (moved[part] / norm[part]) ** 0.5 if norm[part] else moved[part] for part in PARTS}
    for part, far in found.items():
        if (far > 0) != (part in trains):
            told = f"the {part} {'moved' if far > 0 else 'did not move'} ({far:.2e} of its norm)"
            raise UserError(f"{told}, but {', '.join(trains)} should train; the model is not what the stage asked for")
    return found
