"""Whatever an image set can be read from.

A source is a folder, a .parquet or .tar file, a list of paths (.txt, .jsonl, .csv, .tsv), a data set of Hugging Face
(saved to disk, or by its id), or images that are drawn ("mini-world:SPLIT:COUNT:SEED"); here or anywhere that fsspec
reaches (s3://, gs://, hf://). Links are followed; a path in a list or table must stay below its own folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import re
import tarfile
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.hashing import value_hash
from caprl_utils.images import BadImage, BadImageError, ImageItem, has_picture_name, peek
from caprl_utils.paths import shown
from caprl_utils.registry import drawn_source
from caprl_utils.schema import Profile

LISTS = (".txt", ".jsonl", ".csv", ".tsv")
# Ours: where data sets that we have seen name an image's file, and where tables hold it.
IMAGE_KEYS = ("image", "image_path", "img_path", "image_name", "path", "file_name", "images")
IMAGE_COLUMNS = (*IMAGE_KEYS, "img", "picture", "jpg", "jpeg", "png", "webp")
_PARQUET_ROWS = 64  # rows held at once
NO_SUFFIX = "without suffix"


def open_images(profile: Profile, split: str = "rl", passed: Counter[str] | None = None) -> Iterator[ImageItem]:
    """The first `images.num_images` images of the profile's source, each id once (`unique`)."""
    settings = profile.images
    source = settings.source
    if drawn_source(source):
        source = f"{source}:{split}:{settings.num_images}:{profile.seed}"
    return islice(unique(read_source(source, settings.kinds, passed)), settings.num_images)


def unique(items: Iterable[ImageItem]) -> Iterator[ImageItem]:
    """The items; one with the id of an earlier one cannot be opened, and its key stands in its id."""
    seen = set()
    for item in items:
        item = repeated(item) if item.id in seen else item
        seen.add(item.id)
        yield item


def repeated(item: ImageItem) -> ImageItem:
    """What stands for an item whose id an earlier one has."""
    return ImageItem.failing(f"{item.id} ({item.key})", BadImage.SAME_ID, key=item.key)


def read_source(
    source: str, kinds: Sequence[str] | None = None, passed: Counter[str] | None = None
) -> Iterator[ImageItem]:
    """All images of a source (see the module), in its own order, each with an id that stays the same. kinds: only
    images whose first folder (or `kind` column) is one of these. passed: counts what was passed over in folders and
    tars. What cannot be read is an item that raises when it is opened. Memory: the names of one local folder. Raises
    UserError when nothing is there, and for a table, tar or list that is damaged.
    """
    passed = Counter() if passed is None else passed
    if drawn := drawn_source(source):
        split, count, seed = _split_count_seed(source)
        found = (drawn.image_at(split, number, kinds, seed) for number in range(count))
        return (ImageItem(name, image.copy, name, kind, meta=meta) for name, image, kind, meta in found)
    place = _Place.of(source)
    if place.files.isdir(place.root):
        images = _folder(place, source, passed)
    elif place.files.isfile(place.root):
        images = _file(*place.split(), passed)
    elif place.remote or Path(source).suffix or Path(source).is_absolute() or source.startswith("."):
        told = f"name a folder, a .parquet or .tar file, or a list of paths ({', '.join(LISTS)})"
        raise UserError(f"no {source if place.remote else shown(source)}; {told}")
    else:
        images = _data_set(source)
    return (image for image in map(_with_text_name, images) if kinds is None or image.kind in kinds)


def _with_text_name(item: ImageItem) -> ImageItem:
    """The item, or one that cannot be opened where a name cannot be written as UTF-8."""
    if not re.search("[\ud800-\udfff]", f"{item.id}{item.key}"):
        return item
    told, key = (text.encode("utf-8", "backslashreplace").decode() for text in (item.id, item.key))
    return ImageItem.failing(told, BadImage.NAME, key=key)


def local_path(source: str | Path) -> Path:
    """A path of this machine: from the working folder, or else from the repository's."""
    here = Path(source).expanduser()
    return paths.HOME / here if not here.exists() and (paths.HOME / here).exists() else here


