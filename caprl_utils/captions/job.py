"""Caption an image set of any size: check the images, share the work, gather the result.

    result = caption_source("images/", "captions.parquet", "internlm/CapRL-3B", Sampling(max_tokens=2048))

The work is done in a folder beside the result (see `manifest`). Stop it at any time, `kill -9` included, and
call it again: it goes on. Call it in two processes: they share the shards.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from caprl_utils import prompts
from caprl_utils.captions import engines
from caprl_utils.captions.check import Depth, Report, check_source, read_report
from caprl_utils.captions.manifest import Manifest, read_failed, read_shard
from caprl_utils.captions.places import source_hash
from caprl_utils.captions.work import SCHEMA, Task, Worker, rows_of
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error, write_json
from caprl_utils.hashing import value_hash
from caprl_utils.models.base import Backend, Sampling
from caprl_utils.models.weights import model_hash
from caprl_utils.paths import shown
from caprl_utils.schema import ModelConfig

Engine = Literal["local", "endpoint", "vllm"]
Runner = Literal["processes", "ray"]
WORK_SUFFIX = ".work"
FOLDERS = ("shards", "failed", "claims")
JOB_KEY = b"caption_job"  # in the metadata of the gathered file


class Job(BaseModel):
    """What makes a caption set: job.json. Two runs with the same key continue each other."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    source: str
    kinds: list[str] | None = None
    limit: int | None = Field(None, ge=1)
    model: ModelConfig
    model_hash: str
    engine: Engine
    sampling: Sampling
    prompt: str = prompts.CAPTION
    retries: int = Field(2, ge=0)  # ours: a third loop in a row is the model's last word
    shard_images: int = Field(256, ge=1)  # ours: minutes of work on one GPU
    check: Depth = "decode"
    skip_duplicates: bool = False

    @property
    def key(self) -> str:
        """Hash of all that changes the captions; where the model runs does not count."""
        return value_hash(self.model_dump(mode="json", exclude={"model", "engine", "check"}))

    def task(self) -> Task:
        """What each worker needs."""
        return Task(self.source, self.kinds, self.prompt, self.sampling, self.retries, self.skip_duplicates)


@dataclass(frozen=True)
class CaptionSetResult:
    """What a job made. captions: the parquet files. set_aside: image id -> reason for images without a caption
    (bad images are in `report.problems`). cut, looped: captions that stayed so after all attempts; mended: bad
    ones that a later attempt made good.
    """

    captions: list[Path]
    images: int
    num_captions: int
    num_tokens: int
    cut: int
    looped: int
    retried: int
    mended: int
    set_aside: dict[str, str]
    report: Report

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.num_captions} captions of {self.images} images, {self.num_tokens} tokens",
            f"cut {self.cut}, loops {self.looped}; {self.retried} were tried again, {self.mended} became good",
            f"{len(self.set_aside)} images set aside by the captioner"
            + (f", e.g. {next(iter(self.set_aside.items()))}" if self.set_aside else ""),
        ]


def caption_source(
    source: str | Path,
    out: str | Path,
    captioner: Backend | ModelConfig | str,
    sampling: Sampling,
    *,
    engine: Engine = "local",
    workers: int = 1,
    runner: Runner = "processes",
    wait: bool = True,
    **settings: Any,
) -> CaptionSetResult:
    """Caption all images of `source` into `out`, or what is left of them; returns the counts.

    source: a folder, a .parquet or .tar file or a folder of such, a list of paths (.txt, .jsonl, .csv), a data set
    of Hugging Face (id or saved to disk), or mini-world:SPLIT:COUNT. out: NAME.parquet is one file, with the work
    folder NAME.parquet.work beside it; any other name is a folder with `shards/*.parquet` in it. captioner: a
    Backend, used in this process; or a model (zoo:NAME, folder, hub id, ModelConfig), run by `engine` in `workers`
    processes (one GPU each, where there are GPUs) or Ray actors. settings: see `Job` (prompt, retries,
    shard_images, kinds, limit, check, skip_duplicates).

    The columns are those of `work.SetRow`. Images without a caption are tried again by the next call. Raises
    UserError for a missing or unusable source, for a result inside the source's folder, for a folder that holds
    captions made otherwise, for a damaged shard, and when the captioner answers nothing.
    """
    out = Path(out)
    job = make_job(str(source), captioner, sampling, engine, **settings)
    folder = out.with_name(out.name + WORK_SUFFIX) if out.suffix == ".parquet" else out
    manifest = prepare(job, folder)
    manifest.reopen_failed(rows_of)
    if len(manifest.finished()) < manifest.num_shards:
        if isinstance(captioner, str | ModelConfig) and (workers > 1 or runner == "ray"):
            engines.run_workers(folder, workers, runner)
        else:
            backend = captioner if not isinstance(captioner, str | ModelConfig) else engines.open_engine(job)
            Worker(manifest, job.task(), backend, wait).run()
    return gather(folder, out)


def make_job(
    source: str, captioner: Backend | ModelConfig | str, sampling: Sampling, engine: Engine, **settings: Any
) -> Job:
    """The job's record, with the model's hash."""
    if isinstance(captioner, str):
        captioner = ModelConfig(path=captioner)
    if isinstance(captioner, ModelConfig):
        model, digest = captioner, model_hash(captioner)
    else:
        model, digest = ModelConfig(path=captioner.name), captioner.model_hash
    if Path(source).expanduser().exists():
        source = str(Path(source).expanduser().resolve())
    return Job(
        source=source, model=model, model_hash=digest, engine=engine, sampling=sampling, **settings
    )  # fmt: skip


