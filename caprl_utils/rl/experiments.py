"""The trainings of a profile: which there are, each as a process of its own, and all in one loop with their evaluation.

A run that several tables share is trained once; complete ones are read back, a stopped one goes on. A training tells
its progress by a file, its steps by curve.jsonl, its end by result.json; SIGTERM makes it save and stop. The captioner
of every run, and the one that training starts from, is evaluated on the same samples by the same reader, so that tables
can compare them image by image. `ablations.parallel_runs` run side by side, while this process evaluates.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

from caprl_utils import paths, processes, prompts, warm
from caprl_utils.config import load_experiment, load_profile, names_of, read_yaml
from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.hashing import file_hash
from caprl_utils.models.base import model_hash
from caprl_utils.models.local import close_all
from caprl_utils.progress import PROGRESS_ENV, SharedProgress, read_state
from caprl_utils.rl.data import data_file
from caprl_utils.rl.rewards import TERMS, roles_of
from caprl_utils.runs import Run, load_result
from caprl_utils.schema import RL, Experiment, ModelConfig, Profile

STAGE = "rl"
MAIN = "caprl"
BASE_RUN = "base-3b"  # Prism run of the captioner that training starts from, as notebook 04 names it
SWAPPED = ("short", "other_reader")  # also read by the reward's reader: the swap of readers
RECIPE = [
    "caprl_utils.rl.rewards", "caprl_utils.rl.readers", "caprl_utils.rl.grpo", "caprl_utils.rl.policy",
    "caprl_utils.rl.data", "caprl_utils.rl.packed", "caprl_utils.models.local", "caprl_utils.answers",
]  # fmt: skip
"""The modules that compute a training's weights and curve; prompts and settings are in the key by their values."""
GPU_MICRO_BATCH = 4
"""Ours: captions of 1-2k tokens per forward and backward of a 3B model on 80 GB, with gradient checkpointing."""
log = logging.getLogger(__name__)
_WARM = ("caprl_utils.rl.train:leave_out_vllm", "caprl_utils.rl.grpo", "caprl_utils.rl.monitor")
_POLL_SEC, _GRACE_SEC = 0.5, 600.0  # the second: to end a step and save


# Which there are


class Planned(NamedTuple):
    """One training."""

    experiment: str
    seed: int

    @property
    def name(self) -> str:
        return run_name(self.experiment, self.seed)


def run_name(experiment: str, seed: int | str) -> str:
    """Name of a training's run folder and of its Prism run; the seed may be a placeholder."""
    return f"{experiment}-seed{seed}"


def prism_name(run: str, role: str = "prism_reader") -> str:
    """Name of the Prism run of a captioner that one of the profile's models reads."""
    return run if role == "prism_reader" else f"{run}-by-{role}"


def planned(profile: Profile, names: Sequence[str] = ()) -> list[Planned]:
    """The trainings of a profile, or those of the experiments named. Raises UserError for an unknown name."""
    known = names_of(Experiment)
    for name in names:
        if name not in known:
            hint = f"{did_you_mean(name, known)}; known: {', '.join(known)} (configs/experiments)"
            raise UserError(f"no experiment {name!r}{hint}")
    order = dict.fromkeys([MAIN, *profile.ablations.experiments, *names])
    chosen = [name for name in order if not names or name in names]
    return [Planned(name, seed) for name in chosen for seed in seeds_of(profile, name)]


def seeds_of(profile: Profile, experiment: str) -> list[int]:
    """Seeds of an experiment's trainings: rl.seeds for the main one, else ablations.seeds."""
    return profile.rl.seeds if experiment == MAIN else profile.ablations.seeds


def of_table_3(profile: Profile) -> list[str]:
    """The experiments of Table 3 that the profile has."""
    return [MAIN, *(name for name in ("judge_vlm", "judge_unified") if name in profile.ablations.experiments)]


def listing(profile_name: str) -> str:
    """The experiments of a profile, each with what it is, what it is for and the seeds of its trainings."""
    profile, lines = load_profile(profile_name), []
    for name in dict.fromkeys(one.experiment for one in planned(profile)):
        experiment, seeds = load_experiment(name, profile_name)[0], ", ".join(map(str, seeds_of(profile, name)))
        lines.append(f"{name:14} {experiment.description} [{experiment.item}; seeds {seeds}]")
    return "\n".join(lines)


