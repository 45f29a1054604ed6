"""Caption sets for other tools, and back: LLaMA-Factory, webdataset, samples of a set, released JSONL files."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from caprl_utils import prompts
from caprl_utils.captioning.check import places
from caprl_utils.captioning.job import WORK_SUFFIX, read_job
from caprl_utils.captioning.manifest import Manifest
from caprl_utils.captioning.places import Place, is_mini_world, reread
from caprl_utils.curation.images import ImageItem
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.hashing import text_hash
from caprl_utils.paths import shown

TAR_IMAGES = 1000  # ours: images in one tar
IMAGE_KEYS = ("image", "image_path", "img_path", "image_name", "path", "file_name", "images")
CAPTION_KEYS = ("caption", "captions", "text", "response", "output", "answer")
FORMATS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


@dataclass(frozen=True)
class ReleasedCaption:
    """A row of a released caption file: the image's path as it stands there, and the caption."""

    image: str
    caption: str


def caption_files(captions: Path) -> list[Path]:
    """The parquet files of a caption set: a file, a job's folder, or a folder of shards."""
    if captions.is_file():
        return [captions]
    for folder in (captions / "shards", captions):
        if files := sorted(folder.glob("*.parquet")):
            return files
    raise UserError(f"no captions at {shown(captions)}: name a .parquet file or a folder of shards")


def read_captions(captions: Path, sound_only: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of a caption set (columns of `work.SetRow`), a batch in memory at a time.

    sound_only: without loops and cut captions.
    """
    for file in caption_files(Path(captions)):
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                if not sound_only or (row["finish_reason"] == "stop" and not row["looped"]):
                    yield row


def sample(captions: Path, out: Path, n: int, seed: int = 0) -> int:
    """Write the captions of `n` images, drawn without repetition; returns the number of captions.

    CapRL-1M is such a sample of CapRL-5M. The order of the set is kept, and a set of fewer than `n` images is
    refused with UserError. Samples of one seed are nested: the smaller one is inside the larger one.
    """
    files = caption_files(Path(captions))
    ids: dict[str, None] = {}
    for file in files:
        ids |= dict.fromkeys(pq.read_table(file, columns=["image_id"])["image_id"].to_pylist())
    if n > len(ids):
        raise UserError(f"{shown(captions)} has {len(ids)} images, fewer than the {n} asked for")
    names = list(ids)
    drawn = {names[place] for place in np.random.default_rng(seed).permutation(len(names))[:n]}
    out, written = Path(out), 0
    temporary = out.with_name(f".{out.name}.tmp")
    schema = pq.read_schema(files[0])
    with full_disk_as_user_error(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for file in files:
                table = pq.read_table(file)
                kept = table.filter(pa.array([name in drawn for name in table["image_id"].to_pylist()]))
                writer.write_table(kept.cast(schema))
                written += kept.num_rows
        temporary.replace(out)
    return written


def write_llamafactory(
    captions: Path,
    file: Path,
    job: Path | None = None,
    prompt: str = prompts.CAPTION,
    sound_only: bool = True,
) -> int:
    """Write a sharegpt JSONL file for LLaMA-Factory; returns the number of rows.

    A row: {"messages": [{role: user, content: "<image>PROMPT"}, {role: assistant, content: CAPTION}], "images":
    [path]}. Images that are files of a folder are named where they are; others (parquet, tar, data sets, rendered
    ones) are written to `images` beside `file`. job: the folder with job.json, where it is not beside
    `captions`. sound_only: leave out loops and cut captions. The entry for dataset_info.json: `dataset_info`.
    """
    job, file = _job_of(captions, job), Path(file)
    temporary, rows = file.with_name(f".{file.name}.tmp"), 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_as_user_error(file), open(temporary, "w", encoding="utf-8") as lines:
        for some in _joined(captions, job, sound_only):
            paths = _as_files([place for place, _ in some], job, file.parent / "images")
            for (_, made), path in zip(some, paths, strict=True):
                for row in made:
                    said = [("user", f"<image>{prompt}"), ("assistant", row["caption"])]
                    messages = [{"role": role, "content": content} for role, content in said]
                    value = {"messages": messages, "images": [path]}
                    lines.write(json.dumps(value, ensure_ascii=False) + "\n")
                    rows += 1
        lines.flush()
        os.fsync(lines.fileno())
    temporary.replace(file)
    return rows


def dataset_info(file: Path) -> dict[str, Any]:
    """The entry of LLaMA-Factory's dataset_info.json for a file of `write_llamafactory`."""
    return {
        "file_name": file.name,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"
        },
    }  # fmt: skip


def write_webdataset(
    captions: Path, folder: Path, job: Path | None = None, sound_only: bool = True
) -> list[Path]:
    """Write tars for webdataset, `TAR_IMAGES` images each: KEY.png (or as the image is), KEY.txt (the first
    caption), KEY.json (the rows). Returns the tars.
    """
    job, folder = _job_of(captions, job), Path(folder)
    written: list[Path] = []
    with full_disk_as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        samples = _encoded(captions, job, sound_only)
        while some := list(islice(samples, 1)):
            target = folder / f"captions-{len(written):06d}.tar"
            temporary = target.with_name(f".{target.name}.tmp")
            with tarfile.open(temporary, "w") as archive:
                for place, data, rows in chain(some, islice(samples, TAR_IMAGES - 1)):
                    _add_sample(archive, place, data, rows)
            temporary.replace(target)
            written.append(target)
    return written