def is_hub(source: str) -> bool:
    """Whether a source is a data set's id, which can be streamed only from its start."""
    return not (drawn_source(source) or "://" in source or local_path(source).exists())


def count_images(source: str, kinds: Sequence[str] | None = None) -> int | None:
    """How many images a source has; None where only reading them all tells."""
    if drawn_source(source):
        return _split_count_seed(source)[1]
    return None if is_hub(source) else sum(1 for _ in read_source(source, kinds))


def fingerprint(source: str) -> str:
    """Hash of the names and sizes of a source's images (for tables and tars: of the files), or of its id."""
    if drawn_source(source) or is_hub(source):
        return value_hash(source)
    place = _Place.of(source)
    if not place.files.isdir(place.root):
        place, name = place.split()
        names = chain([name], _listed_paths(place, name) if name.endswith(LISTS) else ())
    else:
        names = (name for name in place.walk(Counter()) if place.holds_images(name))
    digest = hashlib.sha256()
    for name in filter(None, names):
        size = None  # of what cannot be had
        with suppress(OSError, ValueError, BadImageError):
            full = place.full(name)
            size = place.files.info(full)["size"] if place.remote else os.stat(full).st_size
        digest.update(f"{json.dumps(name)} {size}\n".encode())
    return digest.hexdigest()[:16]


def _split_count_seed(source: str) -> tuple[str, int, int]:
    name, _, rest = source.partition(":")
    if not (found := re.fullmatch(r"([^:]*):(\d+)(?::(\d+))?", rest)):
        raise UserError(f"{source!r}: rendered images are named {name}:SPLIT:COUNT, as {name}:rl:200")
    return found[1], int(found[2]), int(found[3] or 0)


@dataclass(frozen=True)
class _Place:
    """A folder (or file) of a file system; names below it are opened, others are not."""

    files: Any  # fsspec.AbstractFileSystem
    root: str

    @classmethod
    def of(cls, source: str) -> _Place:
        local = "://" not in source
        try:
            if local:  # "::" in a name is no chain of stores
                files, root = fsspec.filesystem("file"), str(local_path(source).resolve())
            else:
                files, root = fsspec.core.url_to_fs(source)
            files.invalidate_cache()  # a listing from before
            local or files.exists(root)
        except Exception as error:  # no driver, no key, no bucket: each store raises its own kinds
            raise UserError(f"{source} cannot be reached ({type(error).__name__}: {error})") from None
        return cls(files, root.rstrip("/") or "/")

    @property
    def remote(self) -> bool:
        return "file" not in self.files.protocol

    def split(self) -> tuple[_Place, str]:
        """The folder that a file stands in, and its name."""
        return _Place(self.files, posixpath.dirname(self.root)), posixpath.basename(self.root)

    def full(self, name: str) -> str:
        """The full path of a name. Raises BadImageError for one that leads outside."""
        target = self.files._strip_protocol(name) if "://" in name else posixpath.join(self.root, name)
        target = posixpath.normpath(target)
        if not target.startswith(self.root.rstrip("/") + "/"):
            raise BadImageError(BadImage.OUTSIDE)
        return target

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file's bytes, or some of them; tried twice. Raises BadImageError."""
        target, problem = self.full(name), "cut short"
        for _ in range(2):
            try:
                data = self.files.cat_file(target, start=start, end=end)
                if end is None or len(data) == end - start:
                    return data
            except (OSError, ValueError) as error:
                problem = getattr(error, "strerror", None) or type(error).__name__
        raise BadImageError(BadImage.UNREADABLE, problem)

    def open(self, name: str) -> Any:
        """A file to read in. Raises UserError when that is not possible."""
        try:
            return self.files.open(posixpath.join(self.root, name), "rb")
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror or error})") from None

    def holds_images(self, name: str) -> bool:
        """Whether a file is a picture or may hold some: by its suffix, or by its content where it has none."""
        suffix = _suffix(name)
        if suffix in (".parquet", ".tar") or has_picture_name(name):
            return True
        if re.fullmatch(r"\.[a-z]\w{0,9}", suffix):
            return False
        with suppress(UserError), self.open(name) as file:
            return bool(peek(file))
        return False

    def walk(self, passed: Counter[str], inside: str = "", above: tuple[Any, ...] = ()) -> Iterator[str]:
        """Names of all files below, in the order of sorted paths; hidden and closed ones are passed over. Of a local
        folder only the names of the folders on the way down are held; links are followed, in no circle.
        """
        if self.remote:
            for name in sorted(self.files.find(self.root)):
                name = name[len(self.root) :].lstrip("/")
                if re.search(r"(^|/)\.", name):
                    passed["hidden"] += 1
                else:
                    yield name
            return
        folder = posixpath.join(self.root, inside)
        try:
            me = os.stat(folder)[1:3]  # inode and device
            with os.scandir(folder) as entries:
                found = [(e.name, os.path.isdir(e.path), e.is_symlink() or e.is_file()) for e in entries]  # no ELOOP
        except OSError:
            passed[f"closed folder {shown(folder)}"] += 1
            return
        if me in above:
            passed["link to a folder above it"] += 1
            return
        for name, is_folder, is_file in sorted(found):
            if name.startswith(".") or not (is_folder or is_file):
                passed["hidden" if is_folder or is_file else "no file"] += 1
            elif is_folder:
                yield from self.walk(passed, f"{inside}{name}/", (*above, me))
            else:
                yield inside + name


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _by_path(home: _Place, name: str) -> ImageItem:
    """A file by its path below `home`; its first folder is the kind."""
    first, _, rest = name.partition("/")
    return ImageItem(name, partial(home.read, name), name, first if first and rest else None, name)


