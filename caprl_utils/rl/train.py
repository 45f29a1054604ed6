"""One training run, as the process that a notebook or a terminal starts.

    python -m caprl_utils.rl.train --experiment caprl --profile mini --seed 0

Complete runs are skipped, stopped ones go on from their last whole checkpoint. Exit status: 0 done, 143
stopped by SIGTERM after saving, 1 an error that the user can mend (its message is the last line).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import paths, prompts
from caprl_utils.config import load_experiment
from caprl_utils.errors import command_line
from caprl_utils.hashing import file_hash, folder_hash
from caprl_utils.notebook import prepare_process
from caprl_utils.processes import die_with_parent
from caprl_utils.rl.data import data_file
from caprl_utils.runs import Run
from caprl_utils.schema import Experiment, ModelConfig, Profile

if TYPE_CHECKING:
    from caprl_utils.rl.monitor import Monitor
    from caprl_utils.rl.trainer import CaptionTrainer

STAGE = "rl"
MODULES = ["caprl_utils.rl.train"]
STOPPED = 143  # 128 + SIGTERM
_WINDOW = 10  # steps at either end that the record averages


def run_name(experiment: str, seed: int | str) -> str:
    """Name of a run's folder; the seed may be a placeholder."""
    return f"{experiment}-seed{seed}"


def open_run(experiment: Experiment, profile: Profile, seed: int) -> Run:
    """The run's folder, locked; its key covers settings, data, models, prompts and code."""
    return Run.open(
        profile, STAGE, run_name(experiment.name, seed), _parts(experiment, profile, seed), MODULES
    )


def finished(experiment: Experiment, profile: Profile, seed: int) -> dict[str, Any] | None:
    """The record of a complete run; None when something of it is to be done."""
    return Run.find(
        profile, STAGE, run_name(experiment.name, seed), _parts(experiment, profile, seed), MODULES
    )


def _parts(experiment: Experiment, profile: Profile, seed: int) -> dict[str, Any]:
    settings = {name: getattr(experiment, name).key_part() for name in ("data", "reward", "training")}
    shared = {name: value for name, value in profile.rl.key_part().items() if name != "seeds"}
    return {
        "rl": shared, **settings, "seed": seed, "prompts": prompts.prompt_hash(),
        "questions": file_hash(data_file(profile, experiment.data)),
        "policy": _identity(profile.models.policy), "scorer": _identity(profile.models[experiment.reward.role]),
    }  # fmt: skip


def _identity(model: ModelConfig) -> Any:
    folder = Path(paths.resolve_model(model.path))
    return [model.key_part(), folder_hash(folder)] if folder.is_dir() else model.key_part()


def train(experiment: Experiment, profile: Profile, seed: int) -> int:
    """Make the run unless it is complete; returns the exit status."""
    from accelerate import PartialState

    from caprl_utils.rl.checkpoints import last_complete

    state = PartialState(cpu=not _has_gpu())
    run = open_run(experiment, profile, seed) if state.is_main_process else None
    folder = paths.RUNS / profile.name / STAGE / run_name(experiment.name, seed)
    try:
        state.wait_for_everyone()
        if run.complete if run else (folder / "result.json").is_file():
            return 0
        if run:
            last_complete(folder)  # deletes half-written ones before any process looks
        state.wait_for_everyone()
        checkpoint = last_complete(folder)
        trainer, monitor = build(experiment, profile, seed, folder, checkpoint)
        try:
            finished = trainer.fit(checkpoint)
        finally:
            monitor.close()
        if not finished:
            return STOPPED
        weights = trainer.whole_weights()
        if run:
            _finish(run, trainer, experiment, seed, weights)
        return 0
    finally:
        if run:
            run.close()


