"""Caption images: one captioner for Prism, the quick start, the pretraining sets and anybody's folder.

    result = caption_source("images/", "captions.parquet", "zoo:vlm-3b", Sampling(max_tokens=256))

1. No caption is drawn twice. One that was cut at the token limit says so (finish_reason "length"), one that repeats
   itself is marked `looped`; both stay and are counted. An evaluation must see what a model does; whoever trains on
   captions leaves those out (`export.is_sound`).
2. A caption's seed is that of its image's place in the source, by chunks of `CHUNK_IMAGES`, so it is the same from run
   to run, alone or among many, in this process or in many (`workers`).
3. Every row is on disk as soon as it is there. Stopped at any moment, `kill -9` included, the next call makes the rest.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from caprl_utils import paths, prompts
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.hashing import derive_seed, text_hash
from caprl_utils.images import BadImageError, ImageItem, count_images, fingerprint, in_threads, read_source
from caprl_utils.models.base import Backend, Request, Sampling
from caprl_utils.models.weights import model_hash
from caprl_utils.paths import shown
from caprl_utils.progress import Progress
from caprl_utils.provenance import gpu_names
from caprl_utils.runs import Lock, RowStore
from caprl_utils.schema import ModelConfig

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE = [
    "caprl_utils.captions.caption",
    "caprl_utils.prompts",
]  # what makes captions, beside the model's code
CHUNK_IMAGES = 64  # images of one seed; ours
MAX_BAD_SHARE = 0.2  # ours: more unusable images than this are a mistake somewhere, not chance
MIN_REPEATS = 4  # ours: lists repeat a phrase two or three times, loops do so for the rest of the caption
MIN_CHARS = 60  # ours: shorter tails are dotted lines and table borders
MIN_SENTENCE_WORDS = 5  # ours: "Yes." may stand in a list more often
SAME_ID = "id used by an earlier image"
JOB_KEY = b"caption_job"  # in a file's metadata: what made it
Engine = Literal["transformers", "vllm"]


class Caption(BaseModel):
    """One caption of one image: a row of captions.jsonl and of the parquet files.

    id: IMAGE#INDEX. image_key: where the image stands in its source. num_tokens: of the caption, in the captioner's own
    tokens; None where no model wrote it. finish_reason "length": cut at the token limit. looped: it repeats itself.
    seed: what it was drawn with.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    id: str
    image_id: str
    image_key: str = ""
    index: int
    caption: str
    num_tokens: int | None
    finish_reason: str
    looped: bool = False
    seed: int | None = None
    model: str
    model_hash: str = ""
    prompt_hash: str = ""


SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("image_id", pa.string()), ("image_key", pa.string()), ("index", pa.int32()),
        ("caption", pa.string()), ("num_tokens", pa.int32()), ("finish_reason", pa.string()),
        ("looped", pa.bool_()), ("seed", pa.int64()), ("model", pa.string()), ("model_hash", pa.string()),
        ("prompt_hash", pa.string()),
    ]
)  # fmt: skip


def caption_id(image_id: str, index: int) -> str:
    """Row id of caption `index` of an image."""
    return f"{image_id}#{index}"