def _folder(place: _Place, source: str, passed: Counter[str]) -> Iterator[ImageItem]:
    """A saved data set, or the pictures below a folder with those in its tables and tars."""
    names = {posixpath.basename(name.rstrip("/")) for name in place.files.ls(place.root, detail=False)}
    where = source if place.remote else shown(place.root)
    if "dataset_dict.json" in names:
        raise UserError(f"{where} is a data set with several splits; name the folder of one of them")
    if "state.json" in names:
        yield from _data_set(source if place.remote else place.root, place)
        return
    item = None
    for name in place.walk(passed):
        if not place.holds_images(name):
            passed[_suffix(name) or NO_SUFFIX] += 1
            continue
        for item in _file(place, name, passed, inside=True):
            yield item
    if item is None:
        told = f"; passed over: {passed_over(passed)}" if passed else ""
        raise UserError(f"no image in {where}{told}")


def passed_over(passed: Mapping[str, int]) -> str:
    """What was passed over, for people."""
    return ", ".join(f"{count} {what}" for what, count in sorted(passed.items()))


def _file(place: _Place, name: str, passed: Counter[str], inside: bool = False) -> Iterator[ImageItem]:
    """The images of a file; a file inside a folder is a picture unless its name says otherwise."""
    suffix = _suffix(name)
    if suffix == ".parquet":
        return _parquet(place, name, passed if inside else None)
    if suffix == ".tar":
        return _tar(place, name, passed)
    if inside or has_picture_name(name):
        return iter([_by_path(place, name)])
    if suffix in LISTS:
        return _listed(place, name)
    raise UserError(f"{name} is neither a folder nor a .parquet or .tar file nor a list of paths ({', '.join(LISTS)})")


# Lists


def _listed(home: _Place, name: str) -> Iterator[ImageItem]:
    detail = f"a row has its path under one of {', '.join(IMAGE_KEYS)}"
    for number, path in enumerate(_listed_paths(home, name), start=1):
        place = f"{name} row {number}", BadImage.NO_PATH, detail, f"{name}#{number}"
        yield ImageItem.failing(*place) if path is None else _by_path(home, path)


