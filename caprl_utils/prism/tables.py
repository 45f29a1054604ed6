"""Rows of a benchmark's data set, from the hub or a local copy, and their images, opened late."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.images import BadImageError, is_strip, open_image
from caprl_utils.prism.benchmarks import Benchmark

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

_SPLITS = ("train", "test", "testmini", "testdev", "val", "validation", "valid", "dev", "eval", "all")


@dataclass(frozen=True, eq=False)
class StoredImage:
    """One image whose file is read when it is asked for: calling it opens it (RGB)."""

    read: Callable[[], bytes]
    where: str

    def __call__(self) -> Image.Image:
        """Raises UserError naming the place for what is no image, too large, too narrow or absent."""
        try:
            image = open_image(self.read())
        except (BadImageError, ValueError, OSError) as error:  # ValueError: base64 text that is none
            raise UserError(f"{self.where}: {error}") from error
        if is_strip(image.size):
            raise UserError(f"{self.where}: {image.width} x {image.height} pixels, models refuse such strips")
        return image

    def problem(self) -> str | None:
        """Why it cannot be opened."""
        try:
            self()
        except UserError as error:
            return str(error)
        return None

    def stored_hash(self) -> str:
        """Hash of the image file, nothing decoded: equal for questions about the same image."""
        return hashlib.sha256(self.read()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a dataset in arrow format; the columns `images` are read only when an image is opened. root: folder of
    local data. origin: what was read, for the record.
    """

    data: Dataset
    images: frozenset[str]
    root: Path | None
    label: str
    origin: Mapping[str, Any]

    def rows(self) -> Iterator[Record]:
        """Every row without its images, in order."""
        batches = self.data.remove_columns([*self.images]).iter(1000)
        for index, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield Record(self, index, row)

    def require(self, columns: Sequence[str], facts: Benchmark) -> None:
        """Raises UserError naming the columns that are missing, with the nearest names there are."""
        there = self.data.column_names
        if missing := [repr(name) + did_you_mean(name, there) for name in columns if name not in there]:
            told = f"{self.label} lacks columns of {facts.name}: {', '.join(missing)}. It has {', '.join(there)};"
            raise UserError(f"{told} for a copy with other names change columns in configs/benchmarks.yaml")

    def cell(self, index: int, column: str) -> Any:
        """One cell of an image column, as stored (a lazy arrow scalar)."""
        return self.data.select_columns([column])[index].column(0)[0]


@dataclass(frozen=True, slots=True)
class Record:
    """One row."""

    table: Table
    index: int
    values: Mapping[str, Any]

    def get(self, column: str, default: Any = None) -> Any:
        """The cell of a text column, `default` if there is no such column or it is empty."""
        value = self.values.get(column)
        return default if value is None else value

    def first(self, columns: Sequence[str]) -> str:
        """The first cell of these columns that holds something, as text; "" if none does."""
        return next((str(value) for name in columns if (value := self.get(name)) is not None), "")

    def text(self, column: str) -> str:
        """The cell as text. Raises UserError if it is empty or no text or number."""
        value = self.get(column)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            return str(value)
        raise UserError(f"column {column!r} holds {_shown(value)}, text is needed")

    def images(self, column: str) -> tuple[StoredImage, ...]:
        """The image in `column`, or all images of a list, to be opened when they are called."""
        where = f"{self.table.label}, row {self.index}, column {column!r}"
        places: Sequence[int | None] = [None]
        if "List(" in repr(self.table.data.features[column]):
            cell = self.table.cell(self.index, column)
            places = range(len(cell) if cell.is_valid else 0)
        reads = [partial(_read, self.table, self.index, column, place, where) for place in places]
        return tuple(StoredImage(read, where) for read in reads)


def _read(table: Table, index: int, column: str, place: int | None, where: str) -> bytes:
    cell = table.cell(index, column)
    value = (cell if place is None else cell[place]).as_py()
    if isinstance(value, Mapping):  # the storage form of `datasets.Image`
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and column == "bytes":  # of MME-RealWorld: base64 text
        return base64.b64decode(value.split(",", 1)[-1])
    if isinstance(value, str):
        return inside(table.root, value, where).read_bytes()
    if not isinstance(value, bytes):
        raise UserError(f"{where} holds {_shown(value)}, an image is needed")
    return value


def inside(root: Path | None, relative: str, where: str) -> Path:
    """The file `relative` names under `root`. Raises UserError (with `where`) if it leaves the root or is missing."""
    if root is None:
        raise UserError(f"{where}: the data hold only a path; download their images too, name the folder")
    root = root.resolve()
    path = (root / PurePosixPath(relative.removeprefix("file://").replace("\\", "/"))).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"{where}: image {relative!r} lies outside {root}; paths must stay inside it")
    if not path.is_file():
        raise UserError(f"{where}: image {relative!r} is missing, expected at {path}")
    return path


