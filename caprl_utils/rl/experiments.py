"""The trainings of a profile: which there are, where each lies, and all of them in one loop with their evaluation.

A run that several tables share is trained once; complete ones are read back, a stopped one goes on. The captioner of
every run, and the one that training starts from, is evaluated on the same samples by the same reader, so that tables
can compare them image by image. `ablations.parallel_runs` trainings run side by side, the longest first, while this
process evaluates those that have ended.

A training is a process of its own (`rl.train`). It tells its progress by a file, its steps by curve.jsonl, its end by
result.json; SIGTERM makes it save and stop.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from caprl_utils import paths, processes, prompts
from caprl_utils.config import load_experiment, load_profile, read_yaml
from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.hashing import file_hash
from caprl_utils.models.weights import model_hash
from caprl_utils.progress import PROGRESS_ENV, Progress
from caprl_utils.provenance import gpu_names
from caprl_utils.rl.data import data_file
from caprl_utils.runs import Run, load_result
from caprl_utils.schema import Experiment, ModelConfig, Profile

STAGE = "rl"
MAIN = "caprl"
BASE_RUN = "base-3b"  # Prism run of the captioner that training starts from, as notebook 05 names it
TABLE_3 = (MAIN, "judge_vlm", "judge_unified")
SWAPPED = ("short", "other_reader")  # also read by the reward's reader: the swap of readers
RECIPE = [
    "caprl_utils.rl.rewards", "caprl_utils.rl.judges", "caprl_utils.rl.readers", "caprl_utils.rl.grpo",
    "caprl_utils.rl.policy", "caprl_utils.rl.data", "caprl_utils.models.local", "caprl_utils.models.decoding",
    "caprl_utils.answers",
]  # fmt: skip
"""The modules that compute a training's weights and curve; prompts and settings are in the key by their values."""
_PROMPTS = [
    prompts.CAPTION, prompts.ANSWER_PREFILL, prompts.read_question("caption", "question", [prompts.CANNOT_ANSWER]),
    prompts.SCORE_PREFILL, prompts.RATE, prompts.UNIFIED,
]  # fmt: skip
_POLL_SEC, _LEAST_GRACE_SEC = 0.5, 10.0


class Planned(NamedTuple):
    """One training."""

    experiment: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder, and of its Prism run."""
        return run_name(self.experiment, self.seed)


def run_name(experiment: str, seed: int | str) -> str:
    """Name of a run's folder; the seed may be a placeholder."""
    return f"{experiment}-seed{seed}"


def prism_name(run: str, role: str = "prism_reader") -> str:
    """Name of the Prism run of a captioner read by one of the profile's models."""
    return run if role == "prism_reader" else f"{run}-by-{role}"


