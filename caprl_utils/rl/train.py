"""One training as a process, which `experiments.launch`, torchrun, `accelerate launch` or Slurm starts:

    python -m caprl_utils.rl.train --experiment caprl --profile mini --seed 0

Complete runs are skipped, stopped ones go on from their last whole checkpoint. Exit status: 0 done, 143
stopped by SIGTERM after saving, 1 an error that the user can mend (its message is the last line).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import TYPE_CHECKING, Any

from caprl_utils import paths
from caprl_utils.config import load_experiment
from caprl_utils.errors import UserError
from caprl_utils.notebook import leave_out_mistral, prepare_process
from caprl_utils.processes import die_with_parent
from caprl_utils.rl.experiments import STAGE, identity, require_tracker, run_name
from caprl_utils.runs import Run, checkpoints_in, last_checkpoint
from caprl_utils.schema import Experiment, Profile

if TYPE_CHECKING:
    from caprl_utils.rl.grpo import CaptionTrainer

STOPPED = 143  # 128 + SIGTERM


def train(experiment: Experiment, profile: Profile, seed: int) -> int:
    """Make the run unless it is complete; returns the exit status."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    run = Run.open(*identity(experiment, profile, seed)) if state.is_main_process else None
    folder = paths.RUNS / profile.name / STAGE / run_name(experiment.name, seed)
    try:
        state.wait_for_everyone()
        if run.complete if run else (folder / "result.json").is_file():
            return 0

        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        from caprl_utils.rl.grpo import open_trainer
        from caprl_utils.rl.monitor import Monitor
        from caprl_utils.rl.policy import is_whole

        with state.main_process_first():  # which deletes half-written ones
            checkpoint = last_checkpoint(folder, is_whole)
        trainer = open_trainer(experiment, profile, seed, folder)
        with Monitor(trainer, folder, checkpoint, profile.rl.report_to):
            if not trainer.fit(checkpoint):
                return STOPPED
        # under ZeRO-3 each process holds a part of them, and all have to ask
        weights = trainer.accelerator.get_state_dict(trainer.deepspeed) if is_deepspeed_zero3_enabled() else None
        if run:
            _finish(run, trainer, experiment, weights)
        return 0
    finally:
        if run:
            run.close()


def _finish(run: Run, trainer: CaptionTrainer, experiment: Experiment, weights: Any) -> None:
    """Save the final model, write the record, drop the checkpoints: in this order, so a kill loses nothing."""
    from caprl_utils.rl import policy

    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters, start = policy.counts(model), run.profile.models.policy
    policy.save_final(model, trainer.processing_class, run.folder / "final", start, weights)
    curve = list(run.rows("curve").read())

    def mean(name: str, part: slice = slice(None)) -> float | None:
        known = [row[name] for row in curve[part] if row[name] is not None]
        return sum(known) / len(known) if known else None

    values = {"steps": len(curve), "set_aside": len(trainer.set_aside)}
    for name in ("reward", "completion_tokens"):  # ten steps at either end
        values |= {f"{name}_first": mean(name, slice(10)), f"{name}_last": mean(name, slice(-10, None))}
    values |= {name: mean(name) for name in ("seconds", "seconds_generate", "seconds_reward", "reward_calls")}
    run.finish(values=values, n=len(trainer.train_dataset), unit="image", seeds=[trainer.args.seed],
               parameters=parameters, experiment=experiment.model_dump(mode="json"))  # fmt: skip
    for checkpoint in checkpoints_in(run.folder):
        shutil.rmtree(checkpoint)


def leave_out_vllm() -> None:
    """Tell TRL that there is no vLLM, and transformers that there is none of what came with it: both are imported
    wherever they are installed, 8 and 5 of 22 seconds of a start.
    """
    leave_out_mistral()
    from trl import import_utils

    import_utils.is_vllm_available = lambda min_version=None: False


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m caprl_utils.rl.train", description="Train a captioner by GRPO.")
    parser.add_argument("--experiment", required=True, help="name in configs/experiments, or a YAML file")
    parser.add_argument("--profile", required=True, help="smoke | mini | one_gpu | paper")
    parser.add_argument("--seed", type=int, default=0, help="of the run; everything random derives from it")
    arguments = parser.parse_args(argv)
    if "LOCAL_RANK" in os.environ:  # a worker of `accelerate launch`, which itself dies with the notebook
        die_with_parent()
    experiment, profile = load_experiment(arguments.experiment, arguments.profile)
    require_tracker(profile.rl)
    prepare_process(profile, any_model=True)
    if experiment.training.rollout == "transformers":
        leave_out_vllm()
    return train(experiment, profile, arguments.seed)


def run() -> None:
    """This process as the command line."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