def _listed_paths(home: _Place, name: str) -> Iterator[str | None]:
    """The paths of a list, in its order; None for a row that names none. Raises UserError for what is no such list."""
    suffix = _suffix(name)
    try:
        with home.open(name) as file:
            lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            if suffix in (".csv", ".tsv"):
                table = csv_table(lines)
                column = next((key for key in IMAGE_KEYS if key in table.fieldnames), None)
                if column is None:
                    there, known = ", ".join(table.fieldnames)[:200], ", ".join(IMAGE_KEYS)
                    raise UserError(f"{name} names no image: none of its columns ({there}) is one of {known}")
                yield from ((row[column] or "").strip() or None for row in table)
            for line in filter(None, map(str.strip, lines)):
                yield from [line] if suffix == ".txt" else _json_paths(line)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name} is no list of paths in UTF-8, or no sound CSV ({error})") from None


def csv_table(lines: Iterator[str]) -> csv.DictReader[str]:
    """The rows of a table with a header and any of the usual separators."""
    csv.field_size_limit(2**31 - 1)
    first = next(lines, "")
    table = csv.DictReader(chain([first], lines), delimiter=max(",;\t|", key=first.count), strict=True)
    table.fieldnames = [cell.strip() for cell in table.fieldnames or ()]
    return table


def _json_paths(line: str) -> list[str | None]:
    try:
        row = json.loads(line)
        found = _pictures(next(row[key] for key in IMAGE_KEYS if row.get(key)))
        return [path if isinstance(path, str) and path else None for _, path in found]
    except (ValueError, AttributeError, StopIteration):
        return [None]


# Tables and tars


def _pictures(value: Any) -> list[tuple[bytes | None, str | None]]:
    """(bytes, path) of every picture of a cell: bytes, a path, {bytes, path}, or a list of such."""
    if isinstance(value, list):
        return [picture for one in value for picture in _pictures(one)] or [(None, None)]
    if isinstance(value, dict):
        return [(value.get("bytes"), value.get("path"))]
    return [(None, value) if isinstance(value, str) else (value, None)]


def _pictures_of(
    rows: Iterable[dict[str, Any]], column: str, cell: Callable[[int], Any] | None, read: Callable[[str], bytes],
    stem: str = "", file: str = "",
) -> Iterator[ImageItem]:  # fmt: skip
    """The pictures of a table. rows: its ids, kinds, and of the cells what tells how many pictures they have. cell:
    gives a whole one by its row's number (None: they stand in the rows); read: the file of a path.
    """

    def load(number: int, part: int, value: Any) -> bytes:
        data, path = _pictures(cell(number) if cell else value)[part]
        return read(path) if data is None and path else data or b""

    for number, row in enumerate(rows):
        name, kind, value = row.get("id"), row.get("kind"), row.get(column)
        name = (f"{stem}{number:08d}" if stem else number) if name is None else name
        kind = None if kind is None else str(kind)
        for part, (_, path) in enumerate(_pictures(value)):
            more = f"/{part + 1}" if part else ""
            opener = partial(load, number, part, None if cell else value)
            yield ImageItem(f"{name}{more}", opener, f"{file}#{number}{more}", kind, path)


def _parquet(home: _Place, name: str, passed: Counter[str] | None) -> Iterator[ImageItem]:
    """The pictures of one of `IMAGE_COLUMNS`; `id` and `kind` columns where there are some. passed: where a table
    without pictures is counted; None makes it an error.
    """
    try:
        table = pq.ParquetFile(home.open(name))
        types = {f.name: f.type for f in table.schema_arrow}
        form = "binary|string" if passed is None else "binary"  # paths in a folder: of pictures that stand there anyway
        column = next((n for n in IMAGE_COLUMNS if re.search(form, str(types.get(n)))), None)
        if column is None:
            if passed is None:
                raise UserError(f"{name} has no column `image`; its columns: {', '.join(types)}")
            passed["table without images"] += 1
            return
        light = [n for n in ("id", "kind") if n in types]
        if pa.types.is_struct(types[column]):
            light += [f"{column}.path"] if "path" in types[column].names else []
        elif str(types[column]) not in ("binary", "large_binary"):  # how many pictures a list has
            light.append(column)
        cells, batches = _ParquetCells(table, column), table.iter_batches(_PARQUET_ROWS, columns=light)
        rows = (row for batch in batches for row in batch.to_pylist())
        rows = rows if light else ({} for _ in range(table.metadata.num_rows))
        stem = f"{posixpath.splitext(name)[0]}-"
        yield from _pictures_of(rows, column, cells, home.read, stem, name)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{name} is no parquet file that can be read ({error}); fetch it again") from None


