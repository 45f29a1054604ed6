"""A training as a process of its own: what it is, how it lies on GPUs and nodes, how it is started and watched.

It tells its progress by a file, its steps by curve.jsonl, its end by result.json; SIGTERM makes it save and stop.
"""

from __future__ import annotations

import json
import shlex
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from caprl_utils import paths, processes, prompts
from caprl_utils.config import load_experiment, read_yaml
from caprl_utils.errors import UserError
from caprl_utils.hashing import file_hash
from caprl_utils.models.base import model_hash
from caprl_utils.models.local import close_all
from caprl_utils.progress import PROGRESS_ENV, Progress, read_state
from caprl_utils.rl.data import data_file
from caprl_utils.runs import Run, load_result
from caprl_utils.schema import RL, Experiment, Profile

STAGE = "rl"
RECIPE = [
    "caprl_utils.rl.rewards", "caprl_utils.rl.judges", "caprl_utils.rl.readers", "caprl_utils.rl.scoring",
    "caprl_utils.rl.grpo", "caprl_utils.rl.policy", "caprl_utils.rl.data", "caprl_utils.models.local",
    "caprl_utils.answers",
]  # fmt: skip
"""The modules that compute a training's weights and curve; prompts and settings are in the key by their values."""
_PROMPTS = [prompts.CAPTION, prompts.ANSWER_PREFILL, prompts.SCORE_PREFILL, prompts.RATE, prompts.UNIFIED]
GPU_MICRO_BATCH = 4
"""Ours: captions of 1-2k tokens per forward and backward of a 3B model on 80 GB, with gradient checkpointing."""
_POLL_SEC, _LEAST_GRACE_SEC = 0.5, 10.0


def run_name(experiment: str, seed: int | str) -> str:
    """Name of a run's folder; the seed may be a placeholder."""
    return f"{experiment}-seed{seed}"


def identity(experiment: Experiment, profile: Profile, seed: int) -> tuple[Any, ...]:
    """What `Run.open` and `Run.find` take for a training; its key covers settings, data, models, prompts and code."""
    models = {"policy": profile.models.policy, "scorer": profile.models[experiment.reward.role]}
    asked = prompts.reward_question("caption", "question", [prompts.CANNOT_ANSWER], profile.prompts)
    parts = {
        "rl": {name: value for name, value in profile.rl.key_part().items() if name != "seeds"},
        **{name: getattr(experiment, name).key_part() for name in ("data", "reward", "training")},
        "seed": seed, "prompts": [*_PROMPTS, asked],
        "questions": file_hash(data_file(profile, experiment.data)),
        **{part: [model.key_part(), model_hash(model)] for part, model in models.items()},
    }  # fmt: skip
    return profile, STAGE, run_name(experiment.name, seed), parts, RECIPE


def require_tracker(rl: RL) -> None:
    """Raises UserError when the package that `rl.report_to` names is not in this environment."""
    if rl.report_to and find_spec(rl.report_to) is None:
        raise UserError(
            f"rl.report_to={rl.report_to} needs the package {rl.report_to}, which is not installed: "
            f"{paths.shown(paths.ROOT / '.tools/bin/uv')} pip install --python {sys.executable} {rl.report_to}"
        )


