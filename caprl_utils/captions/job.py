"""Caption a whole source into parquet, in this process or, with workers, under Ray (`scale`).

    result = caption_source("images/", "captions.parquet", "zoo:vlm-3b", Sampling(max_tokens=256))

Beside NAME.parquet stands NAME.parquet.work with the job's record and the rows so far; with workers the shards.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from caprl_utils import prompts
from caprl_utils.captions.caption import CHUNK_IMAGES, Tally, caption_id, missing
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error, write_atomic
from caprl_utils.images import BadImageError, ImageItem, count_images, fingerprint, in_threads, read_source
from caprl_utils.models.base import Backend, Sampling
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.models.weights import model_hash
from caprl_utils.paths import shown
from caprl_utils.progress import Progress
from caprl_utils.provenance import gpu_names
from caprl_utils.runs import Lock, RowStore
from caprl_utils.schema import ModelConfig

SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("image_id", pa.string()), ("image_key", pa.string()), ("index", pa.int32()),
        ("caption", pa.string()), ("num_tokens", pa.int32()), ("finish_reason", pa.string()),
        ("looped", pa.bool_()), ("seed", pa.int64()), ("model", pa.string()), ("model_hash", pa.string()),
        ("prompt_hash", pa.string()),
    ]
)  # fmt: skip
JOB_KEY = b"caption_job"  # in a file's metadata: what made it
SAME_ID = "id used by an earlier image"
MAX_BAD_SHARE = 0.2  # ours: more unusable images than this are a mistake somewhere, not chance
Captioner = Backend | ModelConfig | str  # a path is zoo:NAME, a folder or a hub id


@dataclass(frozen=True)
class Model:
    """What captions, and what runs it; see `caption_source`."""

    captioner: Captioner
    engine: str | None
    gpus: int

    def open(self, stack: ExitStack) -> Backend:
        """The captioner; a vLLM server of its own runs until the stack is left."""
        from caprl_utils.models.local import LocalBackend
        from caprl_utils.models.server import Options, serve

        model = ModelConfig(path=self.captioner) if isinstance(self.captioner, str) else self.captioner
        if not isinstance(model, ModelConfig):
            return model
        if model.base_urls:
            return EndpointBackend(model)
        if self.engine == "vllm" or (self.engine is None and gpu_names() and find_spec("vllm")):
            return EndpointBackend(stack.enter_context(serve(model, options=Options(gpus=self.gpus))).config)
        return LocalBackend(model)


@dataclass(frozen=True)
class CaptionSet:
    """What was made. file: the parquet file, or the folder of shards. bad, failed: see `caption.Tally`."""

    file: str
    images: int
    captions: int
    tokens: int
    cut: int
    looped: int
    bad: dict[str, str]
    failed: dict[str, str]

    def lines(self) -> list[str]:
        """For people."""
        told = [
            f"{self.captions} captions of {self.images} images, {self.tokens} tokens; "
            f"cut {self.cut}, loops {self.looped}"
        ]
        told += set_aside(self.bad)
        if self.failed:
            name, reason = next(iter(self.failed.items()))
            told.append(
                f"not captioned: {len(self.failed)}, e.g. {name}: {reason}; run again to try them again"
            )
        return told


def set_aside(bad: Mapping[str, str]) -> list[str]:
    """How many images cannot be used, by reason, for people."""
    kinds = Counter(re.sub(r" \(.*", "", reason, flags=re.DOTALL) for reason in bad.values())
    return [f"set aside: {count} {reason}" for reason, count in sorted(kinds.items())]


def make_job(
    source: str | Path, captioner: Captioner, sampling: Sampling, prompt: str = prompts.CAPTION,
    kinds: Sequence[str] | None = None, limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All that changes a set's captions, as JSON values; where the model runs does not."""
    captioner = ModelConfig(path=captioner) if isinstance(captioner, str) else captioner
    own = isinstance(captioner, ModelConfig)
    here = Path(source).expanduser()
    return {
        "source": str(here.resolve()) if here.exists() else str(source), "kinds": list(kinds) if kinds else None,
        "limit": limit, "model": captioner.path if own else captioner.name,
        "model_hash": model_hash(captioner) if own else captioner.model_hash,
        "sampling": asdict(sampling), "prompt": prompt,
    }  # fmt: skip


