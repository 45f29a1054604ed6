"""LLaMA-Factory: one YAML a stage from a profile's settings, and its own `llamafactory-cli` run with it and watched."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from caprl_utils import paths, processes
from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.pretraining.data import MIN_PIXELS, DataSet
from caprl_utils.pretraining.sets import Training
from caprl_utils.schema import Pretraining, PretrainingStage, Profile

ENVIRONMENT = paths.ROOT / ".venv-llamafactory"
SITE = Path(__file__).parent / "site"
_ALL = ("vision_tower", "projector", "language_model")
TRAINS = {"align": ("projector",), "further": _ALL, "sft": _ALL}
"""Stage -> the parts that train (paper, appendix F)."""
STAGES = tuple(TRAINS)
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1}  # author script
QWEN, LLAVA = "qwen2_vl", "caprl_llava"
"""Templates: LLaMA-Factory's own, and ours for LLaVA models with ChatML turns (site/sitecustomize.py)."""
_POLL_SEC = 0.5

OnStep = Callable[[int, int, float | None], None]
"""(steps done, steps in all, last loss)"""


def stage_of(settings: Pretraining, name: str, setting: str | None = None) -> PretrainingStage:
    """The settings of a stage by its name, as the named setting (of Table 1) trains it."""
    stage = getattr(settings, name)
    return stage.model_copy(update=settings.align_of.get(setting, {}) if name == "align" else {})


def accumulation(settings: Pretraining, stage: PretrainingStage) -> int:
    """Forward passes per update. Raises UserError when the batch is no multiple of what fits in one pass."""
    at_once = max(1, settings.nodes * settings.gpus_per_node) * stage.micro_batch_size
    if stage.batch_size % at_once:
        product = f"{settings.nodes} nodes x {settings.gpus_per_node} GPUs x micro_batch_size {stage.micro_batch_size}"
        told = f"pretraining: batch_size {stage.batch_size} is no multiple of {at_once} ({product})"
        raise UserError(f"{told}; change micro_batch_size")
    return stage.batch_size // at_once


def num_steps(stage: PretrainingStage, num_rows: int) -> int:
    """Updates of a stage; the last, smaller batch counts."""
    return max(1, math.ceil(math.ceil(num_rows / stage.batch_size) * stage.num_epochs))


