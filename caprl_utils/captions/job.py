"""Caption a whole source into parquet, in this process or, with workers, under Ray (`scale`).

    made = caption_source("images/", "captions.parquet", ModelConfig(path="zoo:base"), Sampling(max_tokens=256))

Beside NAME.parquet stands NAME.parquet.work with the job's record and the rows so far; with workers the shards.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from caprl_utils import paths, prompts
from caprl_utils.captions.caption import CHUNK_IMAGES, MIN_REPEATS, Caption, Tally, caption_id, draw
from caprl_utils.errors import UserError
from caprl_utils.files import appearing, write_atomic
from caprl_utils.image_sources import count_images, fingerprint, local_path, passed_over, read_source, unique
from caprl_utils.images import BadImageError, ImageItem, in_threads
from caprl_utils.models.base import Backend, Sampling, check_folder, model_hash, open_backend
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.paths import shown
from caprl_utils.processes import visible_gpus
from caprl_utils.progress import Progress
from caprl_utils.runs import Lock, RowStore
from caprl_utils.schema import ModelConfig

_TYPES = {"index": pa.int32(), "num_tokens": pa.int32(), "looped": pa.bool_(), "seed": pa.int64()}
SCHEMA = pa.schema([(name, _TYPES.get(name, pa.string())) for name in Caption.model_fields])
JOB_KEY = b"caption_job"  # in a file's metadata: what made it
_NAMED = 10  # images without a caption that are named on screen
_FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".tar", ".zip", ".md", ".html", ".xlsx")
MAX_TOKENS = 2048  # ours: of a caption; CapRL's longest are about half of it
MAX_BAD_SHARE = 0.2  # ours: more unusable images than this are a mistake somewhere, not chance
Captioner = Backend | ModelConfig
log = logging.getLogger(__name__)


def open_captioner(captioner: Captioner, engine: str | None, gpus: int, stack: ExitStack) -> Backend:
    """The captioner (see `caption_source`); a vLLM server of its own runs until the stack is left."""
    from caprl_utils.models.server import Options, serve

    if not isinstance(captioner, ModelConfig):
        return captioner
    here = captioner.backend == "local"
    if here and (engine == "vllm" or (engine is None and visible_gpus() and find_spec("vllm"))):
        captioner = stack.enter_context(serve(captioner, options=Options(gpus=gpus))).config
    return open_backend(captioner)


def token_limit(model: ModelConfig) -> int:
    """Tokens that a caption may have where nobody says: `MAX_TOKENS`, or half of the model's context if that is less.

    Raises UserError for a model that is neither here nor to be had, and when its servers do not answer.
    """
    if model.backend == "endpoint":
        context = EndpointBackend(model).context
    else:
        from huggingface_hub import HfApi, try_to_load_from_cache
        from transformers import AutoConfig

        path = paths.resolve_model(model.path)
        check_folder(path, model.path)
        if not Path(path).is_dir() and not isinstance(try_to_load_from_cache(path, "config.json"), str):
            try:
                HfApi().model_info(path, revision=model.revision, timeout=10)
            except Exception as error:  # no network, no such model, no permission, no id
                raise UserError(
                    f"the model {path} is not on this machine and cannot be fetched ({type(error).__name__}). Name a "
                    "folder, a server (--base-url), or for a trial --model zoo:base, which is here."
                ) from None
        text = AutoConfig.from_pretrained(path, revision=model.revision).get_text_config()
        context = getattr(text, "max_position_embeddings", None)
    return min(MAX_TOKENS, (context or 2 * MAX_TOKENS) // 2)


@dataclass(frozen=True)
class CaptionSet:
    """What was made. file: the parquet file, or the folder of shards. images: with a caption; looked: all there were.
    bad, failed, passed: see `caption.Tally`. listed: the file that names the bad and failed ones.
    """

    file: str
    images: int
    captions: int
    tokens: int
    cut: int
    looped: int
    looked: int
    bad: dict[str, str]
    failed: dict[str, str]
    passed: dict[str, int]
    listed: str

    def lines(self) -> list[str]:
        """For people."""
        looped = f"loops (a phrase {MIN_REPEATS} times or more) {self.looped}"
        counts = f"{self.tokens} tokens; cut {self.cut}, {looped}"
        told = [f"{self.captions} captions of {self.images} images, {counts}"]
        again = f"{len(self.failed)} images not captioned; run again to try them again:"
        aside = f"{len(self.bad)} of {self.looked} images set aside:"
        for head, reasons in ((aside, self.bad), (again, self.failed)):
            some = islice(reasons.items(), _NAMED)
            told += [head] * bool(reasons)
            told += [f"  {name if name.isprintable() else ascii(name)}: {reason}" for name, reason in some]
            told += [f"  and {len(reasons) - _NAMED} more"] * (len(reasons) > _NAMED)
        if self.bad or self.failed:
            listed = self.listed if "://" in self.listed else shown(self.listed)
            told.append(f"all of these with their reasons: {listed}")
        return told + _passed(self.passed)


def _passed(passed: Mapping[str, int]) -> list[str]:
    return [f"passed over: {passed_over(passed)}"] if passed else []


def make_job(
    source: str | Path, captioner: Captioner, sampling: Sampling, prompt: str = prompts.CAPTION,
    kinds: Sequence[str] | None = None, limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All that changes a set's captions, as JSON values; where the model runs does not."""
    own = captioner if isinstance(captioner, ModelConfig) else getattr(captioner, "config", None)
    here = local_path(source)
    return {
        "source": str(here.resolve()) if here.exists() else str(source), "kinds": list(kinds) if kinds else None,
        "limit": limit, "model": own.path if own else captioner.name,
        "model_hash": model_hash(own) if own else captioner.model_hash, "max_pixels": own.max_pixels if own else None,
        "sampling": asdict(sampling), "prompt": prompt,
    }  # fmt: skip