def caption_source(
    source: str | Path, out: str | Path, captioner: Captioner, sampling: Sampling, *, prompt: str = prompts.CAPTION,
    kinds: Sequence[str] | None = None, limit: int | None = None, max_bad_share: float = MAX_BAD_SHARE,
    engine: str | None = None, workers: int = 0, gpus: int = 1, shard_images: int = 256,
) -> CaptionSet:  # fmt: skip
    """Caption all images of a source (see `images.read_source`), or what is left of them; returns the counts.

    out: NAME.parquet; with workers also a folder of shards, local or remote. kinds, limit: only images of these kinds,
    only the first. max_bad_share: of images that cannot be used. engine: "vllm" or "transformers" runs a model that has
    no server; vLLM by default where there is a GPU and vLLM. workers: 0 works in this process; more are Ray actors
    with a model each, that write shards of `shard_images` images. gpus: that share a model.

    The columns are those of `caption.Caption`. Images without a caption are tried again by the next call. Raises
    UserError for a source that is missing, unusable or has changed, for a result inside the source's folder, for a
    file or folder that holds something else, and when the captioner answers nothing.
    """
    job = make_job(source, captioner, sampling, prompt, kinds, limit)
    folder = _open_folder(job, str(out), shards=workers > 0)
    with ExitStack() as stack:
        if "://" not in folder:
            lock = Lock(Path(folder) / ".lock", shown(folder))
            lock.acquire()
            stack.callback(lock.release)
        model = Model(captioner, engine, gpus)
        if workers:
            from caprl_utils.captions.scale import caption_shards

            result, looked = caption_shards(
                job, folder, str(out), model, workers, shard_images, max_bad_share
            )
        else:
            result, looked = _caption_here(job, Path(folder), Path(out), model, max_bad_share)
    write_file(f"{folder}/result.json", json.dumps(asdict(result), indent=2, ensure_ascii=False).encode())
    if not looked:
        raise UserError(f"no image in {job['source']!r}")
    refuse_many(result.bad, looked, max_bad_share)
    return result


def _caption_here(
    job: Mapping[str, Any], folder: Path, out: Path, model: Model, max_bad_share: float
) -> tuple[CaptionSet, int]:
    """The result, and how many images there are."""
    tally, order, sampling = Tally(), [], Sampling(**job["sampling"])
    total = job["limit"] or count_images(job["source"], job["kinds"])
    with (
        RowStore(folder / "captions.jsonl") as store,
        ExitStack() as stack,
        Progress("captions", total) as bar,
    ):
        opener = partial(model.open, stack)
        for row in missing(_numbered(job, tally, order), store, opener, sampling, job["prompt"], tally):
            store.append(row)
            bar.update(len(order) - bar.done)
            refuse_many(tally.bad, max(len(order), CHUNK_IMAGES), max_bad_share)
        rows = {row["id"]: row for row in store.read()}
    ids = (caption_id(name, index) for name in order for index in range(sampling.n))
    schema = SCHEMA.with_metadata({JOB_KEY: json.dumps(job)})
    table = pa.Table.from_pylist([rows[i] for i in ids if i in rows], schema)
    return gather([table], str(out), schema, tally), len(order)


def _numbered(job: Mapping[str, Any], tally: Tally, order: list[str]) -> Iterator[tuple[int, ImageItem]]:
    """The images of a job by their place; ids go to `order`, those that came before to `tally`."""
    seen: set[str] = set()
    for number, item in enumerate(islice(read_source(job["source"], job["kinds"]), job["limit"])):
        order.append(item.id)
        if item.id in seen:
            tally.bad[f"{order.pop()} ({item.key})"] = SAME_ID
            continue
        seen.add(item.id)
        yield number, item


def refuse_many(bad: Mapping[str, str], images: int, max_share: float) -> None:
    """Raise UserError when more than a share of the images that were looked at cannot be used."""
    if len(bad) > max_share * images:
        name, reason = next(iter(bad.items()))
        raise UserError(
            f"{len(bad)} images of the first {images} cannot be used; first: {name}: {reason}. What was captioned is "
            f"kept. Mend the source, or allow more than {max_share:.0%} (--max-bad-share)."
        )


