"""Direct VQA of the trained models: which benchmarks, and several models side by side on a CPU."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.notebook import prepare_process
from caprl_utils.pretraining.stages import folder_of
from caprl_utils.prism.benchmarks import benchmarks_of_table, get_benchmark
from caprl_utils.processes import die_with_parent
from caprl_utils.progress import PROGRESS_ENV, Progress
from caprl_utils.schema import Profile


def benchmarks_of(profile: Profile) -> list[str]:
    """Keys of the benchmarks: the profile's where all are rendered, else the twelve of Tables 1 and 2."""
    if all(get_benchmark(key).loader for key in profile.prism.benchmarks):
        return list(profile.prism.benchmarks)
    return [facts.key for facts in benchmarks_of_table(1)]


def evaluate(profile: Profile, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Direct VQA of the trainings `names`; returns name -> record, in their order.

    On a CPU as many side by side as pretraining.parallel_runs says, each in a process of its own. A stopped
    evaluation goes on where it was.
    """
    settings = profile.pretraining
    workers = min(settings.parallel_runs, len(names)) if settings.gpus_per_node == 0 else 1
    records = {}
    with Progress("evaluations", len(names)) as progress:
        for name, record in (
            _side_by_side(profile, names, workers) if workers > 1 else _in_turn(profile, names)
        ):
            records[name] = record
            progress.update(note=name)
    return {name: records[name] for name in names}


def _in_turn(profile: Profile, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        yield name, evaluate_one(profile, name)


def _side_by_side(
    profile: Profile, names: Sequence[str], workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """As each ends. The first that fails is raised, after those that run have come to their end.

    Raises UserError when a process was ended from outside.
    """
    spawn = multiprocessing.get_context("spawn")
    with (
        TemporaryDirectory(prefix="caprl-progress-") as told,
        ProcessPoolExecutor(workers, spawn, _begin, (profile, os.getpid(), told)) as pool,
    ):
        running = {pool.submit(evaluate_one, profile, name): name for name in names}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                f"the process of an evaluation was ended from outside, as happens where memory is short: {workers} run "
                "side by side (pretraining.parallel_runs). Run it again to go on."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(profile: Profile, parent: int, told: str) -> None:
    """A worker's start. told: folder for its progress, of which the parent shows only what is done."""
    die_with_parent(parent)
    os.environ[PROGRESS_ENV] = str(Path(told) / f"{os.getpid()}.json")
    prepare_process(profile)


def evaluate_one(profile: Profile, name: str) -> dict[str, Any]:
    """Direct VQA of one training's model; returns the record."""
    from caprl_utils.models import open_backend
    from caprl_utils.prism.evaluate import evaluate_vqa

    final = folder_of(profile, name) / "final"
    model = profile.models.policy.model_copy(update={"path": str(final), "revision": None})
    return evaluate_vqa(profile, name, open_backend(model, profile), _samples(profile.model_dump_json()))


@functools.lru_cache(maxsize=1)
def _samples(profile: str) -> Any:
    """The questions, drawn and hashed once a process. profile: as JSON."""
    from caprl_utils.prism.loading import load_samples

    loaded = Profile.model_validate_json(profile)
    return load_samples(loaded, benchmarks_of(loaded))
