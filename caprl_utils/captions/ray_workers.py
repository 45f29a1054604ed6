"""Workers as Ray actors: each loads the model once and takes shards of the manifest, on any node of a cluster.

The actors are plain ones (`ray.remote` on a class), not those of a Ray Data pipeline: the manifest already hands
out the work, keeps what is done on disk and takes over from the dead, so no rows pass through Ray. Plain `ray` is
enough (`ray[llm]` brings a vLLM of its own). The nodes must see the job's folder and the images under the same
paths. While the actors work the driver only counts finished shards; the check of the images before that holds
some bytes an image (`check`, and the names of one folder at a time).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.captions.engines import follow, worker_environment, worker_on
from caprl_utils.captions.manifest import Manifest
from caprl_utils.errors import UserError
from caprl_utils.processes import python_path
from caprl_utils.provenance import gpu_names


def run_actors(folder: Path, workers: int) -> None:
    """Run `workers` actors, one GPU each where the cluster has some, else one core each.

    Uses the cluster that RAY_ADDRESS names, or starts Ray on this machine. Raises UserError when Ray is not
    installed or cannot be started, and when all workers failed.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _start(ray)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        needs = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        remote = ray.remote(max_restarts=0, **needs)(CaptionActor)
        actors = [remote.remote(str(folder.absolute())) for _ in range(workers)]
        running = [actor.work.remote() for actor in actors]
        follow(Manifest(folder), lambda: ray.wait(running, num_returns=len(running), timeout=0)[1])
        _check(ray, running, folder)
    finally:
        if ours:
            ray.shutdown()


def _start(ray: Any) -> None:
    try:
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": _environment()})
    except Exception as error:  # Ray raises many kinds, bare Exception among them
        raise UserError(
            f"Ray could not be started or reached ({error}). On a loaded machine set "
            "RAY_raylet_start_wait_time_s=300; for a cluster check RAY_ADDRESS."
        ) from error


class CaptionActor:
    """One worker with its model, for as long as the job has shards."""

    def __init__(self, folder: str) -> None:
        """folder: of the job, as every node sees it."""
        self._worker = worker_on(Path(folder))

    def work(self) -> None:
        """Take shards until all are finished."""
        self._worker.run()


def _environment() -> dict[str, str]:
    share = {} if gpu_names() else worker_environment(0, [])  # Ray itself hands out the GPUs
    return {"PYTHONPATH": python_path()} | share


def _check(ray: Any, running: list[Any], folder: Path) -> None:
    """Ask the workers for their errors when shards are left; a few failures only left more to the others."""
    manifest = Manifest(folder)
    if len(manifest.finished()) == manifest.num_shards:
        return
    try:
        ray.get(running)
    except ray.exceptions.RayError as error:
        raise UserError(f"all Ray workers ended before the captions were finished: {error}") from None
    raise UserError(f"the Ray workers ended, but shards of {paths.shown(folder)} are left; run again")


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError(
            "Ray is not installed: `pip install ray` in this environment (plain ray, not ray[llm], which pins "
            "another vLLM), or use --runner processes on each machine; they share the same --out."
        ) from None
    return ray
