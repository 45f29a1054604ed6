"""The trainings of a profile: which there are, and all of them in one loop with their evaluation.

A run that several tables share is trained once; complete ones are read back, a stopped one goes on. The captioner of
every run, and the one that training starts from, is evaluated on the same samples by the same reader, so that tables
can compare them image by image. `ablations.parallel_runs` run side by side, while this process evaluates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

from caprl_utils.config import load_experiment, load_profile, names_of
from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.processes import visible_gpus
from caprl_utils.progress import Progress
from caprl_utils.rl.launch import launch, require_tracker, run_name
from caprl_utils.schema import Experiment, ModelConfig, Profile

MAIN = "caprl"
BASE_RUN = "base-3b"  # Prism run of the captioner that training starts from, as notebook 04 names it
TABLE_3 = (MAIN, "judge_vlm", "judge_unified")
SWAPPED = ("short", "other_reader")  # also read by the reward's reader: the swap of readers


class Planned(NamedTuple):
    """One training; its name is that of its run folder and of its Prism run."""

    experiment: str
    seed: int

    @property
    def name(self) -> str:
        return run_name(self.experiment, self.seed)


def prism_name(run: str, role: str = "prism_reader") -> str:
    """Name of the Prism run of a captioner that one of the profile's models reads."""
    return run if role == "prism_reader" else f"{run}-by-{role}"


def planned(profile: Profile, names: Sequence[str] = ()) -> list[Planned]:
    """The trainings of a profile in their order, or those of the experiments named, which it need not list. Raises
    UserError for a name that is none of configs/experiments.
    """
    known = names_of(Experiment)
    if wrong := [name for name in names if name not in known]:
        hint = did_you_mean(wrong[0], known)
        raise UserError(f"no experiment {wrong[0]!r}{hint}; known: {', '.join(known)} (configs/experiments)")
    order = dict.fromkeys([MAIN, *profile.ablations.experiments, *names])
    chosen = [name for name in order if not names or name in names]
    return [Planned(name, seed) for name in chosen for seed in seeds_of(profile, name)]


def seeds_of(profile: Profile, experiment: str) -> list[int]:
    """Seeds of an experiment's trainings: rl.seeds for the main one, else ablations.seeds."""
    return profile.rl.seeds if experiment == MAIN else profile.ablations.seeds


def of_table_3(profile: Profile) -> list[str]:
    """The experiments of Table 3 that the profile has."""
    return [name for name in TABLE_3 if name in (MAIN, *profile.ablations.experiments)]


def listing(profile_name: str) -> str:
    """The experiments of a profile, each with what it is, what it is for and the seeds of its trainings."""

    def line(name: str) -> str:
        experiment, seeds = (load_experiment(name, profile_name)[0], ", ".join(map(str, seeds_of(profile, name))))
        return f"{name:14} {experiment.description} [{experiment.item}; seeds {seeds}]"

    profile = load_profile(profile_name)
    return "\n".join(map(line, dict.fromkeys(one.experiment for one in planned(profile))))


def run_all(profile_name: str, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train and evaluate what is not there yet; one row per run in the order of `planned`. A training that fails does
    not hold up the others, but for the main one. Raises UserError at the end, naming those that failed and why.
    Interrupted, it ends all trainings, each after saving.
    """
    from caprl_utils.prism.evaluate import trained_captioner

    profile = load_profile(profile_name)
    runs, workers = planned(profile, names), profile.ablations.parallel_runs
    # a mistake in the last of them shows before the first starts
    steps = {one: load_experiment(one.experiment, profile_name)[1].rl.steps for one in runs}
    require_tracker(profile.rl)
    evaluate = _evaluator(profile, swap=SWAPPED[1] in (*profile.ablations.experiments, *names))
    # models that train and models that caption do not fit on one GPU together
    turn = threading.Lock() if workers == 1 and visible_gpus() else nullcontext()
    rows: dict[Planned, dict[str, Any]] = {}
    failed: list[str] = []
    with (
        Progress("training steps", sum(steps.values())) as bar,
        _trainings(profile_name, workers, steps, bar, turn) as trainings,
    ):
        with turn:
            evaluate(BASE_RUN, profile.models.policy, SWAPPED[0])
        for training in as_completed(trainings):
            one = trainings[training]
            try:
                record = training.result()
                with turn:
                    trained = trained_captioner(profile, one.name)
                    rows[one] = _summary(one, record, evaluate(one.name, trained, one.experiment))
            except UserError as error:
                if one.experiment == MAIN:
                    raise
                failed.append(f"\n  {one.name}: {error}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} trainings failed or their evaluations did; the others are done; run again "
            f"to go on:{''.join(failed)}"
        )
    return [rows[one] for one in runs]


@contextmanager
def _trainings(
    profile: str, workers: int, steps: Mapping[Planned, int], bar: Progress, turn: AbstractContextManager
) -> Iterator[dict[Future, Planned]]:
    """All trainings on their way, the longest first; those still running at the end of the block are ended."""
    stopping, lock = threading.Event(), threading.Lock()
    pool = ThreadPoolExecutor(workers)

    def train(one: Planned) -> dict[str, Any]:
        done = 0

        def tell(now: int, note: str) -> None:
            nonlocal done
            with lock:
                bar.update(now - done, note=f"{one.name} {note}")
            done = now

        with turn:
            record = launch(one.experiment, profile, one.seed, tell, stopping)
        tell(steps[one], "complete")  # one that was complete before reports no steps
        return record

    try:
        yield {pool.submit(train, one): one for one in sorted(steps, key=lambda one: -steps[one])}
    finally:
        stopping.set()
        pool.shutdown(cancel_futures=True)


def _summary(one: Planned, record: dict[str, Any], prism: dict[str, Any]) -> dict[str, Any]:
    """What a table of all runs shows of one."""
    values = record["values"]
    return {
        "run": one.name, "steps": values["steps"], "images": record["n"], "minutes": record["wall_sec"] / 60,
        "reward first": values["reward_first"], "last": values["reward_last"],
        "tokens first": values["completion_tokens_first"], "tokens last": values["completion_tokens_last"],
        "accuracy": prism["values"]["average"],
    }  # fmt: skip


def _evaluator(profile: Profile, swap: bool) -> Callable[[str, ModelConfig, str], dict[str, Any]]:
    """Call with run, captioner and experiment: its record by the evaluation's own reader. Those of the swap are read by
    the reward's as well. Samples and readers are loaded once, when first needed.
    """
    from caprl_utils.models.base import open_backend
    from caprl_utils.prism.evaluate import evaluate
    from caprl_utils.prism.loading import load_samples

    samples = cache(lambda: load_samples(profile))
    reader = cache(lambda role: open_backend(profile.models[role], profile))

    def of(run: str, captioner: ModelConfig, experiment: str) -> dict[str, Any]:
        model = open_backend(captioner, profile)
        record = evaluate(profile, run, model, reader("prism_reader"), samples(), run)
        if swap and experiment in SWAPPED:
            other = "reward_reader"
            evaluate(profile, prism_name(run, other), model, reader(other), samples(), run)
        return record

    return of
