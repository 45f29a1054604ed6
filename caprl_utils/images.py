"""Images: the one way to open a picture, and whatever an image set can be read from.

A source is a folder, a .parquet or .tar file or a folder of such, a list of paths (.txt, .jsonl, .csv), a data set of
Hugging Face (saved to disk, or by its id), or images that are drawn ("mini-world:SPLIT:COUNT:SEED"). Folders and files
may be local or anywhere that fsspec reaches (s3://, gs://, hf://). Images are read one at a time, and no file outside
the source's own folder is opened.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import posixpath
import stat
import tarfile
import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, partial
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from caprl_utils.errors import UserError
from caprl_utils.hashing import value_hash
from caprl_utils.paths import shown
from caprl_utils.registry import drawn_source
from caprl_utils.schema import Profile

MAX_PIXELS = 100_000_000  # ours: above all benchmarks' images; a picture of so many takes 300 MB
MAX_ASPECT = 200  # Qwen2.5-VL's image processor refuses more
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LISTS = (".txt", ".jsonl", ".csv")
# Ours: where data sets that we have seen name an image's file.
IMAGE_KEYS = ("image", "image_path", "img_path", "image_name", "path", "file_name", "images")
_PARQUET_ROWS = 64  # rows held at once
Thing = TypeVar("Thing")


# Opening


class BadImage(StrEnum):
    """Why an image cannot be used."""

    EMPTY = "empty file"
    NOT_AN_IMAGE = "not an image"
    TRUNCATED = "truncated or corrupt"
    TOO_LARGE = "too many pixels"
    TOO_NARROW = "aspect ratio too large"
    ANIMATED = "animated"
    CMYK = "CMYK colours"
    WRONG_EXTENSION = "extension does not match the content"
    OUTSIDE = "path outside the root"
    UNREADABLE = "cannot be read"


class BadImageError(UserError):
    """An image that cannot be used: the reason, and what of it is wrong."""

    def __init__(self, reason: BadImage, detail: object = None) -> None:
        self.reason, self.detail = reason, None if detail is None else str(detail)[:200]
        super().__init__(reason if detail is None else f"{reason} ({self.detail})")


def open_image(data: bytes) -> Image.Image:
    """RGB pixels of an image file, upright (EXIF), transparent places white. Raises BadImageError."""
    return _pixels(peek(data))


def peek(data: bytes | Path) -> Image.Image:
    """An image's header: size, mode and format, nothing decoded. Raises BadImageError, and FileNotFoundError.

    The only place that opens an image; what has more than `MAX_PIXELS` is refused before it is decoded.
    """
    if isinstance(data, bytes) and not data:
        raise BadImageError(BadImage.EMPTY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a lower limit
            opened = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except UnidentifiedImageError:
        raise BadImageError(BadImage.NOT_AN_IMAGE) from None
    except Image.DecompressionBombError as error:
        raise BadImageError(BadImage.TOO_LARGE, error) from None
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise what they like on broken headers
        raise BadImageError(BadImage.TRUNCATED, error) from None
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise BadImageError(BadImage.TOO_LARGE, f"{width} x {height}, the limit is {MAX_PIXELS}")
    return opened


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB pixels; transparent places become white, as a viewer shows them."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    elif image.mode.startswith("I") or image.mode == "F":
        low, high = image.getextrema()
        image = image.point(lambda value: (value - low) * (255 / max(high - low, 1))).convert("L")
    return image.convert("RGB")


def fit(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """RGB pixels as a model sees them: an image of more than max_pixels scaled down, its shape kept.

    The one place where `ModelConfig.max_pixels` is obeyed, before any processor or server rounds to its patches.
    """
    width, height = image.size
    image = as_rgb(image)
    if max_pixels is None or width * height <= max_pixels:
        return image
    factor = math.sqrt(max_pixels / (width * height))
    size = max(1, int(width * factor)), max(1, int(height * factor))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _pixels(opened: Image.Image) -> Image.Image:
    try:
        opened.load()
        return as_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:
        raise BadImageError(BadImage.TRUNCATED, error) from None


def _check_form(opened: Image.Image, path: str | None) -> None:
    """Refuse what a captioner is not to see: strips, animations, print colours, and files that lie."""
    width, height = opened.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImageError(BadImage.TOO_NARROW, f"{width} x {height}")
    if getattr(opened, "n_frames", 1) > 1:
        raise BadImageError(BadImage.ANIMATED, f"{opened.n_frames} frames")
    if opened.mode == "CMYK":
        raise BadImageError(BadImage.CMYK)
    suffix = Path(path).suffix.lower() if path else ""
    expected = Image.registered_extensions().get(suffix)
    if suffix and expected not in (opened.format, "JPEG" if opened.format == "MPO" else opened.format):
        raise BadImageError(BadImage.WRONG_EXTENSION, f"{suffix} holds {opened.format}")


@dataclass(eq=False)
class ImageItem:
    """One image of a source; it is read when it is asked for.

    load: gives the file's bytes, or pixels where there is no file; raises BadImageError. key: where the image stands
    in its source (a path, FILE.parquet#ROW, FILE.tar#MEMBER, #ROW). path: the file's name, if it has one. meta: what
    the source knows of it.
    """

    id: str
    load: Callable[[], bytes | Image.Image]
    key: str = ""
    kind: str | None = None
    path: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def open(self) -> Image.Image:
        """RGB pixels, nothing kept. Raises BadImageError, also for the forms that are not used."""
        data = self.load()
        if isinstance(data, Image.Image):
            return data
        opened = peek(data)
        _check_form(opened, self.path)
        return _pixels(opened)

    @cached_property
    def _opened(self) -> tuple[Image.Image | None, BadImageError | None]:
        try:
            return self.open(), None
        except BadImageError as error:
            return None, error

    @property
    def image(self) -> Image.Image | None:
        """The pixels, kept as long as the item; None where there is a problem."""
        return self._opened[0]

    @property
    def problem(self) -> BadImage | None:
        """Why the image cannot be used."""
        return self._opened[1] and self._opened[1].reason

    @property
    def detail(self) -> str | None:
        """More about the problem."""
        return self._opened[1] and self._opened[1].detail

    def encoded(self) -> bytes:
        """The file's own bytes, or the pixels as PNG."""
        data = self.load()
        if isinstance(data, bytes):
            return data
        buffer = io.BytesIO()
        data.save(buffer, format="PNG")
        return buffer.getvalue()


def in_threads(work: Callable[[Thing], Any], things: Iterable[Thing]) -> Iterator[Any]:
    """work(thing) in the order of the things, a few ahead of the reader (decoding frees the interpreter)."""
    source = iter(things)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(work, thing) for thing in islice(source, 16)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(work, thing) for thing in islice(source, 1)]


