"""All trainings behind Tables 1 and 2 and Figure 4: assemble, prepare, train, evaluate. What is stopped goes on.

On several nodes it runs once, in a Slurm job: configs/slurm/llamafactory.slurm.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.notebook import prepare_process
from caprl_utils.pretraining.data import DataSet, prepare
from caprl_utils.pretraining.llamafactory import num_steps, stage_of, train
from caprl_utils.pretraining.sets import Training, all_trainings, final_names, folder_of, model_name
from caprl_utils.prism.benchmarks import benchmarks_of_table, get_benchmark
from caprl_utils.processes import die_with_parent, require_slurm
from caprl_utils.progress import PROGRESS_ENV, Progress, SharedProgress
from caprl_utils.schema import Profile
from caprl_utils.vlm_init import assembly

Record = dict[str, Any]


def pretrain(profile: Profile, items: Sequence[str] = ()) -> dict[str, Record]:
    """Make what the items need ("table1", "table2", "figure4"; the profile's by default); evaluation name -> record."""
    trainings = all_trainings(profile.pretraining, items)
    models = assemble(profile)
    train_all(profile, trainings, prepare(profile, trainings, models), models)
    return evaluate(profile, final_names(profile.pretraining, items))


def assemble(profile: Profile) -> dict[str, Path]:
    """Name of each assembled model (`sets.model_name`) -> its folder; the seed is of the projector. Raises UserError
    when several nodes should train and this is no Slurm job, before hours of captions and data.
    """
    settings, folders = profile.pretraining, {}
    if settings.nodes > 1:
        require_slurm(settings.nodes, f"pretraining.nodes is {settings.nodes}", "configs/slurm/llamafactory.slurm")
    for setting in settings.settings:
        for seed in settings.seeds:
            name = model_name(setting, seed)
            folders[name] = paths.RUNS / profile.name / "vlm_init" / name
            assembly.assemble(setting, folders[name], seed)
    return folders


def train_all(
    profile: Profile, trainings: Sequence[Training], data: Mapping[str, DataSet], models: Mapping[str, Path]
) -> dict[str, Record]:
    """Make all trainings, each after the one that it starts from, pretraining.parallel_runs at a time and in the order
    given; returns name -> record. data, models: as `prepare` and `assemble` give them. The first that fails is raised,
    when those that run have ended.
    """
    settings = profile.pretraining
    sizes = {t.name: data[t.dataset].values["rows"] for t in trainings}
    steps = {t.name: num_steps(stage_of(settings, t.stage, t.setting), sizes[t.name]) for t in trainings}
    waiting, running, records = list(trainings), {}, {}
    with SharedProgress("pretraining steps", steps) as progress, ThreadPoolExecutor(settings.parallel_runs) as pool:

        def make(training: Training) -> Record:
            first = models[model_name(training.setting, training.seed)]
            model = folder_of(profile, training.start) / "final" if training.start else first
            tell = functools.partial(progress.at, training.name)
            record = train(profile, training, model, data[training.dataset], tell)
            tell(steps[training.name])
            return record

        while waiting or running:
            ready = [t for t in waiting if t.start is None or t.start in records]
            for training in ready[: settings.parallel_runs - len(running)]:
                waiting.remove(training)
                running[pool.submit(make, training)] = training
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                records[running.pop(future).name] = future.result()
    return records


def benchmarks_of(profile: Profile) -> list[str]:
    """Keys of the benchmarks: the profile's where all are rendered, else the twelve of Tables 1 and 2."""
    if all(get_benchmark(key).loader for key in profile.prism.benchmarks):
        return list(profile.prism.benchmarks)
    return [facts.key for facts in benchmarks_of_table(1)]


def evaluate(profile: Profile, names: Sequence[str]) -> dict[str, Record]:
    """Direct VQA of the trainings `names` in processes of their own, on a CPU pretraining.parallel_runs of them; name
    -> record, in order. The first that fails is raised, when those that run have ended.
    """
    settings, parent = profile.pretraining, os.getpid()
    workers = settings.parallel_runs if settings.gpus_per_node == 0 else 1
    with (
        Progress("evaluations", len(names)) as progress,
        TemporaryDirectory(prefix="caprl-progress-") as told,
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (profile, parent, told)) as pool,
    ):
        running = {pool.submit(_evaluate, profile, name): name for name in names}
        try:
            for future in as_completed(running):
                future.result()
                progress.update(note=running[future])
        except BrokenProcessPool:
            raise UserError(
                "the process of an evaluation was ended from outside, as happens where memory is short: "
                f"{workers} run side by side (pretraining.parallel_runs). Run it again to go on."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return {name: future.result() for future, name in running.items()}


def _begin(profile: Profile, parent: int, told: str) -> None:
    """A worker's start. told: folder for its progress, of which the parent shows only what is done."""
    die_with_parent(parent)
    os.environ[PROGRESS_ENV] = str(Path(told) / f"{os.getpid()}.json")
    prepare_process(profile)


def _evaluate(profile: Profile, name: str) -> Record:
    from caprl_utils.models.base import open_backend
    from caprl_utils.models.local import close_all
    from caprl_utils.prism.evaluate import evaluate_vqa

    final = folder_of(profile, name) / "final"
    model = profile.models.policy.model_copy(update={"path": str(final), "revision": None})
    try:
        return evaluate_vqa(profile, name, open_backend(model, profile), _samples(profile.model_dump_json()))
    finally:
        close_all()


@functools.lru_cache(maxsize=1)
def _samples(profile: str) -> Any:
    """The questions, drawn and hashed once a process. profile: as JSON."""
    from caprl_utils.prism.loading import load_samples

    loaded = Profile.model_validate_json(profile)
    return load_samples(loaded, benchmarks_of(loaded))
