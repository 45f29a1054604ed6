"""Captions of millions of images: Ray Data gives the numbers of those that are not done to a pool of model actors.

An actor reads its images itself and writes each batch as a shard under a name that follows from the batch: one that Ray
gives out again after a death replaces its own. Done is what stands in the shards, whatever is killed and when. The
driver holds some 50 bytes an image. RAY_ADDRESS names a cluster, whose nodes must see the folders.
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

from caprl_utils.captions.caption import CHUNK_IMAGES, Tally, draw
from caprl_utils.captions.export import caption_files, id_hashes, read_tables
from caprl_utils.captions.job import JOB_KEY, SCHEMA, read_job, write_file
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed, value_hash
from caprl_utils.image_sources import is_hub, repeated
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
    hashes, done = None, _done(folder)
    if not is_hub(job["source"]):  # which is streamed, and not counted before
        ids = (derive_seed(item.id, bits=64) for item in read_job(job, tally.passed))
        hashes = np.fromiter(ids, np.uint64)
    tally.looked = tally.made = len(done)
    if hashes is None or not np.isin(hashes, done).all():
        with _ray(workers), Progress("captions", None if hashes is None else len(hashes)) as bar:
            bar.update(len(done))
            actor = dict(job), folder, opener, len(done) > 0, batch
            for told in _told(actor, _units(hashes, done, batch, workers), workers, gpus):
                bar.update(told["images"])
                tally.looked += told["images"]
                tally.made += told["made"]
                tally.bad |= told["bad"]
                tally.failed |= told["failed"]
                check()
    _drop_repeats(folder)
    return _shards(folder)


def _done(folder: str) -> np.ndarray:
    """Hashes of the ids that have captions. Raises UserError for a damaged shard."""
    return np.unique(id_hashes(_shards(folder, ["image_id"])))


def _shards(folder: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    try:
        caption_files(f"{folder}/shards")
    except UserError:
        return iter(())  # none yet
    return read_tables(f"{folder}/shards", columns)


def _drop_repeats(folder: str) -> None:
    """Take out rows that stand twice: a worker may outlive a killed driver for a moment, and write after the next one
    has looked at what is done.
    """
    hashes = id_hashes(_shards(folder, ["id"]), "id")
    if len(np.unique(hashes)) == len(hashes):
        return
    seen = np.zeros(0, np.uint64)
    for files, name in caption_files(f"{folder}/shards"):
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
    """Ray for as long as the block lasts, unless it runs already."""
    try:
        import ray
    except ImportError:
        raise UserError("--workers needs Ray, which is not installed: `pip install ray`") from None
    if ray.is_initialized():
        yield
        return
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


def _told(actor: tuple, units: list[dict[str, Any]], workers: int, gpus: int) -> Iterator[dict[str, Any]]:
    """What the actors say of each batch: see `_Actor._caption`. Raises UserError when one gives up."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = context.enable_auto_log_stats = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    slot = {"num_gpus": gpus} if ray.cluster_resources().get("GPU") else {"num_cpus": 0.5}
    pool = ActorPoolStrategy(
        size=workers, enable_true_multi_threading=True, max_concurrent_calls_per_actor=2,
        max_tasks_in_flight_per_actor=2,
    )  # fmt: skip
    rows = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        _Actor, batch_size=None, batch_format="pyarrow", compute=pool, **slot,
        fn_constructor_args=actor,
    )  # fmt: skip
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        for told in map(json.loads, table["told"].to_pylist()):
            if "error" in told:
                raise UserError(told["error"])
            yield told


def _units(hashes: np.ndarray | None, done: np.ndarray, batch: int, workers: int) -> list[dict[str, Any]]:
    """What an actor gets at a time: numbers of images (again: those whose id an earlier one has), or, of a source that
    cannot be counted, every `of`-th chunk.
    """
    if hashes is None:
        return [{"numbers": [], "again": [], "part": part, "of": workers} for part in range(workers)]
    again = np.setdiff1d(np.arange(len(hashes)), np.unique(hashes, return_index=True)[1])
    todo = np.union1d(np.flatnonzero(~np.isin(hashes, done)), again)
    cuts = np.split(todo, range(batch, len(todo), batch))
    return [{"numbers": cut.tolist(), "again": np.intersect1d(cut, again).tolist(), "part": 0, "of": 1} for cut in cuts]


class _Actor:
    """One model, and the batches that it is given. proven: earlier batches were captioned well."""

    def __init__(
        self, job: Mapping[str, Any], folder: str, opener: Callable[[ExitStack], Backend], proven: bool, batch: int
    ) -> None:
        self.job, self.folder, self.opener, self.batch, self.made = job, folder, opener, batch, int(proven)
        self.silent: dict[str, str] = {}  # images about which nothing was said, of earlier batches
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
        """Caption units, write their shards, and tell of each; of an exception Ray would keep no more than its text."""
        try:
            for unit in table.to_pylist():
                for items in [self._numbered(**unit)] if unit["numbers"] else self._chunks(**unit):
                    yield pa.table({"told": [json.dumps(self._caption(items))]})
        except UserError as error:
            yield pa.table({"told": [json.dumps({"error": str(error)})]})

    def _numbered(self, numbers: list[int], again: list[int], **_: int) -> list[tuple[int, ImageItem]]:
        """The images of a unit; the source is read on from where the last one ended."""
        found = []
        with self.lock:
            for number in numbers:
                if number < self.place or self.place == 0:
                    self.place, self.source = 0, read_job(self.job)
                item = next(islice(self.source, number - self.place, None))
                self.place = number + 1
                found.append((number, repeated(item) if number in again else item))
        return found

    def _chunks(self, part: int, of: int, **_: list[int]) -> Iterator[list[tuple[int, ImageItem]]]:
        done = set(_done(self.folder).tolist())
        mine = (
            (number, item)
            for number, item in enumerate(read_job(self.job))
            if number // CHUNK_IMAGES % of == part and derive_seed(item.id, bits=64) not in done
        )
        while found := list(islice(mine, self.batch)):
            yield found

    def _caption(self, items: list[tuple[int, ImageItem]]) -> dict[str, Any]:
        """How many images were seen, and which have no caption, and why. Images with some of theirs are made again."""
        with self.lock:
            idle = self.idle
        sampling, backend = Sampling(**self.job["sampling"]), idle.get()
        tally = Tally(self.made, failed=dict(self.silent))
        try:
            prompt, pixels = self.job["prompt"], self.job["max_pixels"]
            captions = list(draw(items, lambda: backend, sampling, prompt, tally, pixels))
        finally:
            idle.put(backend)
        tally.failed = {name: why for name, why in tally.failed.items() if name not in self.silent}
        self.made += len(captions)
        if not self.made:
            self.silent |= tally.failed
        for name, found in Counter(c.image_id for c in captions).items():
            if found < sampling.n:
                tally.failed.setdefault(name, f"the captioner gave {found} captions of {sampling.n}")
        numbers = {item.id: number for number, item in items}
        whole = [c.model_dump() for c in captions if c.image_id not in tally.failed]
        if whole:
            whole.sort(key=lambda c: (numbers[c["image_id"]], c["index"]))
            table = pa.Table.from_pylist(whole, SCHEMA.with_metadata({JOB_KEY: json.dumps(self.job)}))
            name = f"{items[0][0]:09d}-{value_hash(list(numbers))}.parquet"
            _write_shard(f"{self.folder}/shards/{name}", table)
        return {"images": len(items), "made": len(whole), "bad": tally.bad, "failed": tally.failed}