# Sources


def open_images(profile: Profile, split: str = "rl") -> Iterator[ImageItem]:
    """The first `images.num_images` images of the profile's source."""
    settings = profile.images
    source = settings.source
    if drawn_source(source):
        source = f"{source}:{split}:{settings.num_images}:{profile.seed}"
    return islice(read_source(source, settings.kinds), settings.num_images)


def read_source(source: str, kinds: Sequence[str] | None = None) -> Iterator[ImageItem]:
    """All images of a source (see the module), in its own order, each with an id that stays the same.

    A list is a .txt file with one path a line, or a .jsonl or .csv file with the path under one of `IMAGE_KEYS`;
    paths start at the list's folder and must stay below it. kinds: only images whose first folder (or `kind` column)
    is one of these. Memory: the names of one local folder at a time, some 70 bytes each. Raises UserError when nothing
    is there, for a row of a list without a path, and for a file that cannot be read as what its name says.
    """
    if drawn := drawn_source(source):
        split, count, seed = _split_count_seed(source)
        return (_drawn(*drawn.image_at(split, number, kinds, seed)) for number in range(count))
    place = _Place.of(source)
    if place.files.isdir(place.root):
        images = _folder(place, source)
    elif place.files.isfile(place.root):
        images = _file(*place.split())
    elif place.remote or Path(source).suffix or Path(source).is_absolute() or source.startswith("."):
        raise UserError(
            f"no {source if place.remote else shown(source)}; name a folder, a .parquet or .tar file, or a list of "
            f"paths ({', '.join(LISTS)})"
        )
    else:
        images = _hub(source)
    return (image for image in images if kinds is None or image.kind in kinds)


def is_hub(source: str) -> bool:
    """Whether a source is a data set's id, which can be streamed only from its start."""
    return not (drawn_source(source) or "://" in source or Path(source).expanduser().exists())


def count_images(source: str, kinds: Sequence[str] | None = None) -> int | None:
    """How many images a source has; None where only reading them all tells."""
    if drawn_source(source):
        return _split_count_seed(source)[1]
    return None if is_hub(source) else sum(1 for _ in read_source(source, kinds))


def fingerprint(source: str) -> str:
    """Hash of what the source holds: names, sizes and times of its files (and of those that a list names), or its
    id. Files are hashed as a stream; memory as for `read_source`.
    """
    place = None if drawn_source(source) else _Place.of(source)
    if place is None or not place.files.exists(place.root):
        return value_hash(source)
    digest = hashlib.sha256()
    if place.files.isdir(place.root):
        names, home = place.walk(), place
    else:
        home, name = place.split()
        names = chain([name], _listed_names(home, name) if name.endswith(LISTS) else ())
    for name in names:
        with suppress(
            OSError, ValueError, BadImageError
        ):  # a link to nowhere, or no path: told when it is read
            if (state := home.state(name)) is not None:
                digest.update(f"{json.dumps(name)} {state}\n".encode())
    return digest.hexdigest()[:16]


