"""Start trainings from a notebook: a process of its own, watched, with a bar, ended with the notebook."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from caprl_utils import paths, processes
from caprl_utils.config import load_experiment
from caprl_utils.errors import UserError
from caprl_utils.progress import PROGRESS_ENV, Progress
from caprl_utils.provenance import gpu_names
from caprl_utils.rl import nodes
from caprl_utils.rl.live import LiveFigure
from caprl_utils.rl.train import STAGE, finished, run_name
from caprl_utils.runs import load_result

_POLL_SEC = 0.5
_LEAST_GRACE_SEC = 10.0


class Bar(Protocol):
    """What shows a training's progress: a `Progress`, or a share of one."""

    done: int
    note: str

    def update(self, n: int = 1, note: str = "") -> None:
        """n more steps are done."""


def launch(
    experiment: str,
    profile: str,
    seed: int = 0,
    bar: Bar | None = None,
    stopping: threading.Event | None = None,
) -> dict[str, Any]:
    """Make a training run, or return the record of a complete one.

    The process writes to runs/<profile>/rl/.logs/<run>.log. bar: where progress is shown, by default a bar of its
    own and, in a notebook, a small figure. stopping: ends the training when set; it has the time of three steps to
    save (several processes: what their launcher grants, some 30 s; else they go on from the last checkpoint). Raises
    UserError with the log's last lines when it fails or was ended.
    """
    stopping = stopping or threading.Event()
    loaded, resolved = load_experiment(experiment, profile)
    name = run_name(loaded.name, seed)
    if (record := finished(loaded, resolved, seed)) is not None:
        return record  # a process takes ten seconds to say so
    logs = paths.RUNS / resolved.name / STAGE / ".logs"
    log, state = logs / f"{name}.log", logs / f"{name}.progress.json"
    folder = paths.RUNS / resolved.name / STAGE / name
    state.unlink(missing_ok=True)
    words = command(experiment, profile, seed, len(gpu_names()), loaded.training.accelerate_config)
    process = processes.popen(words, log, env={PROGRESS_ENV: str(state), **_environment()})
    figure = None if bar else LiveFigure(folder)
    try:
        with (
            nodes.announced(logs, name),
            nullcontext(bar) if bar else Progress(f"train {name}", total=resolved.rl.steps) as shown,
        ):
            while process.poll() is None and not stopping.wait(_POLL_SEC):
                _mirror(state, shown)
                if figure:
                    figure.update()
            _mirror(state, shown)
            if figure:
                figure.update(now=True)
    finally:
        processes.stop(process, _grace_sec(folder))
    if process.returncode:
        raise UserError(
            f"the training {name} ended with status {process.returncode}; the end of {paths.shown(log)}:\n"
            f"{processes.tail(log)}\nRun it again to go on from its last checkpoint."
        )
    return load_result(folder)


def take_part(experiment: str, profile: str, seed: int) -> None:
    """This node's part of a training that node 0 makes, to its end; its log lies beside that of node 0.

    Raises UserError with the log's last lines when it fails.
    """
    loaded, resolved = load_experiment(experiment, profile)
    name = f"{run_name(loaded.name, seed)}.node{nodes.rank()}.log"
    words = command(experiment, profile, seed, len(gpu_names()), loaded.training.accelerate_config)
    processes.run(words, paths.RUNS / resolved.name / STAGE / ".logs" / name, _environment())


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": processes.python_path()}


def command(
    experiment: str, profile: str, seed: int, num_gpus: int, accelerate_config: str | None
) -> list[str]:
    """The command line of a training: plain Python, or `accelerate launch` with several GPUs or a config of
    it.

    Raises UserError when a config is for several nodes and this process does not know which one it is.
    """
    module = ["caprl_utils.rl.train", "--experiment", experiment, "--profile", profile, "--seed", str(seed)]
    if num_gpus <= 1 and accelerate_config is None:
        return [sys.executable, "-m", *module]
    how = ["--num_processes", str(num_gpus)]
    if accelerate_config is not None:
        file = paths.CONFIGS / "accelerate" / accelerate_config
        how = ["--config_file", str(file), *nodes.options(file)]
    return [sys.executable, "-m", "accelerate.commands.launch", *how, "--module", *module]


def _grace_sec(folder: Path) -> float:
    """How long a training may take to end its step and save."""
    try:
        last = json.loads((folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        return _LEAST_GRACE_SEC + 3 * (last["seconds"] or 0)
    except (OSError, ValueError, IndexError, KeyError):  # no step yet: nothing to save
        return _LEAST_GRACE_SEC


def _mirror(state: Path, bar: Bar) -> None:
    """Show what the training wrote to its progress file."""
    try:
        now = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not started yet
        return
    if now["done"] != bar.done or now["note"] != bar.note:
        bar.update(now["done"] - bar.done, note=now["note"])