def caption_source(
    source: str | Path, out: str | Path, captioner: Captioner, sampling: Sampling, *, prompt: str = prompts.CAPTION,
    kinds: Sequence[str] | None = None, limit: int | None = None, max_bad_share: float = MAX_BAD_SHARE,
    engine: str | None = None, workers: int = 0, gpus: int = 1, shard_images: int = 256,
) -> CaptionSet:  # fmt: skip
    """Caption what of a source (see `image_sources.read_source`) has no caption yet; returns the counts.

    out: NAME.parquet; with workers also a folder of shards, local or remote. engine: "vllm" or "transformers" for a
    model without server; vLLM by default where there is a GPU. workers: 0 works in this process; more are Ray actors,
    each with a model on `gpus` GPUs, that write shards of `shard_images` images (best a multiple of the model's batch).
    Raises UserError for a source that is missing or too bad (`max_bad_share`), a result that stands in the source,
    cannot be written or holds something else, and a captioner that says nothing.
    """
    job = make_job(source, captioner, sampling, prompt, kinds, limit)
    folder = _open_folder(job, str(out), shards=workers > 0)
    single, tally, opener = str(out).endswith(".parquet"), Tally(), partial(open_captioner, captioner, engine, gpus)
    listed = f"{str(out).removesuffix('.parquet')}.set-aside.csv" if single else f"{folder}/set-aside.csv"
    with ExitStack() as stack:
        if "://" not in folder:
            lock = Lock(Path(folder) / ".lock", shown(folder))
            lock.acquire()
            stack.callback(lock.release)
        stack.callback(_list_set_aside, listed, tally)
        check = partial(_refuse_many, tally, max_bad_share, listed)
        if workers:
            from caprl_utils.captions.scale import caption_shards

            tables = caption_shards(job, folder, opener, gpus, workers, shard_images, tally, check)
        else:
            tables = _caption_here(job, Path(folder), partial(opener, stack), tally, check)
        if not tally.looked:
            raise UserError(f"no image in {job['source']!r}{'; '.join(['', *_passed(tally.passed)])}")
        tally.refuse_none()
        check(0)
        result = _gather(tables, str(out), SCHEMA.with_metadata({JOB_KEY: json.dumps(job)}), tally, listed)
        write_file(f"{folder}/result.json", json.dumps(asdict(result), indent=2, ensure_ascii=False).encode())
    return result