def read_released(file: Path, limit: int | None = None) -> Iterator[ReleasedCaption]:
    """Rows of a released caption JSONL such as internlm/CapRL-2M's.

    Its card says only that the files hold captions and image paths. Taken as one JSON object a line, with the
    path under one of `IMAGE_KEYS` and the caption under one of `CAPTION_KEYS` (the sibling CapRL-Video-178K has
    `video` and `caption`), or in LLaVA's `conversations` or sharegpt's `messages` (the last turn of the
    assistant). Raises UserError with the keys found for a line that is none of these.
    """
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and number > limit:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                image, caption = _first(row, IMAGE_KEYS), _caption_in(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{shown(file)}, line {number} is no JSON object ({error})") from None
            image = image[0] if isinstance(image, list) and image else image
            if not isinstance(image, str) or not isinstance(caption, str):
                raise UserError(
                    f"{shown(file)}, line {number} has no image path and caption that we know; its keys: "
                    f"{', '.join(row)}. Known are {', '.join(IMAGE_KEYS)} and {', '.join(CAPTION_KEYS)}."
                )
            yield ReleasedCaption(image, caption)


def _caption_in(row: dict[str, Any]) -> Any:
    for turns, who, what, name in (
        ("conversations", "from", "value", "gpt"), ("messages", "role", "content", "assistant"),
    ):  # fmt: skip
        said = [turn[what] for turn in row.get(turns) or [] if turn[who] == name]
        if said:
            return said[-1]
    return _first(row, CAPTION_KEYS)


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _job_of(captions: Path, job: Path | None) -> Path:
    """The folder of the job that made a caption set: it knows the images."""
    captions = Path(captions)
    for folder in [job] if job else [captions, captions.with_name(captions.name + WORK_SUFFIX)]:
        if (folder / "job.json").is_file():
            return folder
    raise UserError(f"{shown(captions)}: its job's folder is not beside it; name it (`job=`)")


def _joined(
    captions: Path, job: Path, sound_only: bool
) -> Iterator[list[tuple[Place, list[dict[str, Any]]]]]:
    """The images of each shard that have captions, with them. Both come in the source's order."""
    manifest = Manifest(job)
    groups = groupby(read_captions(Path(captions), sound_only), key=lambda row: row["image_id"])
    name, rows = _next(groups)
    for shard in range(manifest.num_shards):
        found = []
        for place, _, _ in places(manifest.images, shard):
            if place.id == name:
                found.append((place, rows))
                name, rows = _next(groups)
        if found:
            yield found
    if name is not None:
        raise UserError(
            f"{shown(captions)} is not a caption set of {shown(job)}, or not in its order: image {name} is not "
            "among the images that are left"
        )


def _next(groups: Iterator[tuple[str, Iterator[dict[str, Any]]]]) -> tuple[str | None, list[dict[str, Any]]]:
    name, rows = next(groups, (None, ()))
    return name, list(rows)


def _encoded(
    captions: Path, job: Path, sound_only: bool
) -> Iterator[tuple[Place, bytes, list[dict[str, Any]]]]:
    for some in _joined(captions, job, sound_only):
        data = _bytes_of([place for place, _ in some], job)
        yield from ((place, found, rows) for (place, rows), found in zip(some, data, strict=True))


def _as_files(some: Sequence[Place], job: Path, folder: Path) -> Iterator[str]:
    """The path of each image's file; images that are no files are written to `folder`."""
    source = read_job(job)["job"]["source"]
    if not is_mini_world(source) and all(place.file is None and place.at is None for place in some):
        yield from (str(Path(source) / place.path) for place in some)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for place, data in zip(some, _bytes_of(some, job), strict=True):
        target = folder / (_file_name(place) + _suffix(data))
        if not target.exists():
            temporary = target.with_name(f".{target.name}.tmp")
            temporary.write_bytes(data)
            temporary.replace(target)
        yield str(target.absolute())


def _bytes_of(some: Sequence[Place], job: Path) -> Iterator[bytes]:
    settings = read_job(job)["job"]
    for place, item in zip(some, reread(settings["source"], some, settings["kinds"]), strict=True):
        data = item.encoded() if isinstance(item, ImageItem) else item.data
        if data is None:
            raise UserError(f"the image {place.key} of {settings['source']} cannot be read any more")
        yield data


def _add_sample(archive: tarfile.TarFile, place: Place, data: bytes, rows: list[dict[str, Any]]) -> None:
    key = _file_name(place)
    for suffix, content in (
        (_suffix(data), data),
        (".txt", rows[0]["caption"].encode()),
        (".json", json.dumps(rows, ensure_ascii=False).encode()),
    ):
        member = tarfile.TarInfo(key + suffix)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def _file_name(place: Place) -> str:
    """A name for files: webdataset takes all up to the first full stop as the key."""
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', place.id)[-60:]}-{text_hash(place.id)[:8]}"


def _suffix(data: bytes) -> str:
    return next((suffix for start, suffix in FORMATS.items() if data.startswith(start)), ".img")
