"""Captions of millions of images: Ray Data gives the numbers of those not done to a pool of actors, each with a model.

An actor reads its images itself and writes each batch as a shard under a name that follows from the batch: one that is
given out again after a death replaces its own. Done is what stands in the shards, whatever is killed and when. Driver
and actors hold some 150 bytes an image. RAY_ADDRESS names a cluster, whose nodes must see the folders.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import islice
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from caprl_utils.captions.caption import Tally, draw
from caprl_utils.captions.export import caption_files, id_hashes, read_tables
from caprl_utils.captions.job import JOB_KEY, SCHEMA, read_job, write_file
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed, value_hash
from caprl_utils.image_sources import unique
from caprl_utils.images import ImageItem
from caprl_utils.models.base import Backend, Sampling
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.processes import python_path
from caprl_utils.progress import Progress

_STARTS = 3  # Ray gives itself half a minute to start, which a loaded machine does not keep
_SETTINGS = {  # reports that nobody reads here cost time; and actors are nice by 15, so that any other work goes first
    "RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0", "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}  # fmt: skip


def caption_shards(
    job: Mapping[str, Any], folder: str, opener: Callable[[ExitStack], Backend], gpus: int, workers: int, batch: int,
    tally: Tally, check: Callable[[], None],
) -> Iterator[pa.Table]:  # fmt: skip
    """Caption what the shards in `folder` lack, `batch` images a shard; all captions. check: called after each."""
    done = np.unique(id_hashes(_shards(folder, ["image_id"])))
    ids = (derive_seed(item.id, bits=64) for item in unique(read_job(job, tally.passed)))
    hashes = np.fromiter(ids, np.uint64)
    todo = np.flatnonzero(~np.isin(hashes, done))
    tally.looked = tally.made = len(done)
    if len(todo):
        with _ray(workers), Progress("captions", len(hashes)) as bar:
            bar.update(len(done))
            units = np.split(todo, range(batch, len(todo), batch))
            for told in _told((dict(job), folder, opener, len(done) > 0), units, workers, gpus):
                bar.update(told["images"])
                tally.looked += told["images"]
                tally.made += told["made"]
                tally.bad |= told["bad"]
                tally.failed |= told["failed"]
                check()
    _drop_repeats(folder)
    return _shards(folder)


def _told(actor: tuple, units: list[np.ndarray], workers: int, gpus: int) -> Iterator[dict[str, Any]]:
    """What the actors say of each batch: see `_Actor._caption`. Raises UserError when one gives up."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = context.enable_auto_log_stats = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    slot = {"num_gpus": gpus} if ray.cluster_resources().get("GPU") else {"num_cpus": 0.5}
    pool = ActorPoolStrategy(  # an actor reads and writes a batch while it captions another
        size=workers, enable_true_multi_threading=True, max_concurrent_calls_per_actor=2,
        max_tasks_in_flight_per_actor=2,
    )  # fmt: skip
    items = [{"numbers": unit.tolist()} for unit in units]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Actor, batch_size=None, batch_format="pyarrow", compute=pool, fn_constructor_args=actor, **slot
    )
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        for told in map(json.loads, table["told"].to_pylist()):
            if "error" in told:
                raise UserError(told["error"])
            yield told


