"""Captions of millions of images: Ray Data reads the source, skips what is done, and feeds a pool of model actors.

Each actor captions a batch of images and writes it as one shard, under a name that follows from the batch: a batch that
Ray gives out again after a death replaces its own shard. Done is what stands in the shards, so nothing is lost or made
twice, whatever is killed and when. The driver holds some bytes an image. Uses the cluster that RAY_ADDRESS names, whose
nodes must see the folders, or starts Ray on this machine, with the GPUs of CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from caprl_utils.captions.caption import CHUNK_IMAGES, Tally, draw
from caprl_utils.captions.export import caption_files, id_hashes, read_tables
from caprl_utils.captions.job import (
    JOB_KEY,
    SCHEMA,
    Model,
    read_job,
    write_file,
)  # fmt: skip
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed, value_hash
from caprl_utils.images import BadImageError, ImageItem, is_hub, repeated
from caprl_utils.models.base import Backend, Sampling
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.processes import python_path
from caprl_utils.progress import Progress

_READ = pa.schema(
    [("number", pa.int64()), ("data", pa.large_binary())]
    + [(name, pa.string()) for name in ("id", "key", "path", "problem", "detail")]
)
_STARTS = 3  # Ray gives itself half a minute to start, which a loaded machine does not keep


def caption_shards(
    job: Mapping[str, Any], folder: str, model: Model, workers: int, batch: int, tally: Tally,
    check: Callable[[], None],
) -> Iterator[pa.Table]:  # fmt: skip
    """Caption what the shards in `folder` lack, `batch` images a shard; all captions. check: called after each."""
    hashes, done = _survey(job, tally.passed), _done(folder)
    tally.looked = tally.made = len(done)
    if hashes is None or not np.isin(hashes, done).all():
        with _ray(workers), Progress("captions", None if hashes is None else len(hashes)) as bar:
            bar.update(len(done))
            for told in _told(job, folder, model, workers, batch, hashes, done):
                bar.update(told["images"])
                tally.looked += told["images"]
                tally.made += told["made"]
                tally.bad |= told["bad"]
                tally.failed |= told["failed"]
                check()
    _drop_repeats(folder)
    return _shards(folder)


def _survey(job: Mapping[str, Any], passed: Counter[str]) -> np.ndarray | None:
    """64-bit hashes of the ids of all images, in order; None for a data set that is streamed from the hub."""
    if is_hub(job["source"]):
        return None
    return np.fromiter((derive_seed(item.id, bits=64) for item in read_job(job, passed)), np.uint64)


def _done(folder: str) -> np.ndarray:
    """Hashes of the ids that have captions. Raises UserError for a damaged shard."""
    parts = [np.unique(id_hashes(table)) for table in _shards(folder, ["image_id"])]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)


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
    hashes = [id_hashes(table, "id") for table in _shards(folder, ["id"])]
    if not hashes or len(np.unique(np.concatenate(hashes))) == sum(map(len, hashes)):
        return
    seen = np.zeros(0, np.uint64)
    for files, name in caption_files(f"{folder}/shards"):
        table = pq.read_table(name, filesystem=files)
        ids = id_hashes(table, "id")
        new = ~np.isin(ids, seen)
        seen = np.concatenate([seen, ids])
        if not new.all():
            _write_shard(files.unstrip_protocol(name), table.filter(pa.array(new)))


def _write_shard(url: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
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
    quiet = {"log_to_driver": False, "include_dashboard": False, "logging_level": logging.ERROR}
    for attempt in range(_STARTS):
        try:
            ray.init(**quiet, **slots, runtime_env={"env_vars": variables})
            break
        except Exception as error:  # Ray raises many kinds, bare Exception among them
            ray.shutdown()
            if attempt == _STARTS - 1:
                raise UserError(
                    f"Ray could not be started or reached ({error}). On a loaded machine run again later; for a "
                    "cluster check RAY_ADDRESS."
                ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _told(
    job: Mapping[str, Any], folder: str, model: Model, workers: int, batch: int, hashes: np.ndarray | None,
    done: np.ndarray,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """What the actors say of each batch: see `_Actor._caption`. Raises UserError when one gives up."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    parts, again = 1, frozenset()
    if hashes is not None:
        parts, first = workers, np.unique(hashes, return_index=True)[1]
        again = frozenset(np.setdiff1d(np.arange(len(hashes)), first).tolist())
    read = partial(_read, job=dict(job), parts=parts, skip=ray.put((done, again)))
    # readers and the steps between need a slot too, so an actor must not take a whole one
    slot = {"num_gpus": model.gpus} if ray.cluster_resources().get("GPU") else {"num_cpus": 0.5}
    pool = ActorPoolStrategy(
        size=workers, enable_true_multi_threading=True, max_concurrent_calls_per_actor=2,
        max_tasks_in_flight_per_actor=4,
    )  # fmt: skip
    rows = (
        ray.data.range(parts, override_num_blocks=parts)
        .map_batches(read, batch_size=1, num_cpus=0.1)
        .repartition(target_num_rows_per_block=batch)
        .map_batches(
            _Actor, batch_size=None, batch_format="pyarrow", compute=pool,
            fn_constructor_args=(dict(job), folder, model, len(done) > 0), **slot,
        )
    )  # fmt: skip
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        for told in map(json.loads, table["told"].to_pylist()):
            if "error" in told:
                raise UserError(told["error"])
            yield told