def identity(experiment: Experiment, profile: Profile, seed: int) -> tuple[Any, ...]:
    """What `Run.open` and `Run.find` take for a training; its key covers settings, data, models, prompts and code."""
    named, roles = profile.models.named(), ("policy", *roles_of(experiment.reward).values())
    if missing := [role for role in roles if role not in named]:
        told = f"experiment {experiment.name} asks models.{missing[0]}, which profile {profile.name} goes without"
        raise UserError(f"{told}; name one: --set models.{missing[0]}.path=FOLDER_OR_HUB_ID")
    models = {role: named[role] for role in roles}
    asked = prompts.reward_question("caption", "question", [prompts.CANNOT_ANSWER], profile.prompts)
    said = {name: TERMS[name].prompts for name in experiment.reward.terms}
    parts = {
        "rl": {name: value for name, value in profile.rl.key_part().items() if name != "seeds"},
        **{name: getattr(experiment, name).key_part() for name in ("data", "reward", "training")},
        "seed": seed, "prompts": [prompts.CAPTION, asked, said],
        "questions": file_hash(data_file(profile, experiment.data)),
        **{role: [model.key_part(), model_hash(model)] for role, model in models.items()},
    }  # fmt: skip
    return profile, STAGE, run_name(experiment.name, seed), parts, RECIPE


# All of them


