"""Caption sets for other tools, and back: read them, draw a sample, write training data, take in released files.

A set is a .parquet file or a folder of shards, local or wherever fsspec reaches, with the columns of `caption.Caption`;
the metadata of its files say what made it. Each export appears when it is whole; run a stopped one again.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from caprl_utils import prompts
from caprl_utils.captions.caption import caption_id, is_loop
from caprl_utils.captions.job import JOB_KEY, SCHEMA, write_parquet
from caprl_utils.errors import UserError
from caprl_utils.files import appearing, write_atomic
from caprl_utils.hashing import derive_seed, file_hash, text_hash
from caprl_utils.image_sources import IMAGE_KEYS, read_source
from caprl_utils.images import BadImageError, ImageItem, encode, is_plain, peek
from caprl_utils.paths import shown
from caprl_utils.progress import track
from caprl_utils.records import about_image, mark_in, register

EMPTY, MISSING = "the caption is empty", "no such image below the media folder"
CAPTION_KEYS = ("caption", "text", "captions")  # ours: where files that we have seen hold captions
MAX_BAD_SHARE = 0.05  # ours: more captions set aside than this is a mistake somewhere, not chance
RELEASED_KEY = b"released_captions"  # in the parquet file's metadata: no source is known for the images
_BATCH_ROWS = 4096  # rows in memory at once
_JOIN_ROWS = 100_000  # captions that wait for their images in one pass over the source


def export(
    captions: Sequence[str], out: Path, images: int | None, seed: int, media: Path | None, prompt: str,
    sound_only: bool, limit: int | None, max_bad_share: float,
) -> list[str]:  # fmt: skip
    """What `caprl export` does, by the names of its files; returns lines for people."""
    released = [Path(name) for name in captions if name.endswith(".jsonl")]
    if out.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"--out {out}: the name must end in .parquet or .jsonl")
    for name in captions:
        if Path(name).is_file() and Path(name).suffix not in (".parquet", ".jsonl"):
            raise UserError(f"{name}: name a caption set (.parquet, or a folder of shards) or released .jsonl files")
        if Path(name).resolve() == out.resolve():
            raise UserError(f"--out {out} is what is read; take another name")
    if images and (released or out.suffix != ".parquet"):
        raise UserError("--images draws a sample of a caption set into NAME.parquet; export that file then")
    if len(captions) > 1 and len(released) < len(captions):
        raise UserError("one caption set at a time, or several released .jsonl files")
    if released and out.suffix == ".parquet":
        return write_released(released, out, limit, max_bad_share)
    if released:
        table = out.with_name(f".{out.stem}-released.parquet")
        try:
            told = write_released(released, table, limit, max_bad_share)[1:]
            return told + write_llamafactory(table, out, media, prompt, sound_only, max_bad_share)
        finally:
            table.unlink(missing_ok=True)
    if out.suffix == ".jsonl":
        return write_llamafactory(captions[0], out, media, prompt, sound_only, max_bad_share)
    if (images or 0) < 1:
        raise UserError("--images: how many images the sample has, at least 1")
    return [f"{sample(captions[0], out, images, seed)} captions of {images} images"]


# Reading


def caption_files(captions: str | Path) -> list[tuple[Any, str]]:
    """(file system, path) of a set's parquet files. Raises UserError where there is none."""
    files, root = fsspec.core.url_to_fs(str(captions))
    files.invalidate_cache()  # other processes write too
    if files.isfile(root):
        return [(files, root)]
    for folder in (f"{root.rstrip('/')}/shards", root.rstrip("/")):
        names = files.ls(folder, detail=False) if files.isdir(folder) else []
        if found := sorted(n for n in names if n.endswith(".parquet") and not Path(n).name.startswith(".")):
            return [(files, name) for name in found]
    raise UserError(f"no captions at {captions}: name a .parquet file or a folder of shards")