def open_table(facts: Benchmark, path: Path | None, config: str | None = None) -> Table:
    """The benchmark's rows, or those of another configuration. Raises UserError when they are absent."""
    hub, config = facts.hub, config or facts.hub.config
    origin = {"config": config, "split": hub.split}
    if path:
        data, files = _open_local(facts, path, config)
        origin |= {"path": str(path), "files": files}
    else:
        data = _open_hub(facts, config)
        origin |= {"dataset": hub.id, "revision": hub.revision}
    images = {name for name, feature in data.features.items() if "Image(" in repr(feature)}
    images |= {*facts.columns.image} & {*data.column_names}
    root = path if path is None or path.is_dir() else path.parent
    return Table(data.with_format("arrow"), frozenset(images), root, str(path or hub.id), origin)


def _open_local(facts: Benchmark, path: Path, config: str | None) -> tuple[Dataset, list[str]]:
    """The rows of the benchmark's configuration and split in a local copy, and the files that hold them."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not path.exists():
        raise UserError(f"no data at {path}. {how_to_get(facts)}")
    folder = path / config if config and (path / config).is_dir() else path
    try:
        if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
            loaded = load_from_disk(str(folder))
            if isinstance(loaded, DatasetDict):
                loaded = loaded[_chosen(loaded, facts, folder)]
            return loaded, [str(folder)]
        files = [*map(str, [path] if path.is_file() else _files(facts, path, folder, config))]
        kind = "parquet" if files[0].endswith(".parquet") else "json"
        return load_dataset(kind, data_files=files, split="train"), files
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a dataset: {error}") from error


def _files(facts: Benchmark, path: Path, folder: Path, config: str | None) -> list[Path]:
    """The files of a downloaded repository that hold configuration and split: those that its card names, else by name
    (data/SPLIT-*.parquet, CONFIG/SPLIT-*.parquet). Raises UserError where only others are there.
    """
    from datasets import load_dataset_builder

    card = path / "README.md"
    if card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8"):
        split = load_dataset_builder(str(path), config).config.data_files
        return [Path(file) for file in split[_chosen({str(name): name for name in split}, facts, path)]]
    if facts.hub.data_files and (folder / facts.hub.data_files).is_file():
        return [folder / facts.hub.data_files]
    files = sorted(folder.rglob("*.parquet")) or sorted(folder.rglob("*.jsonl"))
    if not files:
        raise UserError(f"{path} holds no parquet or JSONL file. {how_to_get(facts)}")
    names = {file: file.relative_to(folder) for file in files}
    others = {name.parts[0] for name in names.values() if len(name.parts) > 1 and name.parts[0] != "data"}
    others -= {*_SPLITS}
    if others and (len(others) > 1 or (folder == path and config not in (None, "default"))):
        raise UserError(
            f"{path} holds {', '.join(sorted(others))}; {facts.name} is scored on the configuration "
            f"{config or 'default'!r}. Name its folder: {facts.key}={path}/..."
        )
    words = {file: re.split(r"[^a-z0-9]+", name.as_posix().lower()) for file, name in names.items()}
    by_split = {s: found for s in _SPLITS if (found := [file for file in files if s in words[file]])}
    return by_split[_chosen(by_split, facts, path)] if by_split else files


def _chosen(splits: Mapping[str, Any], facts: Benchmark, path: Path) -> str:
    wanted = facts.hub.split
    same = ("validation", "val", "valid", "dev")
    for name in (wanted, *(same if wanted in same[:2] else ())):
        if name in splits:
            return name
    raise UserError(
        f"{path} has the splits {', '.join(splits)}; {facts.name} is scored on {wanted!r}. To take a file all the "
        f"same, name it: {facts.key}=FILE"
    )


def _open_hub(facts: Benchmark, config: str | None) -> Dataset:
    from datasets import load_dataset

    hub = facts.hub
    try:
        return load_dataset(hub.id, config, split=hub.split, revision=hub.revision, data_files=hub.data_files)
    except Exception as error:  # the hub client raises many types: offline, no such id, no access, no split
        reason = f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])}"
        raise UserError(f"{hub.id} could not be loaded ({reason}). {how_to_get(facts)}") from error


def how_to_get(facts: Benchmark) -> str:
    """What is missing and how to get it: id, revision, licence, size, command."""
    hub = facts.hub
    return (
        f"Needed: {facts.name}: dataset {hub.id}, config {hub.config or 'default'}, split {hub.split}, revision "
        f"{hub.revision or 'not pinned (give one)'}, {facts.rows()} rows, licence {facts.licence['name']}. Get it on "
        f"a machine with access: `hf download {hub.id} --repo-type dataset --local-dir DIR`, then set "
        f"prism.paths.{facts.key}=DIR (the folder, or a parquet file in it), or `caprl score --benchmark "
        f"{facts.key}=DIR`; another copy or revision is named in configs/benchmarks.yaml"
    )


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
