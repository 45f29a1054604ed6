"""Where images come from: a folder, parquet files, webdataset tars, a list of paths, or a data set of Hugging Face.

Every source yields raw bytes with an id that stays the same from run to run; decoding is done elsewhere.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.hashing import value_hash
from caprl_utils.paths import shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LISTS = (".txt", ".jsonl", ".csv")
# Ours: where data sets that we have seen name an image's file.
IMAGE_KEYS = ("image", "image_path", "img_path", "image_name", "path", "file_name", "images")
OUTSIDE, UNREADABLE = "path outside the root", "cannot be read"
_PARQUET_ROWS = 64  # rows held at once


@dataclass(frozen=True)
class RawImage:
    """An undecoded image. `problem`: why there are no bytes (OUTSIDE or UNREADABLE).

    file and at: where it stands, so that it can be read again alone (`captioning.places`): the shard's name and
    the row (parquet) or the first byte (tar); the row of a data set; both None for a file of a folder.
    """

    id: str
    data: bytes | None
    path: str | None = None
    kind: str | None = None
    problem: str | None = None
    file: str | None = None
    at: int | None = None


def read_source(source: str, kinds: Sequence[str] | None = None) -> Iterator[RawImage]:
    """Images of a folder, a .parquet file, a .tar file, a folder of such files, a list of paths, or a data set (id or
    saved to disk).

    A list is a .txt file with one path a line, or a .jsonl or .csv file with the path under one of `IMAGE_KEYS`;
    paths start at the list's folder and must stay below it. kinds: only images whose first folder (or `kind`
    column) is one of these. Memory: the names of one folder at a time, some 70 bytes each. Raises UserError when
    nothing is there, and for a row of a list without a path.
    """
    path = Path(source).expanduser()
    if is_saved_data_set(path):
        images = _saved(path)
    elif path.is_dir():
        shards = sorted([*path.glob("*.parquet"), *path.glob("*.tar")])
        images = (image for file in shards for image in _read_file(file)) if shards else _folder(path)
    elif path.is_file():
        images = _read_file(path)
    elif path.suffix or path.is_absolute() or source.startswith("."):
        raise UserError(
            f"images.source: no {shown(path)}; name a folder, a .parquet or .tar file, or a list of paths "
            f"({', '.join(LISTS)})"
        )
    else:
        images = _hub(source)
    for image in images:
        if kinds is None or image.kind in kinds:
            yield image


def fingerprint(source: str) -> str:
    """Hash of what the source holds: names, sizes and times of its files (and of those that a list names), or its
    id. Files are hashed as a stream; memory as for `read_source`.
    """
    path = Path(source).expanduser().resolve()
    if not path.exists():
        return value_hash(source)
    digest = hashlib.sha256()
    names = walk(path) if path.is_dir() else chain([path.name], _names(path) if path.suffix in LISTS else [])
    home = path if path.is_dir() else path.parent
    for name in names:
        try:
            found = os.stat(home / name)
        except (OSError, ValueError):  # a link to nowhere, or no path at all: told when it is read
            continue
        if stat.S_ISREG(found.st_mode):
            digest.update(f"{json.dumps(name)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def walk(folder: Path, inside: str = "") -> Iterator[str]:
    """Names of all files below `folder`, relative to it, in the order of sorted paths; links to folders are not
    followed. Only the names of the folders on the way down are held. Raises UserError for a closed folder.
    """
    names, folders = [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.add(entry.name)
    except PermissionError:
        raise UserError(f"the folder {shown(folder)} cannot be read: permission denied") from None
    names.sort(reverse=True)
    while names:
        name = names.pop()
        if name in folders:
            yield from walk(folder / name, f"{inside}{name}/")
        else:
            yield inside + name


def _read_file(file: Path) -> Iterator[RawImage]:
    if file.suffix == ".parquet":
        return _parquet(file)
    if file.suffix == ".tar":
        return _tar(file)
    if file.suffix in LISTS:
        return _listed(file)
    raise UserError(
        f"images.source: {shown(file)} is neither a folder nor a .parquet or .tar file nor a list of paths "
        f"({', '.join(LISTS)})"
    )


def _folder(root: Path) -> Iterator[RawImage]:
    """Image files below `root`, sorted; the first folder is the kind. Links that lead outside stay closed."""
    home = root.resolve()
    found = False
    for name in walk(root):
        if not name.lower().endswith(SUFFIXES) or (root / name).is_dir():
            continue
        found = True
        yield read_inside(home, name, _kind(name))
    if not found:
        raise UserError(f"images.source: no image in {shown(root)} ({', '.join(SUFFIXES)})")


def _kind(name: str) -> str | None:
    """The first folder of a relative path."""
    first, _, rest = name.partition("/")
    return first if first and rest else None


def _listed(file: Path) -> Iterator[RawImage]:
    """The images that a list names, in its order."""
    home = file.resolve().parent
    for name in _names(file):
        yield read_inside(home, name, _kind(name))


def _names(file: Path) -> Iterator[str]:
    """The paths of a list. Raises UserError naming the row that has none."""
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines) if file.suffix == ".csv" else (line.strip() for line in lines)
            for number, row in enumerate(rows, start=1):
                if row:
                    yield row if file.suffix == ".txt" else _path_in(file, number, row)
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(file)} is no list of paths: it is not UTF-8 text ({error})") from None


def _path_in(file: Path, number: int, row: Any) -> str:
    try:
        row = json.loads(row) if isinstance(row, str) else row
        found = next(row[key] for key in IMAGE_KEYS if row.get(key))
    except (ValueError, AttributeError, StopIteration):
        found = None
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, str):
        raise UserError(
            f"{shown(file)}, row {number} names no image; a row has its path under one of {', '.join(IMAGE_KEYS)}"
        )
    return found


def read_inside(home: Path, name: str, kind: str | None = None) -> RawImage:
    """One file by its name relative to `home`; a name that leads outside is not opened."""
    try:
        target = (home / name).resolve()
        if not target.is_relative_to(home):
            return RawImage(name, None, name, kind, OUTSIDE)
        return RawImage(name, target.read_bytes(), name, kind)
    except (OSError, ValueError):  # ValueError: a name that is no path
        return RawImage(name, None, name, kind, UNREADABLE)


def _parquet(file: Path) -> Iterator[RawImage]:
    """Rows with an `image` column {bytes, path} or binary; `id` and `kind` columns where there are some.

    A row without bytes names a file relative to the parquet file's folder.
    """
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file)
    names = table.schema_arrow.names
    if "image" not in names:
        raise UserError(f"{shown(file)} has no column `image`; its columns: {', '.join(names)}")
    columns = [name for name in ("id", "image", "kind") if name in names]
    number = 0
    for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
        for row in batch.to_pylist():
            image = row["image"] if isinstance(row["image"], dict) else {"bytes": row["image"], "path": None}
            name = str(row.get("id") or f"{file.stem}-{number:08d}")
            if image.get("bytes") is None and image.get("path"):
                inside = read_inside(file.parent.resolve(), image["path"], row.get("kind"))
                yield replace(inside, id=name, file=file.name, at=number)
            else:
                data, path = image.get("bytes"), image.get("path")
                yield RawImage(name, data, path, row.get("kind"), file=file.name, at=number)
            number += 1


def _tar(file: Path) -> Iterator[RawImage]:
    """Image members of a webdataset tar, in order; nothing is unpacked to disk."""
    with tarfile.open(file, "r|*") as archive:
        for member in archive:
            if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                handle = archive.extractfile(member)
                data, start = handle.read() if handle else None, member.offset_data
                yield RawImage(f"{file.stem}/{member.name}", data, member.name, file=file.name, at=start)


def _hub(name: str) -> Iterator[RawImage]:
    """A data set of Hugging Face, streamed; "NAME:SPLIT" picks a split other than train."""
    import datasets

    name, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:
        raise UserError(
            f"images.source: {name!r} is no folder here and cannot be loaded as a data set ({error})"
        ) from None
    yield from _rows(rows)


def is_saved_data_set(path: Path) -> bool:
    """Whether a folder was written by `datasets.Dataset.save_to_disk`."""
    return (path / "state.json").is_file()


def _saved(path: Path) -> Iterator[RawImage]:
    """A data set of Hugging Face that was saved to disk."""
    import datasets

    yield from _rows(datasets.load_from_disk(str(path)))


def _rows(rows: Any) -> Iterator[RawImage]:
    import datasets

    rows = rows.cast_column("image", datasets.Image(decode=False))
    for number, row in enumerate(rows):
        image = row["image"]
        yield RawImage(
            str(row.get("id") or number), image["bytes"], image["path"], row.get("kind"), at=number
        )
