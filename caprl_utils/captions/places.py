"""Images of a source one by one, and any of them again later, without reading the rest.

A source is whatever `curation.sources` reads (a folder, parquet files, webdataset tars, a list of paths, a data
set of Hugging Face, saved or by id), or "mini-world:SPLIT:COUNT" or "mini-world:SPLIT:COUNT:SEED" for rendered images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

from caprl_utils.captions.old_images import MINI_WORLD, ImageItem, decode
from caprl_utils.captions.old_sources import (
    RawImage,
    fingerprint,
    is_saved_data_set,
    read_inside,
    read_source,
)
from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.registry import drawn_source

Item = TypeVar("Item")


@dataclass(frozen=True)
class Place:
    """Where one image stands in its source (see `RawImage.file` and `at`); `path` is its name in there."""

    id: str
    file: str | None
    at: int | None
    path: str | None
    num_bytes: int | None = None
    kind: str | None = None

    @property
    def key(self) -> str:
        """The image's key in the captions: a path in a folder, FILE.parquet#ROW, FILE.tar#MEMBER."""
        if self.file is None:
            return self.path if self.at is None and self.path else f"#{self.at}"
        return f"{self.file}#{self.path if self.file.endswith('.tar') else self.at}"


def is_mini_world(source: str) -> bool:
    """Whether a source names rendered images."""
    return source.split(":")[0] == MINI_WORLD


def source_hash(source: str) -> str:
    """Hash of what the source holds: names, sizes and times of its files, or its id."""
    return fingerprint(source)


def home_of(source: str) -> Path:
    """The folder that file names of a source start at: the folder itself, or that of a list or shard."""
    root = Path(source).expanduser().resolve()
    return root if root.is_dir() else root.parent


def items(source: str, kinds: Sequence[str] | None = None) -> Iterator[RawImage | ImageItem]:
    """All images in the source's own order, undecoded; rendered ones are already pixels."""
    if not is_mini_world(source):
        yield from read_source(source, kinds)
        return
    for number in range(_mini_parts(source)[1]):
        yield _rendered(source, number, kinds)


def place_of(item: RawImage | ImageItem, number: int) -> Place:
    """The place of image `number` as `items` gave it."""
    if isinstance(item, ImageItem):
        return Place(item.id, None, number, None, kind=item.kind)
    size = len(item.data) if item.data is not None else None
    return Place(item.id, item.file, item.at, item.path, size, item.kind)


def reread(
    source: str, places: Sequence[Place], kinds: Sequence[str] | None = None
) -> Iterator[RawImage | ImageItem]:
    """The images at these places, in their order. Raises UserError when a file is gone.

    The places of one file must come in the file's order.
    """
    if is_mini_world(source):
        yield from (_rendered(source, place.at, kinds) for place in places)
        return
    root = Path(source).expanduser()
    if is_saved_data_set(root) or not root.exists():
        yield from _data_set_rows(source, places)
        return
    for file, group in groupby(places, key=lambda place: place.file):
        wanted = list(group)
        if file is None:
            home = home_of(source)
            yield from (read_inside(home, place.path, place.kind) for place in wanted)
            continue
        shard = home_of(source) / file
        if not shard.is_file():
            raise UserError(f"{shown(shard)} is gone: it was there when the images were checked")
        yield from _tar_members(shard, wanted) if shard.suffix == ".tar" else _parquet_rows(shard, wanted)


def open_image(item: RawImage | ImageItem) -> ImageItem:
    """Decode, or say what is wrong with the image."""
    return decode(item) if isinstance(item, RawImage) else item


def in_threads(work: Any, things: Iterable[Item], threads: int = 4, ahead: int = 16) -> Iterator[Any]:
    """work(thing) in the order of the things, a few ahead of the reader (decoding frees the interpreter)."""
    source = iter(things)
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(work, thing) for thing in islice(source, ahead)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(work, thing) for thing in islice(source, 1)]


def _mini_parts(source: str) -> tuple[str, int, int]:
    parts = source.split(":")
    if len(parts) not in (3, 4) or not all(part.isdecimal() for part in parts[2:]):
        raise UserError(f"{source!r}: rendered images are named mini-world:SPLIT:COUNT, as mini-world:rl:200")
    return parts[1], int(parts[2]), int(parts[3]) if len(parts) == 4 else 0


def _rendered(source: str, number: int, kinds: Sequence[str] | None) -> ImageItem:
    split, _, seed = _mini_parts(source)
    return ImageItem(*drawn_source(source).image_at(split, number, kinds, seed))


def _tar_members(file: Path, places: Sequence[Place]) -> Iterator[RawImage]:
    """Members by their first byte; the archive was read once, when it was checked."""
    with open(file, "rb") as archive:
        for place in places:
            archive.seek(place.at)
            data = archive.read(place.num_bytes or 0)
            yield RawImage(place.id, data, place.path, place.kind, file=place.file, at=place.at)


def _parquet_rows(file: Path, places: Sequence[Place]) -> Iterator[RawImage]:
    """Rows by their number; only the row groups that hold them are read, a few rows at a time."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file)
    wanted = {place.at: place for place in places}
    start = 0
    for group in range(table.num_row_groups):
        end = start + table.metadata.row_group(group).num_rows
        if any(start <= row < end for row in wanted):
            number = start
            for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=["image"]):
                for offset in range(batch.num_rows):
                    if number + offset in wanted:
                        yield _parquet_row(file, wanted[number + offset], batch["image"][offset].as_py())
                number += batch.num_rows
        start = end


def _parquet_row(file: Path, place: Place, image: Any) -> RawImage:
    image = image if isinstance(image, dict) else {"bytes": image, "path": None}
    if image.get("bytes") is None and image.get("path"):
        return read_inside(file.parent.resolve(), image["path"], place.kind)
    return RawImage(place.id, image.get("bytes"), place.path, place.kind, file=place.file, at=place.at)


def _data_set_rows(source: str, places: Sequence[Place]) -> Iterator[RawImage]:
    """Rows of a data set by their number; one known by id is fetched whole at the first call."""
    import datasets

    if is_saved_data_set(Path(source).expanduser()):
        rows = datasets.load_from_disk(str(Path(source).expanduser()))
    else:
        name, _, split = source.partition(":")
        rows = datasets.load_dataset(name, split=split or "train")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    for place in places:
        image = rows[place.at]["image"]
        yield RawImage(place.id, image["bytes"], image["path"], place.kind, at=place.at)