def launch(
    experiment: str, profile: str, seed: int = 0,
    tell: Callable[[int, str], None] | None = None, stopping: threading.Event | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make a training run, or return the record of a complete one. Its log is runs/<profile>/rl/.logs/<run>.log. On a
    GPU the models of this process are dropped first. tell: is told the steps done and a note, instead of a progress
    bar. stopping: ends the training when set; it has the time of three steps to save (several processes: what their
    launcher grants, some 30 s; else they go on from the last checkpoint). Raises UserError for a layout that does not
    fit the GPUs, and with the log's last lines when the training fails or was ended.
    """
    loaded, resolved = load_experiment(experiment, profile)
    name, rl, training = run_name(loaded.name, seed), resolved.rl, loaded.training
    if (record := Run.find(*identity(loaded, resolved, seed))) is not None:
        return record  # a process takes ten seconds to say so
    gpus = len(processes.visible_gpus())
    count = num_processes(training.accelerate_config, gpus)
    batch_layout(rl.prompts_per_step, rl.group_size, training.micro_batch_size, count, gpus > 0)
    if gpus:
        close_all()
    folder = paths.RUNS / resolved.name / STAGE / name
    log, state = (folder.parent / ".logs" / f"{name}.{end}" for end in ("log", "progress.json"))
    state.unlink(missing_ok=True)
    env = {PROGRESS_ENV: str(state), "PYTHONPATH": processes.python_path()}
    words = command(experiment, profile, seed, gpus, training.accelerate_config)
    process = processes.popen(words, log, env=env)
    try:
        with nullcontext() if tell else Progress(f"train {name}", total=rl.steps) as bar:
            tell = tell or (lambda done, note: bar.update(done - bar.done, note=note))
            _watch(process, state, tell, stopping or threading.Event())
    finally:
        processes.stop(process, _grace_sec(folder))
    if process.returncode:
        raise UserError(
            f"the training {name} ended with status {process.returncode}; the end of {paths.shown(log)}:\n"
            f"{processes.tail(log)}\nRun it again to go on from its last checkpoint."
        )
    return load_result(folder)


def _watch(process: Any, state: Path, tell: Callable[[int, str], None], stopping: threading.Event) -> None:
    """Tell what changes in a training's progress file, until it ends or has to stop."""
    running, last = True, (0, "")
    while running:
        running = process.poll() is None and not stopping.wait(_POLL_SEC)
        now = {"done": 0, "note": ""} | read_state(state)
        if (now["done"], now["note"]) != last:
            last = now["done"], now["note"]
            tell(*last)


def _layout(accelerate_config: str | None) -> dict[str, Any]:
    return read_yaml(paths.CONFIGS / "accelerate" / accelerate_config) if accelerate_config else {}


def num_processes(accelerate_config: str | None, num_gpus: int) -> int:
    """How many processes train together: one per visible GPU, or those of a config for several nodes."""
    config = _layout(accelerate_config)
    return config["num_processes"] if config.get("num_machines", 1) > 1 else max(1, num_gpus)


def batch_layout(prompts: int, group: int, micro: int | None, num_processes: int, on_gpu: bool) -> tuple[int, int]:
    """(captions per forward and backward of a process, accumulation steps) of a step of `prompts` images. All captions
    of an image lie on one process: their draws are numbered there. Raises UserError when they do not fit.
    """
    images, rest = divmod(prompts, num_processes)
    if rest:
        near = sorted({max(1, images) * num_processes, (images + 1) * num_processes})
        raise UserError(
            f"{prompts} images a step (rl.prompts_per_step) do not divide over {num_processes} processes: take "
            f"{' or '.join(map(str, near))}, or as many GPUs as divide {prompts} (CUDA_VISIBLE_DEVICES)"
        )
    share = images * group
    micro = micro or (min(GPU_MICRO_BATCH, share) if on_gpu else share)
    if share % micro:
        raise UserError(
            f"training.micro_batch_size {micro} does not divide {share}, the captions a process trains a step"
        )
    return micro, share // micro


def command(experiment: str, profile: str, seed: int, num_gpus: int, layout: str | None) -> list[str]:
    """The command line of a training: plain Python, or `accelerate launch` with several GPUs or a config of it. With
    one for several nodes Slurm's srun starts it on each. Raises UserError outside of such a job.
    """
    module = ["caprl_utils.rl.train", "--experiment", experiment, "--profile", profile, "--seed", str(seed)]
    if num_gpus <= 1 and layout is None:
        return [sys.executable, "-m", *module]
    nodes = _layout(layout).get("num_machines", 1)
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    how = ["--config_file", str(paths.CONFIGS / "accelerate" / layout)] if layout else []
    if nodes == 1:
        return [*start, *how, "--num_processes", str(max(1, num_gpus)), "--module", *module]
    processes.require_slurm(nodes, f"configs/accelerate/{layout} is for {nodes} nodes", "configs/slurm/grpo.slurm")
    # what only a task of srun knows
    node = "--machine_rank $SLURM_NODEID --main_process_ip $MASTER_ADDR --main_process_port $MASTER_PORT"
    each = [f'exec "$@" {node} {shlex.join([*how, "--module", *module])}', "bash", *start]
    return ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "bash", "-c", *each]


def _grace_sec(folder: Path) -> float:
    """How long a training may take to end its step and save."""
    try:
        last = json.loads((folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        return _LEAST_GRACE_SEC + 3 * (last["seconds"] or 0)
    except (OSError, ValueError, IndexError, KeyError):  # no step yet: nothing to save
        return _LEAST_GRACE_SEC
