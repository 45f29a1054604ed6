"""What a worker captions with, and how several workers are started."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import paths, processes
from caprl_utils.captions.manifest import Manifest
from caprl_utils.errors import UserError
from caprl_utils.models.base import Backend
from caprl_utils.progress import Progress
from caprl_utils.provenance import gpu_names

if TYPE_CHECKING:
    from caprl_utils.captions.job import Job
    from caprl_utils.captions.work import Worker

_POLL_SEC = 0.5


def open_engine(job: Job) -> Backend:
    """The backend that a job names; weights are loaded at the first request."""
    if job.engine == "vllm":
        from caprl_utils.captions.vllm_offline import VllmBackend

        return VllmBackend(job.model)
    if job.engine == "endpoint":
        from caprl_utils.models.endpoint import EndpointBackend

        return EndpointBackend(job.model)
    from caprl_utils.models.local import LocalBackend

    return LocalBackend(job.model)


def work_in(folder: Path) -> None:
    """One worker on the job of a folder, to its end: what each process runs."""
    worker_on(folder).run()


def worker_on(folder: Path) -> Worker:
    """A worker on the job of a folder, with a model of its own."""
    from caprl_utils.captions.job import Job, read_job
    from caprl_utils.captions.work import Worker

    job = Job(**read_job(folder)["job"])
    return Worker(Manifest(folder), job.task(), open_engine(job))


def run_workers(folder: Path, workers: int, runner: str) -> None:
    """Run `workers` workers on the job of `folder` until all shards are finished, with a progress line.

    runner: "processes" on this machine, "ray" on a cluster. Raises UserError when all workers have failed, with
    the end of the first one's log; the failure of some only leaves more to the others.
    """
    if runner == "ray":
        from caprl_utils.captions.ray_workers import run_actors

        run_actors(folder, workers)
    else:
        _run_processes(folder, workers)


def visible_gpus() -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them; where it is not set, all of the machine.

    A scheduler sets it on a shared machine, so workers take theirs from it. As CUDA has it, an empty list is no
    GPU, and what stands behind a number below 0 does not count.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(number) for number in range(len(gpu_names()))]
    names = [name.strip() for name in given.split(",")]
    return list(takewhile(lambda name: name and not name.startswith("-"), names))


def worker_environment(number: int, gpus: Sequence[str]) -> dict[str, str]:
    """Variables of worker `number`: one of `gpus` where there are some, or its share of the cores."""
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def follow(manifest: Manifest, alive: Any) -> None:
    """Show finished images until all shards are finished or `alive()` says that no worker is left."""
    sizes = manifest.shard_sizes
    with Progress("captions", sum(sizes)) as progress:
        while True:
            working, finished = alive(), manifest.finished()
            progress.update(sum(sizes[shard] for shard in finished) - progress.done)
            if len(finished) == len(sizes) or not working:
                return
            time.sleep(_POLL_SEC)


def _run_processes(folder: Path, workers: int) -> None:
    logs = [folder / "logs" / f"worker-{number}.log" for number in range(workers)]
    for log in logs:
        log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "caprl_utils.captions.worker", str(folder)]
    gpus = visible_gpus()
    started = []
    manifest = Manifest(folder)
    try:
        for number, log in enumerate(logs):
            env = worker_environment(number, gpus) | {"PYTHONPATH": processes.python_path()}
            started.append(processes.popen(command, log, env))
        follow(manifest, lambda: any(process.poll() is None for process in started))
        _wait(started)
    finally:
        for process in started:
            processes.stop(process)
    if len(manifest.finished()) < manifest.num_shards:
        raise UserError(
            f"all {workers} workers ended before the captions were finished; the end of "
            f"{paths.shown(logs[0])}:\n{processes.tail(logs[0])}"
        )


def _wait(started: list[Any]) -> None:
    """Let workers end by themselves; they do once all shards are finished."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(process.poll() is None for process in started):
        time.sleep(0.05)