def run_all(profile_name: str, names: Sequence[str] = (), twice: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train and evaluate what is not there yet; one row per run in the order of `planned`. A training that fails does
    not hold up the others, but for the main one. Raises UserError at the end, naming those that failed and why.
    Interrupted, it ends all trainings, each after saving. twice: experiments that both readers read, as those of the
    swap of readers.
    """
    from caprl_utils.prism.evaluate import trained_captioner

    profile = load_profile(profile_name)
    runs, workers = planned(profile, names), profile.ablations.parallel_runs
    # a mistake in the last of them shows before the first starts
    steps = {one: load_experiment(one.experiment, profile_name)[1].rl.steps for one in runs}
    require_tracker(profile.rl)
    _tell_other_images(profile)
    swap = SWAPPED if SWAPPED[1] in (*profile.ablations.experiments, *names) else ()
    evaluate = _evaluator(profile, {*twice, *swap})
    # models that train and models that caption do not fit on one GPU together
    turn = threading.Lock() if workers == 1 and processes.visible_gpus() else nullcontext()
    rows, failed, stopping = {}, [], threading.Event()
    totals = {one.name: steps[one] for one in runs}
    with SharedProgress("training steps", totals) as bar, ThreadPoolExecutor(workers) as pool:

        def train(one: Planned) -> dict[str, Any]:
            with turn:
                record = launch(one.experiment, profile_name, one.seed, partial(bar.at, one.name), stopping)
            bar.at(one.name, steps[one], "complete")  # one that was complete before reports no steps
            return record

        try:
            trainings = {pool.submit(train, one): one for one in sorted(runs, key=lambda one: -steps[one])}
            with turn:
                evaluate(BASE_RUN, profile.models.policy, SWAPPED[0])
            for training in as_completed(trainings):
                one = trainings[training]
                try:
                    record = training.result()
                    with turn:
                        prism = evaluate(one.name, trained_captioner(profile, one.name), one.experiment)
                    rows[one] = _summary(one, record, prism)
                except UserError as error:
                    if one.experiment == MAIN:
                        raise
                    failed.append(f"\n  {one.name}: {error}")
        finally:
            stopping.set()
            pool.shutdown(cancel_futures=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} trainings failed or their evaluations did; the others are done; run again "
            f"to go on:{''.join(failed)}"
        )
    return [rows[one] for one in runs]


def _tell_other_images(profile: Profile) -> None:
    """Say so where the questions were made on other images than the profile names now; other people's say nothing."""
    made = paths.RUNS / profile.name / "curation" / "main" / "config.json"
    images = json.loads(made.read_text(encoding="utf-8"))["images"] if made.is_file() else {}
    if images.get("source", profile.images.source) != profile.images.source:
        told = f"the questions are about images of {images['source']}, the profile names {profile.images.source}"
        log.warning("%s; `caprl curate` makes new ones", told)


def _summary(one: Planned, record: dict[str, Any], prism: dict[str, Any]) -> dict[str, Any]:
    values = record["values"]
    return {
        "run": one.name, "steps": values["steps"], "images": record["n"], "minutes": record["wall_sec"] / 60,
        "reward first": values["reward_first"], "last": values["reward_last"],
        "tokens first": values["completion_tokens_first"], "tokens last": values["completion_tokens_last"],
        "accuracy": prism["values"]["average"],
    }  # fmt: skip


def _evaluator(profile: Profile, twice: Collection[str]) -> Callable[[str, ModelConfig, str], dict[str, Any]]:
    """Call with run, captioner and experiment: its record by the evaluation's own reader. Those of `twice` are read by
    the reward's as well. Samples and readers are loaded once, when first needed.
    """
    from caprl_utils.models.base import open_backend
    from caprl_utils.prism.evaluate import evaluate
    from caprl_utils.prism.loading import load_samples

    samples = cache(lambda: load_samples(profile))
    reader = cache(lambda role: open_backend(profile.models[role], profile))

    def of(run: str, captioner: ModelConfig, experiment: str) -> dict[str, Any]:
        model, roles = open_backend(captioner, profile), ["prism_reader", "reward_reader"][: 1 + (experiment in twice)]
        records = [evaluate(profile, prism_name(run, role), model, reader(role), samples(), run) for role in roles]
        return records[0]

    return of


# One, as a process: how it lies on GPUs and nodes, how it is started and watched


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
    bar. stopping: ends the training when set; it has ten minutes to save (several processes: what their launcher
    grants, some 30 s; else they go on from the last checkpoint). Raises UserError for a layout that does not fit the
    GPUs, and with the log's last lines when the training fails or was ended.
    """
    loaded, resolved = load_experiment(experiment, profile)
    name, rl, training = run_name(loaded.name, seed), resolved.rl, loaded.training
    if (record := Run.find(*identity(loaded, resolved, seed))) is not None:
        return record  # a process takes ten seconds to say so
    gpus = len(processes.visible_gpus())
    _, count = layout(training.accelerate_config, gpus)
    batch_layout(rl.prompts_per_step, rl.group_size, training.micro_batch_size, count, gpus > 0)
    if gpus:
        close_all()
    folder = paths.RUNS / resolved.name / STAGE / name
    log, state = (folder.parent / ".logs" / f"{name}.{end}" for end in ("log", "progress.json"))
    state.unlink(missing_ok=True)
    words = command(experiment, profile, seed, gpus, training.accelerate_config)
    env, own = {"PYTHONPATH": processes.python_path()}, {PROGRESS_ENV: str(state)}
    if gpus or training.accelerate_config or training.rollout != "transformers":
        process = processes.popen(words, log, env=env | own)
    else:
        python, _, module, *words = words
        process = warm.popen(python, _WARM, f"{module}:run", words, log, env, own)
    running, last, stopping = True, None, stopping or threading.Event()
    try:
        with nullcontext() if tell else SharedProgress("train", {name: rl.steps}) as bar:
            while running:
                running = process.poll() is None and not stopping.wait(_POLL_SEC)
                if (now := read_state(state)) and now != last:
                    last = now
                    (tell or partial(bar.at, name))(now["done"], now["note"])
    finally:
        processes.stop(process, _GRACE_SEC)
    if process.returncode:
        raise UserError(
            f"the training {name} ended with status {process.returncode}; the end of {paths.shown(log)}:\n"
            f"{processes.tail(log)}\nRun it again to go on from its last checkpoint."
        )
    return load_result(folder)


def layout(accelerate_config: str | None, num_gpus: int) -> tuple[int, int]:
    """(nodes, processes) that train together: one per visible GPU, or those of a config for several nodes."""
    config = read_yaml(paths.CONFIGS / "accelerate" / accelerate_config) if accelerate_config else {}
    nodes = config.get("num_machines", 1)
    return nodes, config["num_processes"] if nodes > 1 else max(1, num_gpus)


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


def command(experiment: str, profile: str, seed: int, num_gpus: int, accelerate_config: str | None) -> list[str]:
    """The command line of a training: plain Python, or `accelerate launch` with several GPUs or a config of it. With
    one for several nodes Slurm's srun starts it on each. Raises UserError outside of such a job.
    """
    module = ["caprl_utils.rl.train", "--experiment", experiment, "--profile", profile, "--seed", str(seed)]
    if num_gpus <= 1 and accelerate_config is None:
        return [sys.executable, "-m", *module]
    nodes, count = layout(accelerate_config, num_gpus)
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    how = ["--config_file", str(paths.CONFIGS / "accelerate" / accelerate_config)] if accelerate_config else []
    if nodes == 1:
        return [*start, *how, "--num_processes", str(count), "--module", *module]
    asked = f"configs/accelerate/{accelerate_config} is for {nodes} nodes"
    processes.require_slurm(nodes, asked, "configs/slurm/grpo.slurm")
    # what only a task of srun knows
    node = "--machine_rank $SLURM_NODEID --main_process_ip $MASTER_ADDR --main_process_port $MASTER_PORT"
    each = [f'exec "$@" {node} {shlex.join([*how, "--module", *module])}', "bash", *start]
    return ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "bash", "-c", *each]