def _caption_here(
    job: Mapping[str, Any], folder: Path, opener: Callable[[], Backend], tally: Tally, check: Callable[[], None]
) -> Iterable[pa.Table]:
    """Caption what the folder's rows lack; all captions, in the order of the images."""
    order, sampling = [], Sampling(**job["sampling"])
    total = job["limit"] or count_images(job["source"], job["kinds"])

    def images() -> Iterator[tuple[int, ImageItem]]:
        for number, item in enumerate(unique(read_job(job, tally.passed))):
            tally.looked += 1
            order.append(item.id)
            yield number, item

    with RowStore(folder / "captions.jsonl") as store, Progress("captions", total) as bar:
        for row in draw(images(), opener, sampling, job["prompt"], tally, job["max_pixels"], store):
            store.append(row)
            bar.update(tally.looked - bar.done)
            check()
        rows = {row["id"]: row for row in store.read()}
    ids = (caption_id(name, index) for name in order for index in range(sampling.n))
    return [pa.Table.from_pylist([rows[i] for i in ids if i in rows], SCHEMA)]


def read_job(job: Mapping[str, Any], passed: Counter[str] | None = None) -> Iterator[ImageItem]:
    """The images of a job in their order."""
    return islice(read_source(job["source"], job["kinds"], passed), job["limit"])


def _refuse_many(tally: Tally, max_share: float, listed: str, at_least: int = CHUNK_IMAGES) -> None:
    """Raise UserError when more than a share of the images that were looked at cannot be used."""
    if len(tally.bad) > max_share * max(tally.looked, at_least):
        name, reason = next(iter(tally.bad.items()))
        raise UserError(
            f"{len(tally.bad)} images of the first {tally.looked} cannot be used; first: {name}: {reason}. All are in "
            f"{listed}. What was captioned is kept. Mend the source, or allow more than {max_share:.0%} "
            "(--max-bad-share)."
        )


def _list_set_aside(listed: str, tally: Tally) -> None:
    """Write the images without a caption, with the reasons; an old list goes where there is none now."""
    files, path = fsspec.core.url_to_fs(listed)
    if not (tally.bad or tally.failed):
        return files.rm(path) if files.exists(path) else None
    text = io.StringIO()
    csv.writer(text).writerows([("image", "reason"), *tally.bad.items(), *tally.failed.items()])
    write_file(listed, text.getvalue().encode("utf-8", "backslashreplace"))


def check_source(source: str, kinds: Sequence[str] | None, limit: int | None) -> list[str]:
    """Open every image and say what is wrong with the source, for people; nothing is written."""

    def problem(item: ImageItem) -> tuple[str, str] | None:
        try:
            return item.open() and None
        except BadImageError as error:
            return item.id, str(error)

    passed = Counter[str]()
    items = islice(unique(read_source(source, kinds, passed)), limit)
    found = list(in_threads(problem, items))
    told = [f"{len(found)} images, {found.count(None)} good"]
    return told + [f"set aside: {name}: {reason}" for name, reason in filter(None, found)] + _passed(passed)


# Files