def build(
    experiment: Experiment, profile: Profile, seed: int, folder: Path, checkpoint: Path | None
) -> tuple[CaptionTrainer, Monitor]:
    """Model, data, reader and trainer of a run, ready to fit from the checkpoint or from the start."""
    from accelerate import PartialState
    from trl import GRPOConfig

    from caprl_utils.rl.arguments import grpo_arguments
    from caprl_utils.rl.checkpoints import step_of
    from caprl_utils.rl.data import load_data
    from caprl_utils.rl.monitor import Monitor
    from caprl_utils.rl.policy import load_policy, load_processor, lora_config, refuse_what_does_not_mix
    from caprl_utils.rl.scoring import open_reward
    from caprl_utils.rl.trainer import CaptionTrainer
    from caprl_utils.rl.vision import share_images

    rl, training = profile.rl, experiment.training
    rows = load_data(data_file(profile, experiment.data), experiment.data, rl.num_images, rl.prompts_per_step)
    arguments = grpo_arguments(profile, experiment, seed, folder, PartialState().num_processes, _has_gpu())
    reward = open_reward(profile, experiment, seed)
    policy = load_policy(profile.models.policy, training)
    share_images(policy)
    refuse_what_does_not_mix(profile.models.policy, training)
    trainer = CaptionTrainer(
        model=policy, args=GRPOConfig(**arguments),
        train_dataset=rows, reward_funcs=[reward], processing_class=load_processor(profile.models.policy),
        peft_config=lora_config(training, policy),
    )  # fmt: skip
    if trainer.ref_model is not None:
        share_images(trainer.accelerator.unwrap_model(trainer.ref_model))
    done = step_of(checkpoint) if checkpoint else 0
    monitor = Monitor(folder, rl.steps, done, writes=PartialState().is_main_process)
    monitor.attach(trainer)
    return trainer, monitor


def _without_vllm() -> None:
    """Tell TRL that there is no vLLM, which it imports wherever it is installed: 8 of 17 seconds of a start."""
    from trl import import_utils

    import_utils.is_vllm_available = lambda min_version=None: False


def _finish(
    run: Run, trainer: CaptionTrainer, experiment: Experiment, seed: int, weights: dict[str, Any] | None
) -> None:
    """Save the final model, write the record, drop the checkpoints: in this order, so a kill loses
    nothing.
    """
    from caprl_utils.rl.checkpoints import delete_all
    from caprl_utils.rl.policy import counts, save_final

    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = counts(model)
    save_final(model, trainer.processing_class, run.folder / "final", weights)
    curve = list(run.rows("curve").read())
    ends = {
        f"{name}_{end}": _window(curve, name, end)
        for name in ("reward", "completion_tokens")
        for end in ("first", "last")
    }
    means = {name: _window(curve, name, "all") for name in ("seconds", "seconds_generate", "seconds_reward")}
    values = {"steps": len(curve), **ends, **means}
    run.finish(values=values, n=len(trainer.train_dataset), unit="image", seeds=[seed],
               parameters=parameters, experiment=experiment.model_dump(mode="json"))  # fmt: skip
    delete_all(run.folder)


def _window(curve: list[dict[str, Any]], name: str, end: str) -> float | None:
    """Mean of a column over the first, the last, or all steps; None when it was never known."""
    rows = {"first": curve[:_WINDOW], "last": curve[-_WINDOW:], "all": curve}[end]
    known = [row[name] for row in rows if row[name] is not None]
    return sum(known) / len(known) if known else None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@command_line
def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m caprl_utils.rl.train", description="Train a captioner by GRPO."
    )
    parser.add_argument("--experiment", required=True, help="name in configs/experiments, or a YAML file")
    parser.add_argument("--profile", required=True, help="smoke | mini | one_gpu | paper")
    parser.add_argument("--seed", type=int, default=0, help="of the run; everything random derives from it")
    arguments = parser.parse_args(argv)
    if "LOCAL_RANK" in os.environ:  # a worker of `accelerate launch`, which itself dies with the notebook
        die_with_parent()
    experiment, profile = load_experiment(arguments.experiment, arguments.profile)
    prepare_process(profile)
    if experiment.training.rollout == "transformers":
        _without_vllm()
    return train(experiment, profile, arguments.seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