def _split_count_seed(source: str) -> tuple[str, int, int]:
    name, *parts = source.split(":")
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in parts[1:]):
        raise UserError(f"{source!r}: rendered images are named {name}:SPLIT:COUNT, as {name}:rl:200")
    return parts[0], int(parts[1]), int(parts[2]) if len(parts) == 3 else 0


def _drawn(name: str, image: Image.Image, kind: str, meta: dict[str, Any]) -> ImageItem:
    return ImageItem(name, lambda: image, name, kind, meta=meta)


@dataclass(frozen=True)
class _Place:
    """A folder (or file) of a file system; names below it are opened, others are not."""

    files: Any  # fsspec.AbstractFileSystem
    root: str

    @classmethod
    def of(cls, source: str) -> _Place:
        """Where a source lies. Raises UserError for a store that cannot be reached."""
        import fsspec

        local = "://" not in source
        try:
            files, root = fsspec.core.url_to_fs(str(Path(source).expanduser().resolve()) if local else source)
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
        with suppress(ValueError):  # a name that is no path is told when it is read
            target = target if self.remote else os.path.realpath(target)
        if not target.startswith(self.root.rstrip("/") + "/"):
            raise BadImageError(BadImage.OUTSIDE)
        return target

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file's bytes, or some of them. Raises BadImageError."""
        try:
            return self.files.cat_file(self.full(name), start=start, end=end)
        except (OSError, ValueError):
            raise BadImageError(BadImage.UNREADABLE) from None

    def open(self, name: str) -> Any:
        """A file to read in."""
        return self.files.open(posixpath.join(self.root, name), "rb")

    def state(self, name: str) -> str | None:
        """Size and time (or tag) of a file; None for what is no file. Raises OSError or ValueError."""
        if not self.remote:
            found = os.stat(os.path.join(self.root, name))
            return f"{found.st_size} {found.st_mtime_ns}" if stat.S_ISREG(found.st_mode) else None
        info = self.files.info(self.full(name))  # of the listing that `walk` has fetched
        return f"{info['size']} {info.get('ETag') or info.get('mtime') or info.get('updated')}"

    def walk(self, inside: str = "") -> Iterator[str]:
        """Names of all files below, in the order of sorted paths; links to folders are not followed.

        Of a local folder only the names of the folders on the way down are held. Raises UserError for a closed one.
        """
        if self.remote:
            yield from (name[len(self.root) :].lstrip("/") for name in sorted(self.files.find(self.root)))
            return
        folder = posixpath.join(self.root, inside)
        try:
            with os.scandir(folder) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except PermissionError:
            raise UserError(f"the folder {shown(folder)} cannot be read: permission denied") from None
        found.sort(reverse=True)
        while found:
            name, is_folder = found.pop()
            yield from self.walk(f"{inside}{name}/") if is_folder else [inside + name]


def _by_path(home: _Place, name: str) -> ImageItem:
    """A file by its path below `home`; its first folder is the kind."""
    first, _, rest = name.partition("/")
    return ImageItem(name, partial(home.read, name), name, first if first and rest else None, name)


def _folder(place: _Place, source: str) -> Iterator[ImageItem]:
    """A saved data set, the shards in a folder, or the image files below it, sorted."""
    names = sorted(posixpath.basename(name.rstrip("/")) for name in place.files.ls(place.root, detail=False))
    if "state.json" in names:
        import datasets

        yield from _rows(datasets.load_from_disk(source if place.remote else place.root), by_number=True)
    elif shards := [name for name in names if name.endswith((".parquet", ".tar"))]:
        for name in shards:
            yield from _file(place, name)
    else:
        found = (name for name in place.walk() if name.lower().endswith(SUFFIXES))
        found = (name for name in found if place.remote or not os.path.isdir(f"{place.root}/{name}"))
        if (first := next(found, None)) is None:
            raise UserError(
                f"no image in {source if place.remote else shown(source)} ({', '.join(SUFFIXES)})"
            )
        yield from (_by_path(place, name) for name in chain([first], found))


def _file(home: _Place, name: str) -> Iterator[ImageItem]:
    if name.endswith(".parquet"):
        return _parquet(home, name)
    if name.endswith(".tar"):
        return _tar(home, name)
    if name.endswith(LISTS):
        return (_by_path(home, path) for path in _listed_names(home, name))
    raise UserError(
        f"{name} is neither a folder nor a .parquet or .tar file nor a list of paths ({', '.join(LISTS)})"
    )