def check_source(source: str, kinds: Sequence[str] | None, limit: int | None) -> list[str]:
    """Open every image and say what is wrong with the source, for people; nothing is written."""

    def problem(numbered: tuple[int, ImageItem]) -> tuple[str, str] | None:
        try:
            return numbered[1].open() and None
        except BadImageError as error:
            return numbered[1].id, str(error)

    tally = Tally()
    found = list(
        in_threads(problem, _numbered({"source": source, "kinds": kinds, "limit": limit}, tally, []))
    )
    bad = dict(filter(None, found)) | tally.bad
    return [f"{len(found) + len(tally.bad)} images, {found.count(None)} good", *set_aside(bad)]


# Files


def gather(tables: Iterable[pa.Table], out: str, schema: pa.Schema, tally: Tally) -> CaptionSet:
    """Count captions and, where `out` is a NAME.parquet, write them into it, a table in memory at a time."""
    totals = Counter[str]()
    counted = (_count(table, totals) for table in tables)
    if out.endswith(".parquet"):
        write_parquet(Path(out), counted, schema)
    else:
        sum(1 for _ in counted)
    numbers = (totals[name] for name in ("images", "captions", "tokens", "cut", "looped"))
    return CaptionSet(out, *numbers, tally.bad, tally.failed)


def _count(table: pa.Table, totals: Counter[str]) -> pa.Table:
    for row in table.select(["index", "num_tokens", "finish_reason", "looped"]).to_pylist():
        totals["captions"] += 1
        totals["images"] += row["index"] == 0
        totals["tokens"] += row["num_tokens"]
        totals["cut"] += row["finish_reason"] == "length"
        totals["looped"] += row["looped"]
    return table


def write_parquet(file: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables one after the other as one file, which appears when it is whole; returns the rows."""
    temporary, rows = file.with_name(f".{file.name}.tmp"), 0
    with full_disk_as_user_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in tables:
                writer.write_table(table.cast(schema))
                rows += table.num_rows
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
    return rows


def write_file(url: str, data: bytes) -> None:
    """Write a file that appears when it is whole: by its renaming here, by the end of the upload in a store."""
    files, path = fsspec.core.url_to_fs(url)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    if "file" in files.protocol:
        write_atomic(Path(path), data)
    else:
        files.pipe_file(path, data)


def _open_folder(job: Mapping[str, Any], out: str, shards: bool) -> str:
    """The folder that a job works in, with its record; one of the same job is continued."""
    single, remote = out.endswith(".parquet"), "://" in out
    if single if remote else not (single or shards):
        raise UserError(
            f"--out {out}: a NAME.parquet here, or with --workers a folder of shards, here or in a store"
        )
    folder = f"{out}.work" if single else out.rstrip("/")
    home, source = Path(job["source"]), job["source"]
    if not remote and home.is_dir() and Path(folder).resolve().is_relative_to(home):
        raise UserError(
            f"the result {shown(folder)} would stand inside the image folder {shown(home)} and be taken for a part of "
            "it; name a place outside (--out)"
        )
    now = {"job": dict(job), "shards": shards, "source": fingerprint(source)}
    files, root = fsspec.core.url_to_fs(folder)
    names = {name.rpartition("/")[2] for name in files.ls(root, detail=False)} if files.isdir(root) else set()
    if names & {"captions.jsonl", "shards"} and "job.json" in names:
        _check_same(json.loads(files.cat_file(f"{root}/job.json")), now, folder)
        return folder
    if other := sorted(name for name in names - {"job.json", "result.json", ".lock"} if name):
        raise UserError(
            f"{folder} is no captioning job and not empty ({other[0]} is there); take another name"
        )
    if (
        single
        and Path(out).exists()
        and (pq.read_schema(out).metadata or {}).get(JOB_KEY) != json.dumps(job).encode()
    ):
        raise UserError(f"{shown(out)} exists and was made otherwise; take another name, or delete it")
    write_file(f"{folder}/job.json", json.dumps(now, indent=2, ensure_ascii=False).encode())
    return folder


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: str) -> None:
    old, new = before["job"] | {"workers": before["shards"]}, now["job"] | {"workers": now["shards"]}
    if changed := [
        f"{name}: {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name]
    ]:
        raise UserError(
            f"{folder} holds captions made otherwise ({', '.join(changed)}). Take another name for the result, or "
            "delete that folder."
        )
    if before["source"] != now["source"]:
        raise UserError(
            f"{new['source']} has changed since its captioning began: files were added, removed or written. Caption it "
            f"under another name, or delete {folder}."
        )