def prepare(job: Job, folder: Path) -> Manifest:
    """Check the images once, say what was found, and set up the folder; a folder of the same job is continued."""
    _check_apart(job.source, folder)
    manifest = Manifest(folder)
    now = {"key": job.key, "source": source_hash(job.source)}
    with manifest.locked("prepare"):
        record = folder / "job.json"
        if record.exists() and _is_other(record, now) and _nothing_done(folder):
            record.unlink()  # the model could not be loaded, say: there is nothing to keep
        if not record.exists():
            _check_empty(folder)
            report = check_source(
                job.source, manifest.images, job.shard_images, job.kinds, job.check, job.limit
            )
            print("\n".join(report.lines()), file=sys.stderr, flush=True)
            for name in FOLDERS:
                (folder / name).mkdir(exist_ok=True)
            write_json(folder / "check.json", asdict(report))
            write_json(record, now | {"job": job.model_dump(mode="json")})
            return manifest
        before = read_job(folder)
    if before["key"] != now["key"]:
        raise UserError(
            f"{shown(folder)} holds captions made otherwise ({_differences(before['job'], job)}). Take another "
            "name for the result, or delete that folder."
        )
    if before["source"] != now["source"]:
        raise UserError(
            f"{job.source} has changed since it was checked: files were added, removed or written. Caption it "
            f"under another name, or delete {shown(folder)}."
        )
    return manifest


def _check_apart(source: str, folder: Path) -> None:
    """Refuse a result among the images: the next run would see its files as a change of the source."""
    home = Path(source).expanduser()
    if home.is_dir() and folder.resolve().is_relative_to(home.resolve()):
        raise UserError(
            f"the result {shown(folder)} would stand inside the image folder {shown(home)} and be taken for a "
            "part of it; name a place outside (--out)"
        )


def _is_other(record: Path, now: dict[str, Any]) -> bool:
    before = read_job(record.parent)
    return {name: before[name] for name in now} != now


def _nothing_done(folder: Path) -> bool:
    """No caption, no failure, and nobody at work."""
    return not any(file.is_file() for name in FOLDERS for file in (folder / name).rglob("*"))


def _check_empty(folder: Path) -> None:
    """Refuse a folder that holds anything but the beginnings of a job."""
    ours = {*FOLDERS, "check.json", "images.parquet"}
    if other := [e.name for e in folder.iterdir() if not e.name.startswith(".") and e.name not in ours]:
        raise UserError(
            f"{shown(folder)} is no captioning job and not empty ({sorted(other)[0]} is there); take another name"
        )


def read_job(folder: Path) -> dict[str, Any]:
    """The record of a job's folder: key, source (hash) and job. Raises UserError when there is none."""
    import json

    try:
        return json.loads((folder / "job.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{shown(folder)} is no captioning job: it has no job.json") from None


def gather(folder: Path, out: Path) -> CaptionSetResult:
    """Count all finished shards and, for a NAME.parquet, write them into it; a shard is held at a time."""
    manifest = Manifest(folder)
    record = read_job(folder)
    files = [manifest.shard_file(shard) for shard in sorted(manifest.finished())]
    complete = len(files) == manifest.num_shards
    counts = dict.fromkeys(("num_captions", "num_tokens", "cut", "looped", "retried", "mended"), 0)
    single = out if out != folder and complete else None
    temporary = out.with_name(f".{out.name}.tmp")
    schema = SCHEMA.with_metadata({JOB_KEY: str(record["key"])})
    images = 0
    with manifest.locked("gather"), full_disk_as_user_error(out):
        writer = _set_writer(temporary, schema) if single else None
        for file in files:
            table = read_shard(file)
            if writer:
                writer.write_table(table.replace_schema_metadata(schema.metadata))
            images += len(set(table["image_id"].to_pylist()))
            for name, value in _counts(table.to_pylist()).items():
                counts[name] += value
        if writer:
            writer.close()
            temporary.replace(out)
        report = read_report(folder / "check.json")
        result = CaptionSetResult(
            [single] if single else files, images, **counts, set_aside=read_failed(folder), report=report
        )
        if complete:
            summary = asdict(result) | {"captions": [file.name for file in result.captions]}
            write_json(folder / "result.json", summary | {"key": record["key"]})
    return result


def _set_writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    sound = [row["finish_reason"] == "stop" and not row["looped"] for row in rows]
    return {
        "num_captions": len(rows),
        "num_tokens": sum(row["num_tokens"] for row in rows),
        "cut": sum(row["finish_reason"] == "length" for row in rows),
        "looped": sum(row["looped"] for row in rows),
        "retried": sum(row["attempts"] > 1 for row in rows),
        "mended": sum(row["attempts"] > 1 and good for row, good in zip(rows, sound, strict=True)),
    }


def _differences(before: dict[str, Any], job: Job) -> str:
    now = job.model_dump(mode="json")
    names = [name for name in now if now[name] != before.get(name) and name not in ("engine", "check")]
    return ", ".join(f"{name}: {before.get(name)!r}, now {now[name]!r}" for name in names)
