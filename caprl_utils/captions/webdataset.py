"""A caption set as tars that webdataset reads, images included."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from caprl_utils.captions.joined import Rows, bytes_of, file_name, job_of, suffix_of, with_captions
from caprl_utils.captions.places import Place
from caprl_utils.files import full_disk_as_user_error

TAR_IMAGES = 1000  # ours: images in one tar


def write_webdataset(
    captions: Path, folder: Path, job: Path | None = None, sound_only: bool = True
) -> list[Path]:
    """Write tars for webdataset, `TAR_IMAGES` images each: KEY.png (or as the image is), KEY.txt (the first
    caption), KEY.json (the rows). Returns the tars.

    job: the folder with job.json, where it is not beside `captions`. sound_only: leave out loops and cut
    captions. Raises UserError for captions of another job and for an image that is gone.
    """
    job, folder = job_of(captions, job), Path(folder)
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


def _encoded(captions: Path, job: Path, sound_only: bool) -> Iterator[tuple[Place, bytes, Rows]]:
    for some in with_captions(captions, job, sound_only):
        data = bytes_of([place for place, _ in some], job)
        yield from ((place, found, rows) for (place, rows), found in zip(some, data, strict=True))


def _add_sample(archive: tarfile.TarFile, place: Place, data: bytes, rows: Rows) -> None:
    key = file_name(place)
    for suffix, content in (
        (suffix_of(data), data),
        (".txt", rows[0]["caption"].encode()),
        (".json", json.dumps(rows, ensure_ascii=False).encode()),
    ):
        member = tarfile.TarInfo(key + suffix)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