def planned(profile: Profile, names: Sequence[str] = ()) -> list[Planned]:
    """The trainings of a profile in their order, or those of the experiments named.

    Raises UserError for a name that is none of the profile's.
    """
    known = [MAIN, *profile.ablations.experiments]
    if wrong := [name for name in names if name not in known]:
        raise UserError(
            f"experiment {wrong[0]!r} is none of profile {profile.name}{did_you_mean(wrong[0], known)} "
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


def listing(profile_name: str) -> str:
    """The experiments of a profile, each with what it is, what it is for and the seeds of its trainings."""
    profile, lines = load_profile(profile_name), []
    for name in dict.fromkeys(one.experiment for one in planned(profile)):
        experiment, _ = load_experiment(name, profile_name)
        seeds = ", ".join(map(str, seeds_of(profile, name)))
        lines.append(f"{name:14} {experiment.description} [{experiment.item}; seeds {seeds}]")
    return "\n".join(lines)


def identity(
    experiment: Experiment, profile: Profile, seed: int
) -> tuple[Profile, str, str, dict, list[str]]:
    """What `Run.open` and `Run.find` take for a training; its key covers settings, data, models, prompts and code."""
    settings = {name: getattr(experiment, name).key_part() for name in ("data", "reward", "training")}
    models = {"policy": profile.models.policy, "scorer": profile.models[experiment.reward.role]}
    shared = {name: value for name, value in profile.rl.key_part().items() if name != "seeds"}
    parts = {
        "rl": shared, **settings, "seed": seed, "prompts": _PROMPTS,
        "questions": file_hash(data_file(profile, experiment.data)),
        **{part: [model.key_part(), model_hash(model)] for part, model in models.items()},
    }  # fmt: skip
    return profile, STAGE, run_name(experiment.name, seed), parts, RECIPE


def launch(
    experiment: str, profile: str, seed: int = 0,
    bar: Share | None = None, stopping: threading.Event | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make a training run, or return the record of a complete one. Its log is runs/<profile>/rl/.logs/<run>.log.

    bar: where progress is shown, by default a bar of its own. stopping: ends the training when set; it has the time of
    three steps to save (several processes: what their launcher grants, some 30 s; else they go on from the last
    checkpoint). Raises UserError with the log's last lines when it fails or was ended.
    """
    stopping = stopping or threading.Event()
    loaded, resolved = load_experiment(experiment, profile)
    name = run_name(loaded.name, seed)
    if (record := Run.find(*identity(loaded, resolved, seed))) is not None:
        return record  # a process takes ten seconds to say so
    folder = paths.RUNS / resolved.name / STAGE / name
    log, state = (folder.parent / ".logs" / f"{name}.{end}" for end in ("log", "progress.json"))
    state.unlink(missing_ok=True)
    words = command(experiment, profile, seed, len(gpu_names()), loaded.training.accelerate_config)
    env = {PROGRESS_ENV: str(state), "PYTHONPATH": processes.python_path()}
    process = processes.popen(words, log, env=env)
    try:
        with nullcontext(bar) if bar else Progress(f"train {name}", total=resolved.rl.steps) as shown:
            while process.poll() is None and not stopping.wait(_POLL_SEC):
                _mirror(state, shown)
            _mirror(state, shown)
    finally:
        processes.stop(process, _grace_sec(folder))
    if process.returncode:
        raise UserError(
            f"the training {name} ended with status {process.returncode}; the end of {paths.shown(log)}:\n"
            f"{processes.tail(log)}\nRun it again to go on from its last checkpoint."
        )
    return load_result(folder)


def command(
    experiment: str, profile: str, seed: int, num_gpus: int, accelerate_config: str | None
) -> list[str]:
    """The command line of a training: plain Python, or `accelerate launch` with several GPUs or a config of it.

    With a config for several nodes Slurm's srun starts it on each. Raises UserError outside of such a job.
    """
    module = ["caprl_utils.rl.train", "--experiment", experiment, "--profile", profile, "--seed", str(seed)]
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    if num_gpus <= 1 and accelerate_config is None:
        return [sys.executable, "-m", *module]
    if accelerate_config is None:
        return [*start, "--num_processes", str(num_gpus), "--module", *module]
    file = paths.CONFIGS / "accelerate" / accelerate_config
    count, how = read_yaml(file)["num_machines"], ["--config_file", str(file), "--module", *module]
    if count == 1:
        return [*start, *how]
    found = os.environ.get("SLURM_JOB_NUM_NODES", "none")
    if found != str(count) or "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"{paths.shown(file)} is for {count} nodes: srun starts the training on each, so this has to run in a "
            f"Slurm job of {count} nodes (here: {found}) with MASTER_ADDR and MASTER_PORT set; "
            "configs/slurm/grpo.slurm does so"
        )
    # what only a task of srun knows
    node = "--machine_rank $SLURM_NODEID --main_process_ip $MASTER_ADDR --main_process_port $MASTER_PORT"
    each = [f'exec "$@" {node} {shlex.join(how)}', "bash", *start]
    return ["srun", f"--nodes={count}", "--ntasks-per-node=1", "bash", "-c", *each]


def _grace_sec(folder: Path) -> float:
    """How long a training may take to end its step and save."""
    try:
        last = json.loads((folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        return _LEAST_GRACE_SEC + 3 * (last["seconds"] or 0)
    except (OSError, ValueError, IndexError, KeyError):  # no step yet: nothing to save
        return _LEAST_GRACE_SEC


def _mirror(state: Path, bar: Progress | Share) -> None:
    """Show what the training wrote to its progress file."""
    try:
        now = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not started yet
        return
    if now["done"] != bar.done or now["note"] != bar.note:
        bar.update(now["done"] - bar.done, note=now["note"])


def run_all(profile_name: str, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train and evaluate what is not there yet; one row per run in the order of `planned`.

    A training that fails does not hold up the others, but for the main one. Raises UserError at the end, naming those
    that failed and why. Interrupted, it ends all trainings, each after saving.
    """
    from caprl_utils.prism.evaluate import trained_captioner

    profile = load_profile(profile_name)
    runs = planned(profile, names)
    # a mistake in the last of them shows before the first starts
    steps = {one: load_experiment(one.experiment, profile_name)[1].rl.steps for one in runs}
    evaluate = _evaluator(profile)
    workers = profile.ablations.parallel_runs
    # models that train and models that caption do not fit on one GPU together
    turn = threading.Lock() if workers == 1 and gpu_names() else nullcontext()
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

    def update(self, count: int, note: str) -> None:
        """`count` more steps of this training are done."""
        self.done, self.note = self.done + count, note
        with self._lock:
            self._bar.update(count, note=f"{self._name} {note}")


def _summary(one: Planned, record: dict[str, Any], prism: dict[str, Any]) -> dict[str, Any]:
    """What a table of all runs shows of one."""
    values = record["values"]
    return {
        "run": one.name, "steps": values["steps"], "images": record["n"], "minutes": record["wall_sec"] / 60,
        "reward first": values["reward_first"], "last": values["reward_last"],
        "tokens first": values["completion_tokens_first"], "tokens last": values["completion_tokens_last"],
        "accuracy": prism["values"]["average"],
    }  # fmt: skip


def _evaluator(profile: Profile) -> Callable[[str, ModelConfig, str], dict[str, Any]]:
    """Call with run, captioner and experiment: its record by the evaluation's own reader.

    Those of the swap are read by the reward's as well. Samples and readers are loaded once, when first needed.
    """
    from caprl_utils.models.base import open_backend
    from caprl_utils.prism.evaluate import evaluate
    from caprl_utils.prism.loading import load_samples

    samples = cache(lambda: load_samples(profile))
    reader = cache(lambda role: open_backend(profile.models[role], profile))
    swap = SWAPPED[1] in profile.ablations.experiments

    def of(run: str, captioner: ModelConfig, experiment: str) -> dict[str, Any]:
        roles = ("prism_reader", "reward_reader") if swap and experiment in SWAPPED else ("prism_reader",)
        records = [
            evaluate(
                profile, prism_name(run, role), open_backend(captioner, profile), reader(role), samples(),
                captions_run=run,
            )
            for role in roles
        ]  # fmt: skip
        return records[0]

    return of
