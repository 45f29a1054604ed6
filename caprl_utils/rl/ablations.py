"""All trainings of a profile in one loop, each followed by its Prism evaluation.

    python -m caprl_utils.rl.ablations [NAME ...] --profile mini      all of the profile, or those named

The main experiment is trained once per seed of `rl.seeds`, every other of `ablations.experiments` with the first of
them, and with those that `ablations.more_seeds` adds. A run that several tables share is trained once; complete ones
are read back, a stopped one goes on. The captioner of every run, and the one that training starts from, is evaluated
on the same samples by the same reader, so that tables can compare them image by image. `ablations.parallel_runs`
trainings run side by side, the longest first, while this process evaluates those that have ended.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_experiment, load_profile
from caprl_utils.errors import UserError, command_line, nearest
from caprl_utils.notebook import prepare_process
from caprl_utils.progress import Progress
from caprl_utils.provenance import gpu_names
from caprl_utils.rl import nodes
from caprl_utils.rl.launch import launch, take_part
from caprl_utils.rl.train import STAGE, finished, run_name
from caprl_utils.schema import ModelConfig, Profile

log = logging.getLogger(__name__)
MAIN = "caprl"
BASE_RUN = "base-3b"  # Prism run of the captioner that training starts from, as notebook 05 names it
TABLE_3 = (MAIN, "judge_vlm", "judge_unified")
SWAPPED = ("short", "other_reader")  # also read by the reward's reader: the swap of readers


@dataclass(frozen=True)
class Planned:
    """One training."""

    experiment: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder, and of its Prism run."""
        return run_name(self.experiment, self.seed)


def planned(profile: Profile, names: Sequence[str] = ()) -> list[Planned]:
    """The trainings of a profile in their order, or those of the experiments named.

    Raises UserError for a name that is none of the profile's.
    """
    known = [MAIN, *profile.ablations.experiments]
    for name in names:
        if name not in known:
            close = nearest(name, known)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"experiment {name!r} is none of profile {profile.name}{hint} "
                f"It has {', '.join(known)} (ablations.experiments)"
            )
    chosen = [name for name in dict.fromkeys(known) if not names or name in names]
    return [Planned(name, seed) for name in chosen for seed in seeds_of(profile, name)]


def seeds_of(profile: Profile, experiment: str) -> list[int]:
    """Seeds of an experiment's trainings: all of rl.seeds for the main one, else the first and ablations.more_seeds."""
    if experiment == MAIN:
        return list(profile.rl.seeds)
    return list(dict.fromkeys([profile.rl.seeds[0], *profile.ablations.more_seeds.get(experiment, ())]))


def of_table_3(profile: Profile) -> list[str]:
    """The experiments of Table 3 that the profile has."""
    return [name for name in TABLE_3 if name in (MAIN, *profile.ablations.experiments)]