def chat_of(model: Path) -> dict[str, str]:
    """How conversations of a model are written: template by its class, no system turn where its own has none."""
    if json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"] == "llava":
        return {"template": LLAVA}
    files = [model / name for name in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")]
    text = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    return {"template": QWEN} | ({} if "You are a helpful assistant" in text else {"default_system": ""})


def stage_arguments(
    settings: Pretraining, training: Training, model: Path, data: DataSet, seed: int, output: Path,
    checkpoint: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Keys and values of a training's YAML. model: where it starts. checkpoint: where it goes on, loaded as the model
    but for DeepSpeed: the trainer itself would load nothing into a Qwen2.5-VL (huggingface/transformers#43701).
    """
    stage, trains = stage_of(settings, training.stage, training.setting), TRAINS[training.stage]
    resumed = checkpoint is not None and settings.deepspeed is None
    arguments: dict[str, Any] = {
        "model_name_or_path": str(checkpoint if resumed else model), "trust_remote_code": False,
        "image_min_pixels": MIN_PIXELS, "image_max_pixels": settings.max_pixels,
        "stage": "sft",  # for captions too: `pt` would pack rows
        "do_train": True, "finetuning_type": "full",
        "freeze_vision_tower": "vision_tower" not in trains,
        "freeze_multi_modal_projector": "projector" not in trains,
        "freeze_language_model": "language_model" not in trains,
        **chat_of(model),
        "dataset": data.name, "dataset_dir": str(data.folder), "media_dir": str(data.media),
        "cutoff_len": settings.cutoff_tokens, "packing": False, "output_dir": str(output),
        "per_device_train_batch_size": stage.micro_batch_size,
        "gradient_accumulation_steps": accumulation(settings, stage),
        "learning_rate": stage.learning_rate, "num_train_epochs": stage.num_epochs, **SCHEDULE,
        "bf16": settings.precision == "bf16", "seed": seed, "logging_steps": 1, "report_to": "none",
        "save_steps": min(settings.save_every, num_steps(stage, data.values["rows"])), "save_total_limit": 2,
    }  # fmt: skip
    if settings.gpus_per_node == 0:
        arguments |= {"use_cpu": True, "disable_gradient_checkpointing": True}
    else:
        arguments |= {"preprocessing_num_workers": 16, "dataloader_num_workers": 4, "ddp_timeout": 18_000_000}
        # the loss in parts: at once the logits of 4 rows of 2,500 tokens take 18 GB
        arguments |= {"enable_liger_kernel": True} if _installed("liger_kernel") else {}
        arguments |= {"flash_attn": "fa2"} if _installed("flash_attn") else {}
    if settings.nodes > 1:
        arguments["data_shared_file_system"] = True  # one process of all reads the rows, not one a node
    if settings.deepspeed is not None:
        arguments["deepspeed"] = str(paths.CONFIGS / "llamafactory" / f"deepspeed_{settings.deepspeed}.json")
    return arguments | ({} if checkpoint is None else {"resume_from_checkpoint": str(checkpoint)})


def _installed(package: str) -> bool:
    """Whether LLaMA-Factory's environment has a package."""
    return any(ENVIRONMENT.glob(f"lib/python*/site-packages/{package}"))


def command(config: Path, nodes: int = 1) -> list[str]:
    """The command line. Raises UserError when LLaMA-Factory's environment is not there."""
    program = ENVIRONMENT / "bin" / "llamafactory-cli"
    if not program.is_file():
        raise UserError(f"no {shown(program)}; make it: make setup-llamafactory")
    if nodes == 1:
        return [str(program), "train", str(config)]
    # one torchrun a node; only srun knows which node it is on
    return ["srun", f"--nodes={nodes}", "--ntasks-per-node=1",
            "bash", "-c", 'NODE_RANK=$SLURM_NODEID exec "$@"', "bash", str(program), "train", str(config)]  # fmt: skip


def check_nodes(settings: Pretraining) -> None:
    """Raise UserError when several nodes should train and this is no job of Slurm's that has as many."""
    if settings.nodes > 1:
        asked = f"pretraining.nodes is {settings.nodes}"
        processes.require_slurm(settings.nodes, asked, "configs/slurm/llamafactory.slurm")


def environment(profile: Profile, cache: Path) -> dict[str, str]:
    """Variables on top of ours. cache: where its data sets go; they are of no use after the run."""
    settings = profile.pretraining
    found = {
        "PYTHONPATH": os.pathsep.join([str(SITE), str(paths.ROOT)]),
        "PATH": os.pathsep.join([str(ENVIRONMENT / "bin"), os.environ.get("PATH", "")]),  # torchrun
        "HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true",
        "MPLBACKEND": "Agg",  # a notebook's own names a module that is not in that environment
        "PYTHONDONTWRITEBYTECODE": "",  # ours: where it is set, each start compiles everything again, 17 s of CPU
    }  # fmt: skip
    if settings.gpus_per_node == 0:
        threads = max(1, (profile.torch_threads or 1) // settings.parallel_runs)
        return found | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads), "FORCE_TORCHRUN": "0"}
    if settings.deepspeed is not None or settings.gpus_per_node > 1:
        found["FORCE_TORCHRUN"] = "1"
    return found | {"NPROC_PER_NODE": str(settings.gpus_per_node), "NNODES": str(settings.nodes)}


def run(
    config: Path, log: Path, env: Mapping[str, str], watch: Callable[[], None] = lambda: None, nodes: int = 1
) -> None:
    """Train to the end. watch: called twice a second; what it raises ends it. Raises UserError with the log's end."""
    process = processes.popen(command(config, nodes), log, env, guarded=True)  # torchrun's workers, too
    try:
        while process.poll() is None:
            watch()
            time.sleep(_POLL_SEC)
        watch()
    finally:
        processes.stop(process)
    if process.returncode:
        told = f"llamafactory-cli ended with status {process.returncode}; the end of {shown(log)}:"
        raise UserError(f"{told}\n{processes.tail(log)}\nRun it again to go on from its last checkpoint.")


def report(output: Path, on_step: OnStep) -> None:
    """Tell the last line of LLaMA-Factory's step log. output: its output folder."""
    try:
        state = json.loads((output / "trainer_log.jsonl").read_bytes().rstrip(b"\n").rpartition(b"\n")[2])
    except (OSError, ValueError):  # not there yet, or half a line
        return
    on_step(state["current_steps"], state["total_steps"], state.get("loss"))
