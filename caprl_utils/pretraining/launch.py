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
from caprl_utils.schema import Pretraining, Profile

ENVIRONMENT = paths.ROOT / ".venv-llamafactory"
SITE = Path(__file__).parent / "site"
_LOG_NAME = "trainer_log.jsonl"  # LLaMA-Factory's, in the output folder
_POLL_SEC = 0.5

OnStep = Callable[[int, int, float | None], None]
"""(steps done, steps in all, last loss)"""


def command(config: Path, nodes: int = 1) -> list[str]:
    """The command line. Raises UserError when LLaMA-Factory's environment is not there."""
    program = ENVIRONMENT / "bin" / "llamafactory-cli"
    if not program.is_file():
        raise UserError(f"no {shown(program)}; make it: make setup-llamafactory")
    train = [str(program), "train", str(config)]
    if nodes == 1:
        return train
    # one torchrun a node; only srun knows which node it is on
    return ["srun", f"--nodes={nodes}", "--ntasks-per-node=1",
            "bash", "-c", 'NODE_RANK=$SLURM_NODEID exec "$@"', "bash", *train]  # fmt: skip


def check_nodes(settings: Pretraining) -> None:
    """Raise UserError when several nodes should train and this is no job of Slurm's that has as many."""
    found = os.environ.get("SLURM_JOB_NUM_NODES", "none")
    if settings.nodes > 1 and (found != str(settings.nodes) or "MASTER_ADDR" not in os.environ):
        raise UserError(
            f"pretraining.nodes is {settings.nodes}: LLaMA-Factory is started on each by srun, so this has to run in a "
            f"Slurm job of {settings.nodes} nodes (here: {found}) with MASTER_ADDR and MASTER_PORT set; "
            "configs/slurm/llamafactory.slurm does so"
        )


def environment(profile: Profile, cache: Path) -> dict[str, str]:
    """Variables on top of ours. cache: where its data sets go; they are of no use after the run."""
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
        found |= {"CUDA_VISIBLE_DEVICES": ""}
        found["OMP_NUM_THREADS"] = str(max(1, (profile.torch_threads or 1) // settings.parallel_runs))
    return found | torchrun_variables(settings)


def torchrun_variables(settings: Pretraining) -> dict[str, str]:
    """How LLaMA-Factory's launcher starts its processes; the node's number and address come from outside."""
    if settings.gpus_per_node == 0:
        return {"FORCE_TORCHRUN": "0"}
    found = {"NPROC_PER_NODE": str(settings.gpus_per_node), "NNODES": str(settings.nodes)}
    if settings.deepspeed is not None or settings.gpus_per_node > 1:
        found["FORCE_TORCHRUN"] = "1"
    return found


def run(
    config: Path, log: Path, env: Mapping[str, str], watch: Callable[[], None] = lambda: None, nodes: int = 1
) -> None:
    """Train to the end. watch: called twice a second; what it raises ends the training.

    Raises UserError with the end of the log when LLaMA-Factory fails.
    """
    process = processes.popen(
        command(config, nodes), log, env, guarded=True
    )  # torchrun's workers die with us, too
    try:
        while process.poll() is None:
            watch()
            time.sleep(_POLL_SEC)
        watch()
    finally:
        processes.stop(process)
    if process.returncode:
        raise UserError(
            f"llamafactory-cli ended with status {process.returncode}; the end of {shown(log)}:\n"
            f"{processes.tail(log)}\nRun it again to go on from its last checkpoint."
        )


def report(output: Path, on_step: OnStep) -> None:
    """Tell the last line of LLaMA-Factory's step log. output: its output folder."""
    try:
        last = (output / _LOG_NAME).read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
        state = json.loads(last)
    except (OSError, ValueError):  # not there yet, or half a line
        return
    on_step(state["current_steps"], state["total_steps"], state.get("loss"))