def run_all(profile_name: str, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train and evaluate what is not there yet; one row per run in the order of `planned`, as `summary` gives it.

    A training that fails does not hold up the others, but for the main one. Raises UserError at the end, naming those
    that failed and why. Interrupted, it ends all trainings, each after saving.
    """
    profile = load_profile(profile_name)
    runs = planned(profile, names)
    # a mistake in the last of them shows before the first starts
    steps = {one: load_experiment(one.experiment, profile_name)[1].rl.steps for one in runs}
    evaluation = Evaluation(profile)
    workers = profile.ablations.parallel_runs
    # models that train and models that caption do not fit on one GPU together
    turn = threading.Lock() if workers == 1 and gpu_names() else nullcontext()
    rows: dict[Planned, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with (
        Progress("training steps", sum(steps.values())) as bar,
        _trainings(profile_name, workers, steps, bar, turn) as trainings,
    ):
        with turn:
            evaluation.base()
        for training in as_completed(trainings):
            one = trainings[training]
            try:
                record = training.result()
                with turn:
                    rows[one] = summary(one, record, evaluation.of(one))
            except UserError as error:
                if one.experiment == MAIN:
                    raise
                failed[one.name] = str(error)
    if failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(runs)} trainings failed or their evaluations did; the others are done; run again "
            f"to go on:\n{reasons}"
        )
    return [rows[one] for one in runs]


def follow(profile_name: str, names: Sequence[str] = ()) -> None:
    """This node's part of all trainings that node 0 makes (see `nodes`), until all have a record of their settings."""
    profile = load_profile(profile_name)
    runs = {one.name: one for one in planned(profile, names)}
    judged: dict[
        tuple[str, int], bool
    ] = {}  # a record (name, time) -> whether it is of the present settings and code

    def done(name: str) -> bool:
        try:
            record = name, (paths.RUNS / profile.name / STAGE / name / "result.json").stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if record not in judged:
            loaded = load_experiment(runs[name].experiment, profile_name)
            judged[record] = finished(*loaded, runs[name].seed) is not None
        return judged[record]

    def start(name: str) -> None:
        try:
            take_part(runs[name].experiment, profile_name, runs[name].seed)
        except UserError as error:
            log.warning("%s; waiting for node 0 to go on", error)

    nodes.follow(paths.RUNS / profile.name / STAGE / ".logs", list(runs), done, start)


@contextmanager
def _trainings(
    profile: str, workers: int, steps: Mapping[Planned, int], bar: Progress, turn: AbstractContextManager
) -> Iterator[dict[Future, Planned]]:
    """All trainings on their way, the longest first; those still running at the end of the block are ended."""
    stopping, lock = threading.Event(), threading.Lock()
    pool = ThreadPoolExecutor(workers)

    def train(one: Planned) -> dict[str, Any]:
        share = Share(one.name, bar, lock)
        with turn:
            record = launch(one.experiment, profile, one.seed, share, stopping)
        share.update(steps[one] - share.done, "complete")  # one that was complete before reports no steps
        return record

    try:
        yield {pool.submit(train, one): one for one in sorted(steps, key=lambda one: -steps[one])}
    finally:
        stopping.set()
        pool.shutdown(cancel_futures=True)


class Share:
    """One training's part of a progress line that several threads write to."""

    def __init__(self, name: str, bar: Progress, lock: threading.Lock):
        self.done, self.note = 0, ""
        self._name, self._bar, self._lock = name, bar, lock

    def update(self, n: int = 1, note: str = "") -> None:
        """n more steps of this training are done."""
        self.done, self.note = self.done + n, note
        with self._lock:
            self._bar.update(n, note=f"{self._name} {note}")


def summary(one: Planned, record: dict[str, Any], prism: dict[str, Any]) -> dict[str, Any]:
    """What a table of all runs shows of one."""
    values = record["values"]
    return {
        "run": one.name,
        "steps": values["steps"],
        "images": record["n"],
        "minutes": record["wall_sec"] / 60 if record.get("wall_sec") is not None else None,
        "reward first": values["reward_first"],
        "last": values["reward_last"],
        "tokens first": values["completion_tokens_first"],
        "tokens last": values["completion_tokens_last"],
        "accuracy": prism["values"]["average"],
    }


class Evaluation:
    """Prism over the captioners of trainings; samples and readers are loaded when first needed."""

    def __init__(self, profile: Profile):
        self.profile = profile
        self._samples: list[Any] | None = None
        self._readers: dict[str, Any] = {}

    def base(self) -> list[dict[str, Any]]:
        """The captioner that training starts from, by every reader."""
        policy = self.profile.models.policy
        readers = self._readers_of(SWAPPED[0])
        return [self._evaluate(BASE_RUN, policy, role) for role in readers]

    def of(self, one: Planned) -> dict[str, Any]:
        """The captioner of a training; returns the record by the evaluation's own reader."""
        from caprl_utils.prism.evaluate import trained_captioner

        trained = trained_captioner(self.profile, one.name)
        records = [self._evaluate(one.name, trained, role) for role in self._readers_of(one.experiment)]
        return records[0]

    def _readers_of(self, experiment: str) -> Iterator[str]:
        yield "prism_reader"
        if experiment in SWAPPED and SWAPPED[1] in self.profile.ablations.experiments:
            yield "reward_reader"

    def _evaluate(self, name: str, captioner: ModelConfig, role: str) -> dict[str, Any]:
        from caprl_utils.models import open_backend
        from caprl_utils.prism.evaluate import evaluate
        from caprl_utils.prism.loading import load_samples

        if self._samples is None:
            self._samples = load_samples(self.profile)
        if role not in self._readers:
            self._readers[role] = open_backend(self.profile.models[role], self.profile)
        return evaluate(
            self.profile, prism_name(name, role), open_backend(captioner, self.profile),
            self._readers[role], self._samples, captions_run=name,
        )  # fmt: skip


def prism_name(run: str, role: str = "prism_reader") -> str:
    """Name of the Prism run of a captioner read by one of the profile's models."""
    return run if role == "prism_reader" else f"{run}-by-{role}"


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m caprl_utils.rl.ablations", description="Train and evaluate all runs of a profile."
    )
    parser.add_argument("names", nargs="*", help="experiments (default: all of the profile)")
    parser.add_argument("--profile", default="mini", help="smoke | mini | one_gpu | paper")
    parser.add_argument(
        "--table3", action="store_true", help="those of Table 3: the main one and the judges'"
    )
    parser.add_argument("--follow", action="store_true", help="on every node but the first: take part")
    arguments = parser.parse_args(argv)
    profile = load_profile(arguments.profile)
    prepare_process(profile)
    names = [*arguments.names, *(of_table_3(profile) if arguments.table3 else [])]
    if arguments.follow:
        follow(arguments.profile, names)
        return 0
    for row in run_all(arguments.profile, names):
        print("  ".join(f"{key} {_short(value)}" for key, value in row.items()))
    return 0


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
