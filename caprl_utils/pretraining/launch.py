"""Run the real `llamafactory-cli` in its own environment: watched, logged, ended with this process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from caprl_utils import paths, processes
from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.schema import Profile

ENVIRONMENT = paths.ROOT / ".venv-llamafactory"
SITE = Path(__file__).parent / "site"
_LOG_NAME = "trainer_log.jsonl"  # LLaMA-Factory's, in the output folder
_POLL_SEC = 0.5

OnStep = Callable[[int, int, float | None], None]
"""(steps done, steps in all, last loss)"""


def command(config: Path) -> list[str]:
    """The command line. Raises UserError when LLaMA-Factory's environment is not there."""
    program = ENVIRONMENT / "bin" / "llamafactory-cli"
    if not program.is_file():
        raise UserError(f"no {shown(program)}; make it: make setup-llamafactory")
    return [str(program), "train", str(config)]


def environment(profile: Profile, cache: Path) -> dict[str, str]:
    """Variables on top of ours. cache: where its data sets go; they are of no use after the run.

    Raises UserError when several nodes train and this process does not know which one it is.
    """
    settings = profile.pretraining
    found = {
        "PYTHONPATH": os.pathsep.join([str(SITE), str(paths.ROOT)]),
        "PATH": os.pathsep.join([str(ENVIRONMENT / "bin"), os.environ.get("PATH", "")]),  # torchrun
        "HF_DATASETS_CACHE": str(cache),
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_DISABLED": "true",
        "MPLBACKEND": "Agg",  # a notebook's own names a module that is not in that environment
        "PYTHONDONTWRITEBYTECODE": "",  # ours: where it is set, each start compiles everything again, 17 s of CPU
    }
    if settings.gpus_per_node == 0:
        found |= {"CUDA_VISIBLE_DEVICES": "", "FORCE_TORCHRUN": "0"}
        found["OMP_NUM_THREADS"] = str(max(1, (profile.torch_threads or 1) // settings.parallel_runs))
        return found
    found |= {"NPROC_PER_NODE": str(settings.gpus_per_node), "NNODES": str(settings.nodes)}
    if settings.deepspeed is not None or settings.gpus_per_node > 1:
        found["FORCE_TORCHRUN"] = "1"
    if settings.nodes > 1 and not {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"pretraining.nodes is {settings.nodes}: start the same command on every node with NODE_RANK (0 to "
            f"{settings.nodes - 1}), MASTER_ADDR and MASTER_PORT set; `make plan` prints them"
        )
    return found


def run(config: Path, output: Path, log: Path, env: Mapping[str, str], on_step: OnStep) -> None:
    """Train to the end. Raises UserError with the end of the log when LLaMA-Factory fails."""
    process = processes.popen(command(config), log, env)
    try:
        while process.poll() is None:
            _report(output / _LOG_NAME, on_step)
            time.sleep(_POLL_SEC)
        _report(output / _LOG_NAME, on_step)
    finally:
        processes.stop(process)
    if process.returncode:
        raise UserError(
            f"llamafactory-cli ended with status {process.returncode}; the end of {shown(log)}:\n"
            f"{processes.tail(log)}\nRun it again to go on from its last checkpoint."
        )


def _report(file: Path, on_step: OnStep) -> None:
    """Tell the last line of LLaMA-Factory's step log."""
    try:
        last = file.read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
        state = json.loads(last)
    except (OSError, ValueError):  # not there yet, or half a line
        return
    on_step(state["current_steps"], state["total_steps"], state.get("loss"))
