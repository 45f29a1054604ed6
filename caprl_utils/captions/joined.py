"""Captions together with their images: the job that made a set knows where each image stands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from caprl_utils.captions.check import places
from caprl_utils.captions.job import WORK_SUFFIX, read_job
from caprl_utils.captions.manifest import Manifest
from caprl_utils.captions.old_images import ImageItem
from caprl_utils.captions.places import Place, home_of, is_mini_world, reread
from caprl_utils.captions.sets import read_captions
from caprl_utils.errors import UserError
from caprl_utils.hashing import text_hash
from caprl_utils.paths import shown

FORMATS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
Rows = list[dict[str, Any]]


def job_of(captions: Path, job: Path | None) -> Path:
    """The folder of the job that made a caption set. Raises UserError when it is not there."""
    captions = Path(captions)
    for folder in [Path(job)] if job else [captions, captions.with_name(captions.name + WORK_SUFFIX)]:
        if (folder / "job.json").is_file():
            return folder
    where = f"{shown(job)} holds no job.json" if job else "its job's folder is not beside it"
    raise UserError(
        f"{shown(captions)}: {where}; name the folder of the job that made the captions (--job, `job=`), which "
        f"is NAME.parquet{WORK_SUFFIX} beside a NAME.parquet"
    )


def files_home(job: Path) -> Path | None:
    """The folder that the image paths of a job start at; None where its images are no files of their own."""
    source = read_job(job)["job"]["source"]
    if is_mini_world(source):
        return None
    first = places(Manifest(job).images, 0)[0][0]
    return home_of(source) if first.file is None and first.at is None else None


def with_captions(captions: Path, job: Path, sound_only: bool) -> Iterator[list[tuple[Place, Rows]]]:
    """The images of each shard that have captions, with them. Both come in the source's order.

    Raises UserError for captions of another job.
    """
    manifest = Manifest(job)
    groups = groupby(read_captions(captions, sound_only), key=lambda row: row["image_id"])
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


def _next(groups: Iterator[tuple[str, Iterator[dict[str, Any]]]]) -> tuple[str | None, Rows]:
    name, rows = next(groups, (None, ()))
    return name, list(rows)


def bytes_of(some: Sequence[Place], job: Path) -> Iterator[bytes]:
    """The files' bytes of a shard's images; rendered ones as PNG. Raises UserError for one that is gone."""
    settings = read_job(job)["job"]
    for place, item in zip(some, reread(settings["source"], some, settings["kinds"]), strict=True):
        data = item.encoded() if isinstance(item, ImageItem) else item.data
        if data is None:
            raise UserError(f"the image {place.key} of {settings['source']} cannot be read any more")
        yield data


def file_name(place: Place) -> str:
    """A name for files, without suffix: webdataset takes all up to the first full stop as the key."""
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', place.id)[-60:]}-{text_hash(place.id)[:8]}"


def suffix_of(data: bytes) -> str:
    """The suffix of an image by its first bytes."""
    return next((suffix for start, suffix in FORMATS.items() if data.startswith(start)), ".img")
