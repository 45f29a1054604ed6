"""All trainings behind Tables 1 and 2 and Figure 4: assemble, prepare, train, evaluate.

    python -m caprl_utils.pretraining.chain --profile mini --item table2

A training that several rows begin with is made once. Trainings whose start is there run side by side, as many as
pretraining.parallel_runs says. Everything stopped goes on where it was. On several nodes it runs once, in a Slurm job:
configs/slurm/llamafactory.slurm.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import command_line
from caprl_utils.notebook import prepare_process
from caprl_utils.pretraining import launch
from caprl_utils.pretraining.arguments import num_steps, stage_of
from caprl_utils.pretraining.evaluate import evaluate
from caprl_utils.pretraining.prepare import Prepared, prepare
from caprl_utils.pretraining.sets import Training, finals, seeded, seeds_of, wanted
from caprl_utils.pretraining.stages import folder_of, train
from caprl_utils.progress import Progress
from caprl_utils.schema import Profile

ITEMS = ("table1", "table2", "figure4")


def run(profile: Profile, items: tuple[str, ...] | None = None) -> dict[str, dict[str, Any]]:
    """Everything that the items need (the profile's by default); returns evaluation name -> its record."""
    items = items or tuple(profile.pretraining.items)
    trainings = wanted(profile.pretraining, items)
    models = assemble(profile)
    prepared = prepare(profile, trainings, models)
    train_all(profile, trainings, prepared, models)
    return evaluate(profile, finals(profile.pretraining, items))


def assemble(profile: Profile) -> dict[str, Path]:
    """Setting, with its seed where that is not the profile's -> folder of its assembled model.

    The seed draws the projector. One that is there already is left as it is. Raises UserError when several nodes
    should train and this is no Slurm job, before hours of captions and data.
    """
    from caprl_utils.vlm_init import assembly

    launch.check_nodes(profile.pretraining)
    folders = {}
    for setting in profile.pretraining.settings:
        for seed in seeds_of(profile.pretraining, setting):
            name = seeded(setting, seed)
            folders[name] = paths.RUNS / profile.name / "vlm_init" / name
            assembly.assemble(setting, folders[name], profile.seed if seed is None else seed)
    return folders


def train_all(
    profile: Profile, trainings: Sequence[Training], prepared: Prepared, models: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    """Make all trainings, each after the one that it starts from; returns name -> record.

    models: as `assemble` gives them. The first that fails is raised, after those that run have come to their end.
    """
    launch.check_nodes(profile.pretraining)
    settings = profile.pretraining
    steps = {
        t.name: num_steps(stage_of(settings, t.stage, t.setting), prepared.of(t).values["rows"])
        for t in trainings
    }
    records: dict[str, dict[str, Any]] = {}
    with Progress("pretraining steps", sum(steps.values())) as progress:
        counter = _Counter(progress)

        def make(training: Training) -> dict[str, Any]:
            model = folder_of(profile, training.start) / "final" if training.start else models[training.model]
            record = train(
                profile, training, prepared.inputs(training, model),
                on_step=lambda done, _, loss: counter.at(training.name, done, loss),
            )  # fmt: skip
            counter.at(training.name, steps[training.name], None)
            return record

        _in_order(trainings, make, settings.parallel_runs, records)
    return records


def _in_order(trainings: Sequence[Training], make: Any, workers: int, records: dict[str, Any]) -> None:
    """Call make for every training whose start is done, `workers` at a time, in the order given."""
    waiting, running = list(trainings), {}
    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            ready = [t for t in waiting if t.start is None or t.start in records]
            for training in ready[: workers - len(running)]:
                waiting.remove(training)
                running[pool.submit(make, training)] = training
            done: set[Future] = wait(running, return_when=FIRST_COMPLETED).done
            for future in done:
                records[running.pop(future).name] = future.result()


class _Counter:
    """One progress line for trainings that run side by side."""

    def __init__(self, progress: Progress):
        self._progress, self._lock, self._done = progress, threading.Lock(), {}

    def at(self, name: str, step: int, loss: float | None) -> None:
        """A training is at this step."""
        with self._lock:
            ahead = step - self._done.get(name, 0)
            if ahead > 0:
                self._done[name] = step
                note = name if loss is None else f"{name} loss {float(loss):.3f}"
                self._progress.update(ahead, note=note)


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m caprl_utils.pretraining.chain", description="Pretrain on caption sets and evaluate."
    )
    parser.add_argument("--profile", default="mini")
    parser.add_argument(
        "--item", action="append", choices=ITEMS, help="what to make; the profile's items by default"
    )
    arguments = parser.parse_args(argv)
    profile = load_profile(arguments.profile)
    prepare_process(profile)
    items = tuple(arguments.item or ()) or None
    records = run(profile, items)
    for name, record in records.items():
        print(f"{name:<40} {100 * record['values']['average']:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