@contextmanager
def _opened(files: Any, name: str) -> Iterator[pq.ParquetFile]:
    """A file of a set. Raises UserError naming one that cannot be read."""
    try:
        with files.open(name, "rb") as file:
            yield pq.ParquetFile(file, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{name} is half-written or damaged ({error}); delete it and run again (only its images are captioned "
            "again), or fetch it again"
        ) from None


def read_tables(captions: str | Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The set in pieces of some thousand rows. Raises UserError naming a file that cannot be read."""
    for files, name in caption_files(captions):
        with _opened(files, name) as table:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                yield pa.Table.from_batches([batch])


def read_captions(captions: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a caption set, a batch in memory at a time."""
    for table in read_tables(captions):
        yield from table.to_pylist()


def is_sound(row: dict[str, Any]) -> bool:
    """Neither empty nor cut nor a loop. A released caption does not say how it ended (None) and counts as whole."""
    return row["finish_reason"] != "length" and not row["looped"] and bool(row["caption"].strip())


def _origin(captions: str | Path) -> tuple[dict[bytes, bytes], dict[str, Any] | None]:
    """A set's metadata and the job that made it; None for released captions. Raises UserError for another tool's."""
    with _opened(*caption_files(captions)[0]) as table:
        metadata = table.schema_arrow.metadata or {}
    if (record := Path(captions) / "job.json").is_file():  # it knows where a moved source is
        return metadata, json.loads(record.read_text(encoding="utf-8"))["job"]
    if RELEASED_KEY not in metadata and JOB_KEY not in metadata:
        raise UserError(f"{captions} does not say what made it: it was written by another tool")
    return metadata, json.loads(metadata[JOB_KEY]) if JOB_KEY in metadata else None


# Samples


def sample(captions: str | Path, out: Path, n: int, seed: int = 0) -> int:
    """Write the captions of `n` images, drawn without repetition; returns the number of captions.

    CapRL-1M is such a sample of CapRL-5M. The order of the set is kept, and a set of fewer than `n` images is
    refused with UserError. Samples of one seed are nested: the smaller one is inside the larger one. Memory: some
    60 bytes an image, for 64-bit hashes of the ids.
    """
    metadata, _ = _origin(captions)
    hashes = id_hashes(read_tables(captions, ["image_id"]))
    _, first = np.unique(hashes, return_index=True)
    if n > len(first):
        raise UserError(f"{captions} has {len(first)} images, fewer than the {n} asked for")
    drawn = hashes[np.sort(first)[np.random.default_rng(seed).permutation(len(first))[:n]]]
    kept = (table.filter(pa.array(np.isin(id_hashes([table]), drawn))) for table in read_tables(captions))
    return write_parquet(out, kept, SCHEMA.with_metadata(metadata))


def id_hashes(tables: Iterable[pa.Table], column: str = "image_id") -> np.ndarray:
    """64-bit hashes of the ids in a column of all tables, shape (N,)."""
    names = (name for table in tables for name in table[column].to_pylist())
    return np.fromiter((derive_seed(name, bits=64) for name in names), np.uint64)


# Training data of LLaMA-Factory


def write_llamafactory(
    captions: str | Path, file: Path, media: Path | None = None, prompt: str = prompts.CAPTION, sound_only: bool = True,
    max_bad_share: float = MAX_BAD_SHARE,
) -> list[str]:  # fmt: skip
    """Write a caption set as `file` (NAME.jsonl), with its entry NAME in dataset_info.json beside it; lines for people.

    A row: {"id", "messages": [user: "<image>PROMPT", assistant: CAPTION], "images": [path below `media`]}. Files of a
    local folder or list stay where they are, below `media` (by default that folder). What a trainer would see
    otherwise than the captioner did, and what is no file of its own, is written to `images` or `.caprl-images` in it.
    A released set names no source: there `media` must be given. sound_only: without loops and cut captions.
    max_bad_share: of captions set aside (empty, with a mark of LLaMA-Factory, no image) before UserError.
    """
    if found := mark_in(prompt):
        raise UserError(f"the prompt holds {found}: leave it out, it is put before the prompt here")
    _, job = _origin(captions)
    if job is None and (media is None or not media.is_dir()):
        raise UserError(
            f"released captions name their images by path: name the folder that these start at (--media), not {media}"
        )
    home = media.resolve() if job is None else _files_home(job["source"])
    media = Path(media or home or file.parent).resolve()
    folder = media / (".caprl-images" if home else "images") / file.stem  # hidden: it may stand in the source
    aside, rows, left_out = Counter[str](), 0, Counter[bool]()
    chosen = _chosen(captions, sound_only, left_out)
    with appearing(file) as temporary:
        with open(temporary, "w", encoding="utf-8") as lines:
            for row, image in track(_with_files(chosen, job, home, folder), "rows"):
                path, caption = _below(media, image), row["caption"]
                if not caption.strip():
                    aside[EMPTY] += 1
                elif found := mark_in(caption):
                    aside[f"the caption holds {found}, which LLaMA-Factory takes for a file"] += 1
                elif not (media / path).is_file():
                    aside[MISSING] += 1
                else:
                    lines.write(about_image(row["id"], path, [(prompt, caption)]).model_dump_json() + "\n")
                    rows += 1
        told = [
            f"{rows} rows, image paths below {shown(media)} (media_dir)",
            f"left out: {left_out[True]}, cut or loops",
            *(f"set aside: {count}, {reason}" for reason, count in sorted(aside.items())),
        ]
        if not rows or aside.total() > max_bad_share * (rows + aside.total()):
            raise UserError(
                f"{shown(file)} was not written: {'; '.join(told)}. More than {max_bad_share:.0%} of the "
                "captions set aside, or none left; mend the cause, or allow more (--max-bad-share)"
            )
    register(file)
    return told


def _files_home(source: str) -> Path | None:
    """The folder that the image paths of a source start at; None where its images are no local files of their own."""
    first = next(iter(read_source(source))) if Path(source).exists() else None
    if first is None or first.path is None or first.key != first.path:
        return None
    return Path(source) if Path(source).is_dir() else Path(source).parent


def _chosen(captions: str | Path, sound_only: bool, left_out: Counter[bool]) -> Iterator[dict[str, Any]]:
    for row in read_captions(captions):
        unsound = sound_only and not is_sound(row)
        left_out[unsound] += 1
        if not unsound:
            yield row


def _below(media: Path, image: str) -> str:
    path = Path(os.path.normpath(media / image))
    if path.is_relative_to(media):
        return path.relative_to(media).as_posix()
    where = f"image {image} is outside the media folder {shown(media)}"
    raise UserError(f"{where}; name a folder that holds all images (--media)")


def _with_files(
    rows: Iterator[dict[str, Any]], job: dict[str, Any] | None, home: Path | None, folder: Path
) -> Iterator[tuple[dict[str, Any], str]]:
    """Captions with a file of their image as it was captioned, "" where it is gone."""
    while some := list(islice(rows, _JOIN_ROWS)):
        waiting: dict[str, list[dict[str, Any]]] = {}
        for row in some:
            own = home / row["image_key"] if home else None
            path = _file_of(ImageItem(row["image_id"], own.read_bytes), folder, own) if own else ""
            if path or job is None:
                yield row, path
            else:
                waiting.setdefault(row["image_id"], []).append(row)
        for item in read_source(job["source"], job["kinds"]) if waiting else ():
            found = waiting.pop(item.id, ())
            path = _file_of(item, folder) if found else ""
            yield from ((row, path) for row in found)
            if not waiting:
                break
        yield from ((row, "") for lost in waiting.values() for row in lost)


def _file_of(item: ImageItem, folder: Path, own: Path | None = None) -> str:
    """The path of an image's own file where all see it as it was captioned, else of a new one; "" where it is gone."""
    try:
        if own and is_plain(peek(own)):
            return str(own)
        data, kind = encode(item.open())
    except (BadImageError, OSError):
        return ""
    suffix = f".{kind.rpartition('/')[2]}"
    target = folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', item.id)[-60:]}-{text_hash(item.id)[:8]}{suffix}"
    if not target.exists():
        write_atomic(target, data)
    return str(target)


# Captions that others released


def write_released(
    files: Sequence[Path], out: Path, limit: int | None = None, max_bad_share: float = MAX_BAD_SHARE
) -> list[str]:
    """Write released caption JSONL files such as internlm/CapRL-2M's as one parquet file; lines for people.

    A line holds a path under one of `IMAGE_KEYS` and a `caption`, or LLaVA's `conversations` or sharegpt's `messages`
    (ours: the card says no more). What a release does not say (tokens, finish reason, seed, prompt) is null; the file
    is the model. Lines without a caption of one image are set aside and counted; UserError when they are more than
    max_bad_share. Memory: some 100 bytes an image, to number the captions of one image.
    """
    aside: dict[str, list[str]] = {}  # reason -> places
    names = ", ".join(file.name for file in files)
    rows = track(_released_rows(files, limit, aside), "captions")
    schema = SCHEMA.with_metadata({RELEASED_KEY: names})
    tables = (pa.Table.from_pylist(some, schema) for some in iter(lambda: list(islice(rows, _BATCH_ROWS)), []))
    with appearing(out) as temporary:  # an error leaves the file as it was
        made = write_parquet(temporary, tables, schema)
        told = [f"set aside: {len(places)}, e.g. {places[0]}: {reason}" for reason, places in aside.items()]
        bad = sum(map(len, aside.values()))
        if not made or bad > max_bad_share * (made + bad):
            raise UserError("; ".join([f"{names}: {made} lines hold a caption that can be used", *told]))
    return [f"{made} captions", *told]


def _released_rows(files: Sequence[Path], limit: int | None, aside: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    seen: Counter[int] = Counter()
    for file in files:
        maker = {"model": file.name, "model_hash": file_hash(file)}
        with open(file, "rb") as lines:
            for number, line in enumerate(islice(filter(None, map(bytes.strip, lines)), limit), start=1):
                try:
                    image, caption = _parsed(line)
                except ValueError as error:
                    aside.setdefault(str(error), []).append(f"{shown(file)}, line {number}")
                    continue
                key = derive_seed(image, bits=64)
                row_id = caption_id(image, seen[key])
                yield maker | {"id": row_id, "image_id": image, "image_key": image, "index": seen[key],
                               "caption": caption, "looped": is_loop(caption)}  # fmt: skip
                seen[key] += 1


def _parsed(line: bytes) -> tuple[str, str]:
    """Image path and caption of a line. Raises ValueError with the reason why it has none."""
    try:
        row = json.loads(line)
        images = next((row[name] for name in IMAGE_KEYS if row.get(name) is not None), None)
        caption = caption_in(row)
    except (ValueError, AttributeError, TypeError):
        raise ValueError("no JSON object of a known form, in UTF-8") from None
    [image, *more] = images if isinstance(images, list) and images else [images]
    if more:
        raise ValueError("a caption of several images")
    if not isinstance(image, str) or not isinstance(caption, str):
        raise ValueError(f"no image path and caption that we know; its keys: {', '.join(row)}")
    if not caption.strip():
        raise ValueError(EMPTY)
    return image, caption.strip()


def caption_in(row: Mapping[str, Any]) -> Any:
    """The caption of a row that others wrote: the last reply of LLaVA's `conversations` or sharegpt's `messages`, else
    what stands under one of `CAPTION_KEYS`; None where it has none.
    """
    turns = row.get("conversations") or row.get("messages") or []
    said = [turn.get("value") or turn.get("content") for turn in turns if isinstance(turn, dict)
            and turn.get("from", turn.get("role")) in ("gpt", "assistant")]  # fmt: skip
    found = said[-1] if said else next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), None)
    return found.encode("utf-8", "ignore").decode() if isinstance(found, str) else found  # without half of an emoji