class _ParquetCells:
    """The cells of a column by their row; a few rows in memory, quick when asked for in order."""

    def __init__(self, table: Any, column: str) -> None:
        self.table, self.column, self.group, self.lock = table, column, None, threading.Lock()
        sizes = (table.metadata.row_group(n).num_rows for n in range(table.num_row_groups))
        self.starts = [0, *accumulate(sizes)]

    def __call__(self, number: int) -> Any:
        """Raises BadImageError."""
        group = bisect_right(self.starts, number) - 1
        with self.lock:
            try:
                if group != self.group or number < self.start:
                    self.group, self.start = group, self.starts[group]
                    self.batches = self.table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[self.column])
                    self.batch = next(self.batches)
                while number >= self.start + self.batch.num_rows:
                    self.start += self.batch.num_rows
                    self.batch = next(self.batches)
                return self.batch.column(0)[number - self.start].as_py()
            except (OSError, pa.ArrowException) as error:
                self.group = None
                raise BadImageError(BadImage.UNREADABLE, error) from None


def _tar(home: _Place, name: str, passed: Counter[str]) -> Iterator[ImageItem]:
    """Pictures of a webdataset tar, in order; nothing is unpacked to disk."""
    try:
        with home.open(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                hidden = posixpath.basename(member.name).startswith(".")
                if member.isfile() and has_picture_name(member.name) and not hidden:
                    data = partial(home.read, name, member.offset_data, member.offset_data + member.size)
                    image_id = f"{posixpath.splitext(name)[0]}/{member.name}"
                    yield ImageItem(image_id, data, f"{name}#{member.name}", path=member.name)
                elif not member.isdir():
                    passed["hidden" if hidden else _suffix(member.name) or NO_SUFFIX] += 1
            file.seek(archive.offset)
            end = file.read(20 * 512)
            if len(end) < 512 or end.strip(b"\0"):
                raise tarfile.ReadError("it is cut off, or several tars were joined")
    except tarfile.TarError as error:
        raise UserError(f"{name} cannot be read to its end as an uncompressed tar ({error}); fetch it again") from None


# Data sets of Hugging Face


def _data_set(source: str, home: _Place | None = None) -> Iterator[ImageItem]:
    """A saved data set, whose rows are read when they are asked for, or (without `home`) a streamed one of the hub:
    "NAME:SPLIT" picks a split other than train.
    """
    import datasets

    if home:
        rows = datasets.load_from_disk(source)
    else:
        name, _, split = source.partition(":")
        try:
            rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        except Exception as error:
            raise UserError(f"{name!r} is no folder here and cannot be loaded as a data set ({error})") from None
    names = rows.column_names or []
    column = next((name for name in IMAGE_COLUMNS if name in names), "image")
    if names and column not in names:
        raise UserError(f"the data set has no column `image`; its columns: {', '.join(names)}")
    kind = (rows.features or {}).get(column)
    if isinstance(kind, (datasets.Image, datasets.List)):
        stored = datasets.Image(decode=False)
        rows = rows.cast_column(column, stored if isinstance(kind, datasets.Image) else datasets.List(stored))
    if not home:
        return _pictures_of(rows, column, None, lambda path: fsspec.open(path).open().read())
    light = [n for n in ("id", "kind") if n in names] + [column] * isinstance(kind, datasets.List)
    several = rows.select_columns(light) if light else ({} for _ in range(len(rows)))
    return _pictures_of(several, column, lambda number: rows[number][column], home.read)