def _gather(tables: Iterable[pa.Table], out: str, schema: pa.Schema, tally: Tally, listed: str) -> CaptionSet:
    """Count captions and, where `out` is a NAME.parquet, write them into it, a table in memory at a time."""
    totals = Counter(images=0, captions=0, tokens=0, cut=0, looped=0)

    def counted() -> Iterator[pa.Table]:
        last = None  # an image's captions stand together
        for table in tables:
            yield table
            for row in table.select(["image_id", "num_tokens", "finish_reason", "looped"]).to_pylist():
                name, tokens, ended, looped = row.values()
                totals.update(images=name != last, captions=1, tokens=tokens, cut=ended == "length", looped=looped)
                last = name

    if out.endswith(".parquet"):
        write_parquet(Path(out), counted(), schema)
    else:
        deque(counted(), maxlen=0)
    return CaptionSet(out, **totals, looked=tally.looked, bad=tally.bad, failed=tally.failed,
                      passed=dict(tally.passed), listed=listed)  # fmt: skip


def write_parquet(file: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables one after the other as one file, which appears when it is whole; returns the rows."""
    rows = 0
    with (
        appearing(file) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in tables:
            writer.write_table(table.cast(schema))
            rows += table.num_rows
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
    single, remote, home = out.endswith(".parquet"), "://" in out, Path(job["source"])
    possible = not remote and not Path(out).is_dir() if single else shards and Path(out).suffix not in _FILES
    if not possible:
        raise UserError(
            f"--out {out}: a file NAME.parquet here, or with --workers a folder of shards, here or in a store"
        )
    folder = f"{out}.work" if single else out.rstrip("/")
    if not remote and home.is_dir() and Path(folder).resolve().is_relative_to(home):
        raise UserError(
            f"the result {shown(folder)} would stand inside the image folder {shown(home)} and be taken for a part of "
            "it; name a place outside (--out)"
        )
    # tells this source from another of its name
    state = str(home.stat().st_size) if home.is_file() else fingerprint(job["source"]) if home.is_dir() else None
    try:
        _check_folder(job, folder, shards, state)
        if single and Path(out).exists() and not Path(f"{folder}/job.json").exists():
            raise UserError(f"{out} is there, and its {folder} is not: take another name, or delete it")
        now = {"job": dict(job), "shards": shards, "state": state}
        write_file(f"{folder}/job.json", json.dumps(now, indent=2, ensure_ascii=False).encode())
    except OSError as error:
        message = f"{folder} cannot be written ({error.strerror or error}); take another --out"
        raise UserError(message) from None
    return folder


def _check_folder(job: Mapping[str, Any], folder: str, shards: bool, state: str | None) -> None:
    """Raise UserError when a folder holds something else than this job's captions. A source that is gone has moved:
    the captions are continued at its new place. One whose files changed is told: captions are known by names alone.
    """
    files, root = fsspec.core.url_to_fs(folder)
    names = {name.rpartition("/")[2] for name in files.ls(root, detail=False)} if files.isdir(root) else set()
    if names & {"captions.jsonl", "shards"} and "job.json" in names:
        try:
            record = json.loads(files.cat_file(f"{root}/job.json"))
        except ValueError:
            raise UserError(f"{folder}/job.json is damaged; delete {folder} to caption anew") from None
        before, now = record["job"] | {"workers": record["shards"]}, {**job, "workers": shards}
        changed = [name for name in now if before.get(name) != now[name]]
        if "source" in changed and Path(before["source"]).is_absolute() and not Path(before["source"]).exists():
            changed.remove("source")
        if not changed and record.get("state") not in (None, state):
            told = f"{shown(job['source'])} has changed since; captions that are there stay"
            log.warning("%s (to caption all anew, delete %s)", told, folder)
        if changed:
            told = ", ".join(f"{name}: {before.get(name)!r}, now {now[name]!r}" for name in changed)
            raise UserError(f"{folder} was made otherwise ({told}). Take another name for the result, or delete it.")
    elif other := sorted(filter(None, names - {"job.json", "result.json", "set-aside.csv", ".lock"})):
        raise UserError(f"{folder} is no captioning job and not empty ({other[0]} is there); take another name")