@dataclass
class Tally:
    """Captions made, and images without one, with the reason: bad ones cannot be used, of failed ones the captioner
    said nothing.
    """

    made: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def draw(
    images: Iterable[tuple[int, ImageItem]], captioner: Backend, sampling: Sampling, prompt: str, tally: Tally
) -> Iterator[Caption]:
    """`sampling.n` captions of every image, as soon as each is there; what has none goes to `tally`.

    images: (place in the source, image), ids distinct. Raises UserError when the captioner answers nothing about the
    first `CHUNK_IMAGES` images.
    """
    asked: dict[str, tuple[str, int]] = {}  # image id -> key, seed

    def requests() -> Iterator[Request]:
        for (number, item), image in in_threads(_opened, images):
            if isinstance(image, BadImageError):
                tally.bad[item.id] = str(image)
            elif isinstance(image, Exception):
                tally.failed[item.id] = f"the image cannot be opened: {image}"
            else:
                seed = derive_seed(sampling.seed, "captions", number // CHUNK_IMAGES, bits=31)
                asked[item.id] = item.key, seed
                yield Request(item.id, prompt, image, seed=seed)

    prompt_hash = text_hash(prompt)
    for done in captioner.stream(requests(), sampling):
        if done.text is None:
            tally.failed.setdefault(done.id, done.error or "the captioner gave no text")
            if not tally.made and len(tally.failed) == CHUNK_IMAGES:
                break
            continue
        tally.made += 1
        (key, seed), text = asked[done.id], done.text.strip()
        yield Caption(
            id=caption_id(done.id, done.index), image_id=done.id, image_key=key, index=done.index, caption=text,
            num_tokens=done.num_tokens, finish_reason=done.finish_reason, looped=is_loop(text), seed=seed,
            model=captioner.name, model_hash=captioner.model_hash, prompt_hash=prompt_hash,
        )  # fmt: skip
    if tally.failed and not tally.made:
        name, reason = next(iter(tally.failed.items()))
        raise UserError(
            f"none of {len(tally.failed)} images was captioned; {name}: {reason}. Mend the cause and run again; "
            "nothing that was finished is lost."
        )


def _opened(numbered: tuple[int, ImageItem]) -> tuple[tuple[int, ImageItem], Image | Exception]:
    try:
        return numbered, numbered[1].open()
    except (OSError, UserError) as error:
        return numbered, error


# Lists of images: Prism


def caption_images(
    images: Sequence[tuple[str, Callable[[], Image]]],
    captioner: Backend,
    sampling: Sampling,
    store: RowStore,
    prompt: str = prompts.CAPTION,
) -> dict[str, list[Caption]]:
    """Write `sampling.n` captions of every image to `store`; returns them all by image, old and new.

    images: (id, function that opens it), ids distinct. Raises UserError when an image gets none: what is done stays
    on disk and the next call makes the rest.
    """
    if len({name for name, _ in images}) != len(images):
        raise ValueError("two images have one id")
    items = ((number, ImageItem(name, load)) for number, (name, load) in enumerate(images))
    tally = Tally()
    _write(items, len(images), captioner, sampling, prompt, store, tally)
    if none := tally.bad | tally.failed:
        raise UserError(failure_message("images were not captioned", none, len(images), store))
    found: dict[str, list[Caption]] = {name: [] for name, _ in images}
    for row in store.read(Caption):
        if row.image_id in found and row.index < sampling.n:
            found[row.image_id].append(row)
    return {name: sorted(rows, key=lambda row: row.index) for name, rows in found.items()}


def failure_message(what: str, failed: Mapping[str, str], total: int, store: RowStore) -> str:
    """Text of the error for rows that a model did not answer."""
    name, reason = next(iter(failed.items()))
    return (
        f"{len(failed)} of {total} {what}; first: {name}: {reason}. The finished rows are kept in {shown(store.path)}; "
        "mend the cause and run again, only the missing ones are made."
    )


def _write(
    items: Iterable[tuple[int, ImageItem]],
    total: int | None,
    captioner: Backend,
    sampling: Sampling,
    prompt: str,
    store: RowStore,
    tally: Tally,
    max_bad_share: float = 1.0,
) -> None:
    """Add the captions that `store` lacks. total: number of images, for the progress line."""
    waiting = (
        (number, item)
        for number, item in items
        if any(caption_id(item.id, index) not in store for index in range(sampling.n))
    )
    tally.made = len(store)
    with Progress("captions", total and total * sampling.n) as bar:
        bar.update(tally.made)
        for row in draw(waiting, captioner, sampling, prompt, tally):
            if row.id not in store:
                store.append(row)
                bar.update()
                refuse_many(
                    tally.bad, max(len(store) // sampling.n + len(tally.bad), CHUNK_IMAGES), max_bad_share
                )


def token_counter(model: ModelConfig) -> Callable[[str], int]:
    """A function that counts a text's tokens as this model's captions are counted, the end of turn included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        paths.resolve_model(model.path), revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1


# Whole sources

_COUNTED = ("images", "captions", "tokens", "cut", "looped")


def count(table: pa.Table, totals: Counter[str]) -> pa.Table:
    """Add a table's counts to `totals`; gives it back."""
    rows = table.select(["index", "num_tokens", "finish_reason", "looped"]).to_pylist()
    totals["images"] += sum(row["index"] == 0 for row in rows)
    totals["captions"] += len(rows)
    totals["tokens"] += sum(row["num_tokens"] for row in rows)
    totals["cut"] += sum(row["finish_reason"] == "length" for row in rows)
    totals["looped"] += sum(row["looped"] for row in rows)
    return table


@dataclass(frozen=True)
class CaptionSet:
    """What was made. file: the parquet file, or the folder of shards. bad, failed: see `Tally`."""

    file: str
    images: int
    captions: int
    tokens: int
    cut: int
    looped: int
    bad: dict[str, str]
    failed: dict[str, str]

    @classmethod
    def of(cls, file: str, totals: Counter[str], tally: Tally, folder: str) -> CaptionSet:
        """From counts; the record is kept as result.json in the job's folder."""
        found = cls(file, **{name: totals[name] for name in _COUNTED}, bad=tally.bad, failed=tally.failed)
        files, root = fsspec.core.url_to_fs(folder)
        files.pipe_file(
            f"{root}/result.json", json.dumps(asdict(found), indent=2, ensure_ascii=False).encode()
        )
        return found

    def lines(self) -> list[str]:
        """For people."""
        told = [
            f"{self.captions} captions of {self.images} images, {self.tokens} tokens; cut {self.cut}, "
            f"loops {self.looped}"
        ]
        kinds = Counter(re.sub(r" \(.*", "", reason, flags=re.DOTALL) for reason in self.bad.values())
        told += [f"set aside: {count} {reason}" for reason, count in sorted(kinds.items())]
        if self.failed:
            name, reason = next(iter(self.failed.items()))
            told.append(
                f"not captioned: {len(self.failed)}, e.g. {name}: {reason}; run again to try them again"
            )
        return told


def make_job(
    source: str | Path,
    captioner: Backend | ModelConfig | str,
    sampling: Sampling,
    prompt: str = prompts.CAPTION,
    kinds: Sequence[str] | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
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
    source: str | Path,
    out: str | Path,
    captioner: Backend | ModelConfig | str,
    sampling: Sampling,
    *,
    prompt: str = prompts.CAPTION,
    kinds: Sequence[str] | None = None,
    limit: int | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    engine: Engine | None = None,
    workers: int = 0,
    gpus: int = 1,
    shard_images: int = 256,
) -> CaptionSet:
    """Caption all images of a source (see `images.read_source`), or what is left of them; returns the counts.

    out: NAME.parquet, with what is needed to go on in NAME.parquet.work beside it; with workers also a folder of
    shards, local or remote. captioner: a Backend, a ModelConfig, or a path (zoo:NAME, folder, hub id). kinds, limit:
    only images of these kinds, only the first. max_bad_share: of images that cannot be used. engine: what runs a model
    that has no server; vLLM where there is a GPU and vLLM, else transformers. workers: 0 works in this process; more
    are Ray actors, each with a model on `gpus` GPUs of its own, that write shards of `shard_images` images.

    The columns are those of `Caption`. Images without a caption are tried again by the next call. Raises UserError
    for a source that is tally, unusable or has changed, for a result inside the source's folder, for a file or
    folder that holds something else, and when the captioner answers nothing.
    """
    job = make_job(source, captioner, sampling, prompt, kinds, limit)
    folder = open_folder(job, str(out), shards=workers > 0)
    if workers:
        from caprl_utils.captions.scale import caption_with_workers

        return caption_with_workers(
            job,
            folder,
            str(out),
            workers,
            max_bad_share,
            shard_images,
            captioner=captioner,
            engine=engine,
            gpus=gpus,
        )
    lock, tally, order = Lock(Path(folder) / ".lock", shown(folder)), Tally(), []
    lock.acquire()
    try:
        with RowStore(Path(folder) / "captions.jsonl") as store, opened(captioner, engine) as backend:
            total = limit or count_images(job["source"], kinds)
            _write(
                _numbered(job, tally, order), total, backend, sampling, prompt, store, tally, max_bad_share
            )
            if not order:
                raise UserError(f"no image in {job['source']!r}")
            result = _gather(job, folder, Path(out), store, order, tally)
    finally:
        lock.release()
    refuse_many(tally.bad, len(order), max_bad_share)
    return result


def _numbered(job: Mapping[str, Any], tally: Tally, order: list[str]) -> Iterator[tuple[int, ImageItem]]:
    """The images of a job by their place; ids go to `order`, those that came before to `tally`."""
    seen: set[str] = set()
    for number, item in enumerate(islice(read_source(job["source"], job["kinds"]), job["limit"])):
        if item.id in seen:
            tally.bad[f"{item.id} ({item.key})"] = SAME_ID
            continue
        seen.add(item.id)
        order.append(item.id)
        yield number, item


def refuse_many(bad: Mapping[str, str], images: int, max_share: float) -> None:
    """Raise UserError when more than a share of the images that were looked at cannot be used."""
    if len(bad) > max_share * images:
        name, reason = next(iter(bad.items()))
        raise UserError(
            f"{len(bad)} images of the first {images} cannot be used; first: {name}: {reason}. What was captioned is "
            f"kept. Mend the source, or allow more than {max_share:.0%} (--max-bad-share)."
        )


@contextmanager
def opened(captioner: Backend | ModelConfig | str, engine: Engine | None, gpus: int = 1) -> Iterator[Backend]:
    """A model ready to caption: an endpoint, a vLLM server of its own as long as the block lasts, or transformers."""
    captioner = ModelConfig(path=captioner) if isinstance(captioner, str) else captioner
    if not isinstance(captioner, ModelConfig):
        yield captioner
        return
    from caprl_utils.models.endpoint import EndpointBackend
    from caprl_utils.models.local import LocalBackend
    from caprl_utils.models.server import serve

    if captioner.base_urls:
        yield EndpointBackend(captioner)
    elif engine == "vllm" or (engine is None and gpu_names() and find_spec("vllm")):
        with serve(captioner, gpus=gpus) as server:
            yield EndpointBackend(server.config)
    else:
        yield LocalBackend(captioner)


def check_source(source: str, kinds: Sequence[str] | None = None, limit: int | None = None) -> list[str]:
    """Open every image and say what is wrong with the source, for people; nothing is written."""
    good, bad = 0, Tally()
    for _, image in in_threads(
        _opened, _numbered({"source": source, "kinds": kinds, "limit": limit}, bad, [])
    ):
        if isinstance(image, Exception):
            bad.bad[str(len(bad.bad))] = str(image)
        else:
            good += 1
    found = CaptionSet("", good, 0, 0, 0, 0, bad.bad, {})
    return [f"{good + len(bad.bad)} images, {good} good", *found.lines()[1:]]


# The folder of a job


def open_folder(job: Mapping[str, Any], out: str, shards: bool) -> str:
    """The folder that a job works in, with its record; one of the same job is continued."""
    single = out.endswith(".parquet")
    if not single and not shards:
        raise UserError(
            f"--out {out}: the name must end in .parquet; a folder of shards is written with --workers"
        )
    if single and "://" in out:
        raise UserError(
            f"--out {out}: one file is written here; name a folder of shards with --workers, or a local file"
        )
    folder = f"{out}.work" if single else out.rstrip("/")
    _check_apart(job["source"], folder)
    now = {"job": dict(job), "shards": shards, "source": fingerprint(job["source"])}
    files, root = fsspec.core.url_to_fs(folder)
    names = [name.rsplit("/", 1)[-1] for name in files.ls(root, detail=False)] if files.isdir(root) else []
    if "job.json" in names:
        before = json.loads(files.cat_file(f"{root}/job.json"))
        if before != now and not any(name in ("captions.jsonl", "shards") for name in names):
            names = []  # nothing was captioned: there is nothing to keep
        else:
            _check_same(before, now, folder)
    elif visible := [name for name in names if not name.startswith(".")]:
        raise UserError(
            f"{folder} is no captioning job and not empty ({visible[0]} is there); take another name"
        )
    if "job.json" not in names:
        if single:
            _check_file(Path(out), job)
        files.makedirs(root, exist_ok=True)
        files.pipe_file(f"{root}/job.json", json.dumps(now, indent=2, ensure_ascii=False).encode())
    return folder


def _check_apart(source: str, folder: str) -> None:
    """Refuse a result among the images: the next run would see its files as a change of the source."""
    home = Path(source)
    if "://" not in folder and home.is_dir() and Path(folder).resolve().is_relative_to(home.resolve()):
        raise UserError(
            f"the result {shown(folder)} would stand inside the image folder {shown(home)} and be taken for a part of "
            "it; name a place outside (--out)"
        )


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: str) -> None:
    if before["job"] != now["job"]:
        old, new = before["job"], now["job"]
        changed = ", ".join(f"{k}: {old.get(k)!r}, now {new[k]!r}" for k in new if old.get(k) != new[k])
        raise UserError(
            f"{folder} holds captions made otherwise ({changed}). Take another name for the result, or "
            "delete that folder."
        )
    if before["shards"] != now["shards"]:
        raise UserError(
            f"{folder} was begun {'with' if before['shards'] else 'without'} --workers; go on so, or delete that folder"
        )
    if before["source"] != now["source"]:
        raise UserError(
            f"{now['job']['source']} has changed since its captioning began: files were added, removed or written. "
            f"Caption it under another name, or delete {folder}."
        )


def _check_file(file: Path, job: Mapping[str, Any]) -> None:
    if file.exists():
        found = (pq.read_schema(file).metadata or {}).get(JOB_KEY)
        if found is None or json.loads(found) != job:
            raise UserError(f"{shown(file)} exists and was made otherwise; take another name, or delete it")


def _gather(
    job: Mapping[str, Any], folder: str, out: Path, store: RowStore, order: Sequence[str], tally: Tally
) -> CaptionSet:
    """Write the rows of a job as one parquet file, in the order of the source."""
    rows = {row["id"]: row for row in store.read()}
    ids = (caption_id(name, index) for name in order for index in range(job["sampling"]["n"]))
    schema, totals = SCHEMA.with_metadata({JOB_KEY: json.dumps(job)}), Counter[str]()
    table = pa.Table.from_pylist([rows[i] for i in ids if i in rows], schema)
    write_parquet(out, [count(table, totals)], schema)
    return CaptionSet.of(str(out), totals, tally, folder)


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


# Captions that repeat themselves until the token limit, the common failure of captioners


def is_loop(text: str) -> bool:
    """Whether a text ends in a phrase said at least `MIN_REPEATS` times, or says one sentence as often."""
    return _tail_repeats(text) or _sentence_repeats(text)


def _tail_repeats(text: str) -> bool:
    """Whether the end of the text is one phrase over and over, the last time perhaps not whole.

    The prefix function of the reversed text gives the shortest period of every tail in linear time.
    """
    turned = text.rstrip()[-20_000:][::-1]
    border = [0] * len(turned)
    length = 0
    for place in range(1, len(turned)):
        while length and turned[place] != turned[length]:
            length = border[length - 1]
        length += turned[place] == turned[length]
        border[place] = length
        size = place + 1
        if size >= MIN_CHARS and size >= MIN_REPEATS * (size - length):
            return True
    return False


def _sentence_repeats(text: str) -> bool:
    """Whether one sentence of some words stands `MIN_REPEATS` times in the text, wherever."""
    sentences = (part.strip().casefold() for part in re.split(r"(?<=[.!?。！？])\s*|\n+", text))
    counts = Counter(s for s in sentences if len(s.split()) >= MIN_SENTENCE_WORDS)
    return any(count >= MIN_REPEATS for count in counts.values())