def _read(
    batch: Mapping[str, np.ndarray], job: Mapping[str, Any], parts: int, skip: Any
) -> Iterator[pa.Table]:
    """The images of one part of the source that are not done, with their bytes, a chunk in memory at a time."""
    import ray

    (done, again), rows = ray.get(skip), []
    for number, item in enumerate(read_job(job)):
        if number // CHUNK_IMAGES % parts != int(batch["id"][0]):
            continue
        if number in again:
            item = repeated(item)
        elif _is_in(done, derive_seed(item.id, bits=64)):
            continue
        row = {"number": number, "id": item.id, "key": item.key, "path": item.path}
        try:
            row["data"] = item.encoded()
        except BadImageError as error:
            row |= {"problem": error.reason, "detail": error.detail}
        rows.append(row)
        if len(rows) == CHUNK_IMAGES:
            yield pa.Table.from_pylist(rows, _READ)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, _READ)


def _is_in(ordered: np.ndarray, value: int) -> bool:
    place = np.searchsorted(ordered, np.uint64(value))
    return bool(place < len(ordered) and ordered[place] == np.uint64(value))


def _load(row: Mapping[str, Any]) -> bytes:
    if row["problem"]:
        raise BadImageError(row["problem"], row["detail"])
    return row["data"]


class _Actor:
    """One model, and the batches that it is given. proven: earlier batches were captioned well."""

    def __init__(self, job: Mapping[str, Any], folder: str, model: Model, proven: bool) -> None:
        self.job, self.folder, self.model, self.made = job, folder, model, int(proven)
        self.silent: dict[str, str] = {}  # images about which nothing was said, of earlier batches
        self.stack, self.lock = ExitStack(), Lock()  # a server of its own ends with this process

    @cached_property
    def idle(self) -> SimpleQueue[Backend]:
        """Captioners that have nothing to do: one, or two of a server, which is asked about two batches at once."""
        backend = self.model.open(self.stack)
        queue: SimpleQueue[Backend] = SimpleQueue()
        queue.put(backend)
        if isinstance(backend, EndpointBackend):
            queue.put(EndpointBackend(backend.config))
        return queue

    def __call__(self, table: pa.Table) -> pa.Table:
        """Caption a batch, write its shard, and tell of it; of an exception Ray would keep no more than its text."""
        try:
            told = self._caption(table.to_pylist())
        except UserError as error:
            told = {"error": str(error)}
        return pa.table({"told": [json.dumps(told)]})

    def _caption(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """How many images were seen, and which have no caption, and why. Images with some of theirs are made again."""
        with self.lock:
            idle = self.idle
        sampling, backend = Sampling(**self.job["sampling"]), idle.get()
        tally = Tally(self.made, failed=dict(self.silent))
        items = [(r["number"], ImageItem(r["id"], partial(_load, r), r["key"], path=r["path"])) for r in rows]
        try:
            pixels = self.job["max_pixels"]
            captions = list(draw(items, lambda: backend, sampling, self.job["prompt"], tally, pixels))
        finally:
            idle.put(backend)
        tally.failed = {name: why for name, why in tally.failed.items() if name not in self.silent}
        self.made += len(captions)
        if not self.made:
            self.silent |= tally.failed
        for name, found in Counter(c.image_id for c in captions).items():
            if found < sampling.n:
                tally.failed.setdefault(name, f"the captioner gave {found} captions of {sampling.n}")
        numbers = {r["id"]: r["number"] for r in rows}
        whole = [c.model_dump() for c in captions if c.image_id not in tally.failed]
        if whole:
            whole.sort(key=lambda c: (numbers[c["image_id"]], c["index"]))
            table = pa.Table.from_pylist(whole, SCHEMA.with_metadata({JOB_KEY: json.dumps(self.job)}))
            name = f"{rows[0]['number']:09d}-{value_hash([r['id'] for r in rows])}.parquet"
            _write_shard(f"{self.folder}/shards/{name}", table)
        return {"images": len(rows), "made": len(whole), "bad": tally.bad, "failed": tally.failed}
