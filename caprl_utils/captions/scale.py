"""Captions of millions of images: Ray Data reads the source, skips what is done, and feeds a pool of model actors.

Each actor captions a batch of images and writes it as one shard, under a name that follows from the batch: a batch that
Ray gives out again after a death replaces its own shard. Done is what stands in the shards, so nothing is lost or made
twice, whatever is killed and when. The driver holds 16 bytes an image. Uses the cluster that RAY_ADDRESS names, whose
nodes must see the folders, or starts Ray on this machine, with the GPUs of CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from caprl_utils.captions.caption import (
    CHUNK_IMAGES,
    JOB_KEY,
    SAME_ID,
    SCHEMA,
    CaptionSet,
    Tally,
    count,
    draw,
    opened,
    refuse_many,
    write_parquet,
)  # fmt: skip
from caprl_utils.captions.export import caption_files, id_hashes, read_tables
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.hashing import derive_seed, value_hash
from caprl_utils.images import BadImageError, ImageItem, is_hub, read_source
from caprl_utils.models.base import Backend, Sampling
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.processes import python_path
from caprl_utils.progress import Progress
from caprl_utils.schema import ModelConfig

_READ = pa.schema([("number", pa.int64()), ("data", pa.large_binary()), *((name, pa.string()) for name in (
    "id", "key", "path", "problem", "detail"))])  # fmt: skip


def caption_with_workers(
    job: Mapping[str, Any],
    folder: str,
    out: str,
    workers: int,
    max_bad_share: float,
    batch: int,
    **model: Any,
) -> CaptionSet:
    """Caption what the shards in `folder` lack. batch: images of a shard. model: see `_Captioner`."""
    hashes, done, tally = _survey(job), _done(folder), Tally()
    if hashes is None or not np.isin(hashes, done).all():
        with _ray(workers), Progress("captions", None if hashes is None else len(hashes)) as bar:
            bar.update(len(done))
            for told in _told(job, folder, workers, batch, hashes, done, model):
                bar.update(told["images"])
                tally.bad |= told["bad"]
                tally.failed |= told["failed"]
                refuse_many(tally.bad, max(bar.done, CHUNK_IMAGES), max_bad_share)
            looked = bar.done
    else:
        looked = len(hashes)
    if not looked:
        raise UserError(f"no image in {job['source']!r}")
    result = _gather(job, folder, out, tally)
    refuse_many(tally.bad, looked, max_bad_share)
    return result


def _items(job: Mapping[str, Any]) -> Iterator[tuple[int, ImageItem]]:
    return enumerate(islice(read_source(job["source"], job["kinds"]), job["limit"]))


def _survey(job: Mapping[str, Any]) -> np.ndarray | None:
    """64-bit hashes of the ids of all images, in order; None for a data set that is streamed from the hub."""
    if is_hub(job["source"]):
        return None
    return np.fromiter((derive_seed(item.id, bits=64) for _, item in _items(job)), np.uint64)


def _done(folder: str) -> np.ndarray:
    """Hashes of the ids that have captions. Raises UserError for a damaged shard."""
    parts = [id_hashes(table) for table in _shards(folder, ["image_id"])]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)


def _shards(folder: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    try:
        caption_files(f"{folder}/shards")
    except UserError:
        return iter(())  # none yet
    return read_tables(f"{folder}/shards", columns)


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
    slots = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(os.cpu_count() or 1, workers + 1)}
    environment = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        ray.init(
            log_to_driver=False,
            include_dashboard=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": environment},
            **slots,
        )
    except Exception as error:  # Ray raises many kinds, bare Exception among them
        raise UserError(
            f"Ray could not be started or reached ({error}). It gives itself half a minute, which a loaded machine "
            "does not keep: run again; for a cluster check RAY_ADDRESS."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _told(
    job: Mapping[str, Any], folder: str, workers: int, batch: int, hashes: np.ndarray | None, done: np.ndarray,
    model: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """What the actors say of each batch: see `_Captioner.__call__`. Raises UserError when one gives up."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    _, first = np.unique(hashes, return_index=True) if hashes is not None else (None, np.zeros(0, int))
    again = np.setdiff1d(np.arange(0 if hashes is None else len(hashes)), first)
    parts = 1 if hashes is None else workers
    skip = ray.put((done, again))
    in_the_cluster = {"num_gpus": model["gpus"]} if ray.cluster_resources().get("GPU") else {"num_cpus": 0.5}
    rows = (
        ray.data.range(parts, override_num_blocks=parts)
        .map_batches(partial(_read, job=dict(job), parts=parts, skip=skip), batch_size=1, num_cpus=0.1)
        .repartition(target_num_rows_per_block=batch)
        .map_batches(
            _Captioner, batch_size=None, batch_format="pyarrow", fn_constructor_args=(dict(job), folder),
            fn_constructor_kwargs={**model, "proven": len(done) > 0},
            compute=ActorPoolStrategy(
                size=workers, max_tasks_in_flight_per_actor=4, max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,  # a server is asked about the next batch while one ends
            ),
            **in_the_cluster,
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

    done, again = ray.get(skip)
    repeated, rows = set(again.tolist()), []
    for number, item in _items(job):
        if number // CHUNK_IMAGES % parts != int(batch["id"][0]):
            continue
        row = {"number": number, "id": item.id, "key": item.key, "path": item.path}
        if number in repeated:
            row |= {"id": f"{item.id} ({item.key})", "problem": SAME_ID}
        elif _is_in(done, derive_seed(item.id, bits=64)):
            continue
        else:
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


class _Captioner:
    """An actor: one model, and the batches that it is given. proven: earlier batches were captioned well."""

    def __init__(
        self, job: Mapping[str, Any], folder: str, captioner: Backend | ModelConfig | str, engine: str | None,
        gpus: int, proven: bool,
    ) -> None:  # fmt: skip
        self.job, self.folder, self.made, self.error = job, folder, int(proven), None
        self.stack = ExitStack()  # a server of its own ends with this process
        self.idle: SimpleQueue[Backend] = SimpleQueue()
        try:
            backend = self.stack.enter_context(opened(captioner, engine, gpus))
            self.idle.put(backend)
            if isinstance(backend, EndpointBackend):  # a server is asked about two batches at once
                self.idle.put(EndpointBackend(backend.config))
        except UserError as error:
            self.error = str(error)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Caption a batch, write its shard, and tell how many images were seen and which have no caption, and why.

        What a user can mend is told too: of an exception Ray keeps no more than its text.
        """
        told: dict[str, Any] = {"error": self.error}
        if self.error is None:
            try:
                told = self._caption(table.to_pylist())
            except UserError as error:
                told = {"error": str(error)}
        return pa.table({"told": [json.dumps(told)]})

    def _caption(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        tally, sampling = Tally(self.made), Sampling(**self.job["sampling"])
        items = [(r["number"], ImageItem(r["id"], partial(_load, r), r["key"], path=r["path"])) for r in rows]
        backend = self.idle.get()
        try:
            captions = list(draw(items, backend, sampling, self.job["prompt"], tally))
        finally:
            self.idle.put(backend)
        self.made += len(captions)
        for name, found in Counter(c.image_id for c in captions).items():
            if found < sampling.n:
                tally.failed.setdefault(name, f"the captioner gave {found} captions of {sampling.n}")
        numbers = {r["id"]: r["number"] for r in rows}
        whole = [c.model_dump() for c in captions if c.image_id not in tally.failed]
        whole.sort(key=lambda c: (numbers[c["image_id"]], c["index"]))
        if whole:
            self._write(f"{rows[0]['number']:09d}-{value_hash([r['id'] for r in rows])}.parquet", whole)
        return {"images": len(rows), "bad": tally.bad, "failed": tally.failed}

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """A shard appears when it is whole: by its renaming here, by the end of the upload in a store."""
        buffer = io.BytesIO()
        table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({JOB_KEY: json.dumps(self.job)}))
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        files, root = fsspec.core.url_to_fs(f"{self.folder}/shards")
        if "file" in files.protocol:
            write_atomic(Path(root) / name, buffer.getvalue())
        else:
            files.pipe_file(f"{root}/{name}", buffer.getvalue())


def _load(row: Mapping[str, Any]) -> bytes:
    if row["problem"]:
        raise BadImageError(row["problem"], row["detail"])
    return row["data"]


def _gather(job: Mapping[str, Any], folder: str, out: str, tally: Tally) -> CaptionSet:
    """Count the shards and, for a NAME.parquet, write them into it, some thousand rows at a time."""
    totals, schema = Counter[str](), SCHEMA.with_metadata({JOB_KEY: json.dumps(job)})
    tables = (count(table, totals) for table in _shards(folder))
    if out.endswith(".parquet"):
        write_parquet(Path(out), tables, schema)
    else:
        deque(tables, maxlen=0)
    return CaptionSet.of(out, totals, tally, folder)