def _listed_names(home: _Place, name: str) -> Iterator[str]:
    """The paths of a list, in its order. Raises UserError naming the row that has none."""
    try:
        with home.open(name) as file:
            lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
            rows = csv.DictReader(lines) if name.endswith(".csv") else (line.strip() for line in lines)
            for number, row in enumerate(rows, start=1):
                if row:
                    yield row if name.endswith(".txt") else _path_in(name, number, row)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no list of paths: it is not UTF-8 text ({error})") from None


def _path_in(file: str, number: int, row: Any) -> str:
    try:
        row = json.loads(row) if isinstance(row, str) else row
        found = next(row[key] for key in IMAGE_KEYS if row.get(key))
    except (ValueError, AttributeError, StopIteration):
        found = None
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, str):
        raise UserError(
            f"{file}, row {number} names no image; a row has its path under one of {', '.join(IMAGE_KEYS)}"
        )
    return found


def _parquet(home: _Place, name: str) -> Iterator[ImageItem]:
    """Rows with an `image` column {bytes, path} or binary; `id` and `kind` columns where there are some.

    A row without bytes names a file relative to the parquet file's folder.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(home.open(name))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{name} is no parquet file that can be read ({error}); fetch it again") from None
    names = table.schema_arrow.names
    if "image" not in names:
        raise UserError(f"{name} has no column `image`; its columns: {', '.join(names)}")
    with_path = pa.types.is_struct(table.schema_arrow.field("image").type)
    columns = [n for n in ("id", "kind") if n in names] + (["image.path"] if with_path else [])
    images = _ParquetImages(home, table)
    rows: Iterable[dict[str, Any]] = repeat({}, table.metadata.num_rows)
    if columns:
        rows = (row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        path = (row.get("image") or {}).get("path")
        row_id = str(row.get("id") or f"{Path(name).stem}-{number:08d}")
        yield ImageItem(row_id, partial(images.load, number), f"{name}#{number}", row.get("kind"), path)


class _ParquetImages:
    """The images of a parquet file by their row; a few rows in memory, quick when asked for in order."""

    def __init__(self, home: _Place, table: Any) -> None:
        self.home, self.table, self.group, self.lock = home, table, None, threading.Lock()
        sizes = (table.metadata.row_group(n).num_rows for n in range(table.num_row_groups))
        self.starts = [0, *accumulate(sizes)]

    def load(self, number: int) -> bytes:
        """The bytes of one row. Raises BadImageError."""
        with self.lock:
            image = self._row(number)
        image = image if isinstance(image, dict) else {"bytes": image}
        if image.get("bytes") is None and image.get("path"):
            return self.home.read(image["path"])
        return image.get("bytes") or b""

    def _row(self, number: int) -> Any:
        group = bisect_right(self.starts, number) - 1
        if group != self.group or number < self.start:
            self.group, self.start = group, self.starts[group]
            self.batches = self.table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=["image"])
            self.batch = next(self.batches)
        while number >= self.start + self.batch.num_rows:
            self.start += self.batch.num_rows
            self.batch = next(self.batches)
        return self.batch.column(0)[number - self.start].as_py()


def _tar(home: _Place, name: str) -> Iterator[ImageItem]:
    """Image members of a webdataset tar, in order; nothing is unpacked to disk."""
    try:
        with home.open(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isfile() and member.name.lower().endswith(SUFFIXES):
                    start = member.offset_data
                    yield ImageItem(
                        f"{Path(name).stem}/{member.name}", partial(home.read, name, start, start + member.size),
                        f"{name}#{member.name}", path=member.name,
                    )  # fmt: skip
    except tarfile.TarError as error:
        raise UserError(f"{name} cannot be read as an uncompressed tar ({error})") from None


def _hub(name: str) -> Iterator[ImageItem]:
    """A data set of Hugging Face, streamed; "NAME:SPLIT" picks a split other than train."""
    import datasets

    name, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:
        raise UserError(f"{name!r} is no folder here and cannot be loaded as a data set ({error})") from None
    yield from _rows(rows, by_number=False)


def _rows(rows: Any, by_number: bool) -> Iterator[ImageItem]:
    """Rows of a data set; those that can be had by number are read when they are asked for."""
    import datasets

    if rows.column_names and "image" not in rows.column_names:
        raise UserError(f"the data set has no column `image`; its columns: {', '.join(rows.column_names)}")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    light: Iterable[dict[str, Any]] = rows
    if by_number:
        columns = [name for name in ("id", "kind") if name in rows.column_names]
        light = rows.select_columns(columns) if columns else repeat({}, len(rows))

    def load(number: int, image: dict[str, Any] | None) -> bytes:
        return (image or rows[number]["image"])["bytes"] or b""

    for number, row in enumerate(light):
        opener = partial(load, number, row.get("image"))
        yield ImageItem(str(row.get("id") or number), opener, f"#{number}", row.get("kind"))