def _shards(folder: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Tables of the shards, of which there may be none yet. Raises UserError for a damaged one."""
    try:
        caption_files(f"{folder}/shards")
    except UserError:
        return iter(())
    return read_tables(f"{folder}/shards", columns)


def _drop_repeats(folder: str) -> None:
    """Take out rows that stand twice: a worker may outlive a killed driver for a moment, and write after the next one
    has looked at what is done.
    """
    hashes, seen = id_hashes(_shards(folder, ["id"]), "id"), np.zeros(0, np.uint64)
    for files, name in caption_files(f"{folder}/shards") if len(np.unique(hashes)) < len(hashes) else ():
        table = pq.read_table(name, filesystem=files)
        ids = id_hashes([table], "id")
        new = ~np.isin(ids, seen)
        seen = np.concatenate([seen, ids])
        if not new.all():
            _write_shard(files.unstrip_protocol(name), table.filter(pa.array(new)))


def _write_shard(url: str, table: pa.Table) -> None:
    pq.write_table(table, buffer := io.BytesIO(), compression="zstd", write_page_checksum=True)
    write_file(url, buffer.getvalue())


@contextmanager
def _ray(workers: int) -> Iterator[None]:
    """Ray for as long as the block lasts."""
    try:
        import ray
    except ImportError:
        raise UserError("--workers needs Ray, which is not installed: `pip install ray`") from None
    slots = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(os.cpu_count() or 1, workers)}
    variables = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    os.environ.update(_SETTINGS)
    quiet = {"log_to_driver": False, "include_dashboard": False, "logging_level": logging.ERROR}
    for attempt in range(_STARTS):
        try:
            ray.init(**quiet, **slots, runtime_env={"env_vars": variables})
            break
        except Exception as error:  # Ray raises many kinds, bare Exception among them
            ray.shutdown()
            if attempt == _STARTS - 1:
                told = f"Ray could not be started or reached ({error}). On a loaded machine run again later;"
                raise UserError(f"{told} for a cluster check RAY_ADDRESS.") from error
    try:
        yield
    finally:
        ray.shutdown()


class _Actor:
    """One model, and the images that it is given. proven: earlier ones were captioned well."""

    def __init__(
        self, job: Mapping[str, Any], folder: str, opener: Callable[[ExitStack], Backend], proven: bool
    ) -> None:
        self.job, self.folder, self.opener, self.made = job, folder, opener, int(proven)
        self.stack, self.lock = ExitStack(), Lock()  # a server of its own ends with this process
        self.place, self.source = 0, iter(())

    @cached_property
    def idle(self) -> SimpleQueue[Backend]:
        """Captioners that have nothing to do: one, or two of a server, which is asked about two batches at once."""
        queue, backend = SimpleQueue(), self.opener(self.stack)
        queue.put(backend)
        if isinstance(backend, EndpointBackend):
            queue.put(EndpointBackend(backend.config))
        return queue

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Caption batches, write their shards, tell of each; of an exception Ray would keep no more than its text."""
        try:
            for numbers in table["numbers"].to_pylist():
                yield pa.table({"told": [json.dumps(self._caption(numbers))]})
        except UserError as error:
            yield pa.table({"told": [json.dumps({"error": str(error)})]})

    def _read(self, numbers: list[int]) -> list[tuple[int, ImageItem]]:
        """The images of these numbers; the source is read on from where the last ones ended."""
        found = []
        for number in numbers:
            if number < self.place or self.place == 0:
                self.place, self.source = 0, unique(read_job(self.job))
            found.append((number, next(islice(self.source, number - self.place, None))))
            self.place = number + 1
        return found

    def _caption(self, numbers: list[int]) -> dict[str, Any]:
        """How many images were seen, and which have no caption, and why. Images with some of theirs are made again."""
        with self.lock:
            items, idle = self._read(numbers), self.idle
        backend, tally, sampling = idle.get(), Tally(self.made), Sampling(**self.job["sampling"])
        try:
            captions = list(draw(items, lambda: backend, sampling, self.job["prompt"], tally, self.job["max_pixels"]))
        finally:
            idle.put(backend)
        self.made += len(captions)
        for name, found in Counter(c.image_id for c in captions).items():
            if found < sampling.n:
                tally.failed.setdefault(name, f"the captioner gave {found} captions of {sampling.n}")
        places = {item.id: number for number, item in items}
        whole = [c.model_dump() for c in captions if c.image_id not in tally.failed]
        if whole:
            whole.sort(key=lambda c: (places[c["image_id"]], c["index"]))
            table = pa.Table.from_pylist(whole, SCHEMA.with_metadata({JOB_KEY: json.dumps(self.job)}))
            name = f"{numbers[0]:09d}-{value_hash(list(places))}.parquet"
            _write_shard(f"{self.folder}/shards/{name}", table)
        return {"images": len(items), "made": len(whole), "bad": tally.bad, "failed": tally.failed}
