"""Where images come from: a folder, parquet files, webdataset tars, or a data set of Hugging Face.

Every source yields raw bytes with an id that stays the same from run to run; decoding is done elsewhere.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.hashing import value_hash
from caprl_utils.paths import shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
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
    """Images of a folder, a .parquet file, a .tar file, a folder of such files, or a data set (id or saved to disk).

    kinds: only images whose first folder (or `kind` column) is one of these. Raises UserError when nothing is
    there.
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
        raise UserError(f"images.source: no {shown(path)}; name a folder, a .parquet file or a .tar file")
    else:
        images = _hub(source)
    for image in images:
        if kinds is None or image.kind in kinds:
            yield image


def fingerprint(source: str) -> str:
    """Hash of what the source holds: names, sizes and times of its files, or its id."""
    path = Path(source).expanduser()
    if not path.exists():
        return value_hash(source)
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    return value_hash([[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files])


def _read_file(file: Path) -> Iterator[RawImage]:
    if file.suffix == ".parquet":
        return _parquet(file)
    if file.suffix == ".tar":
        return _tar(file)
    raise UserError(f"images.source: {shown(file)} is neither a folder nor a .parquet or .tar file")


def _folder(root: Path) -> Iterator[RawImage]:
    """Image files below `root`, sorted; the first folder is the kind. Links that lead outside stay closed."""
    home = root.resolve()
    found = False
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() not in SUFFIXES or file.is_dir():
            continue
        found = True
        name = file.relative_to(root)
        kind = name.parts[0] if len(name.parts) > 1 else None
        yield read_inside(home, name.as_posix(), kind)
    if not found:
        raise UserError(f"images.source: no image in {shown(root)} ({', '.join(SUFFIXES)})")


def read_inside(home: Path, name: str, kind: str | None = None) -> RawImage:
    """One file by its name relative to `home`; a name that leads outside is not opened."""
    target = (home / name).resolve()
    if not target.is_relative_to(home):
        return RawImage(name, None, name, kind, OUTSIDE)
    try:
        return RawImage(name, target.read_bytes(), name, kind)
    except OSError:
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
