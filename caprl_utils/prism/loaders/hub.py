"""Opening a benchmark's data in its Hugging Face layout: hub id, parquet files, JSONL or a saved dataset."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import Benchmark
from caprl_utils.prism.loaders.images import inside, open_image

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the data are to come from. What is None is taken from the registry.

    path: local data instead of the hub: a parquet or JSONL file, a folder of parquet files, or a folder
        written by `Dataset.save_to_disk`.
    columns: expected column name -> name in this copy, for copies with other names.
    """

    path: Path | None = None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def described(self, facts: Benchmark) -> dict[str, Any]:
        """For the result record."""
        hub = facts.hub
        if self.path is not None or hub is None:
            return {"path": str(self.path)}
        return {
            "dataset": self.dataset or hub.id,
            "config": self.config or hub.config,
            "split": self.split or hub.split,
            "revision": self.revision or hub.revision,
        }


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a dataset whose image columns are read only when an image is opened."""

    data: Dataset
    lazy: frozenset[str]
    names: Mapping[str, str]
    root: Path | None
    label: str

    def rows(self) -> Iterator[Record]:
        """Every row without its images, in order."""
        rest = [name for name in self.data.column_names if name not in self.lazy]
        light = self.data.select_columns(rest) if rest else None
        for index in range(len(self.data)):
            yield Record(self, index, light[index] if light is not None else {})

    def cell(self, index: int, column: str) -> Any:
        """One cell of an image column, as stored (not decoded)."""
        return self.data.select_columns([column])[index][column]


@dataclass(frozen=True, slots=True)
class Record:
    """One row. Cells are asked for by the registry's column names; overrides are applied here."""

    table: Table
    index: int
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{self.table.label}, row {self.index}"

    def get(self, column: str, default: Any = None) -> Any:
        """The cell of a text column, `default` if there is no such column or it is empty."""
        value = self.values.get(self.table.names.get(column, column))
        return default if value is None else value

    def text(self, column: str) -> str:
        """The cell as text. Raises UserError if it is empty or no text or number."""
        value = self.get(column)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            return str(value)
        raise UserError(f"column {column!r} holds {_shown(value)}, text is needed")

    def has_image(self, column: str) -> bool:
        return self.table.names.get(column, column) in self.table.data.column_names

    def image(self, column: str, position: int = 0) -> Callable[[], Image.Image]:
        """A function that opens the image in `column` (its `position`-th, if the cell is a list)."""
        table, index, where = self.table, self.index, f"{self.where}, column {column!r}"
        name = table.names.get(column, column)

        def load() -> Image.Image:
            value = table.cell(index, name)
            if isinstance(value, list):
                if position >= len(value):
                    raise UserError(f"{where}: {len(value)} images, number {position + 1} is needed")
                value = value[position]
            if isinstance(value, str) and name not in _BASE64_COLUMNS:
                value = inside(_root(table, where), value, where)
            return open_image(value, where)

        return load

    def image_hash(self, column: str) -> str:
        """Hash of the stored image: equal for questions about the same image."""
        value = self.table.cell(self.index, self.table.names.get(column, column))
        value = value[0] if isinstance(value, list) and value else value
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(data, str):
            data = data.encode()
        if not isinstance(data, (bytes, bytearray)):
            raise UserError(f"column {column!r} holds {_shown(value)}, an image is needed")
        return hashlib.sha256(data).hexdigest()[:16]


_BASE64_COLUMNS = {"bytes"}


def _root(table: Table, where: str) -> Path:
    if table.root is None:
        raise UserError(f"{where}: the data hold only a path; download them with their images and pass path=")
    return table.root


def open_table(facts: Benchmark, origin: Origin, *, config: str | None = None) -> Table:
    """The benchmark's rows. Raises UserError when they are absent or lack a column.

    Args:
        config: another configuration of the same dataset (GQA keeps its images in one).
    """
    data = _open_local(facts, origin.path) if origin.path else _open_hub(facts, origin, config)
    names = dict(origin.columns)
    label = str(origin.path or origin.dataset or (facts.hub.id if facts.hub else facts.key))
    wanted = facts.columns.image if facts.columns else ()
    lazy = {names.get(name, name) for name in wanted} | {
        name for name, feature in data.features.items() if _is_image(feature)
    }
    root = origin.path if origin.path is None or origin.path.is_dir() else origin.path.parent
    lazy &= set(data.column_names)
    return Table(_undecoded(data), frozenset(lazy), names, root, label)


def require_columns(table: Table, columns: tuple[str, ...], facts: Benchmark) -> None:
    """Raises UserError naming the columns that are missing, with the nearest names there are."""
    present = table.data.column_names
    missing = [name for name in columns if table.names.get(name, name) not in present]
    if not missing:
        return
    hints = []
    for name in missing:
        near = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
        hints.append(f"{name!r}" + (f" (there is {near[0]!r})" if near else ""))
    raise UserError(
        f"{table.label} lacks the column {', '.join(hints)} of {facts.name}; it has {', '.join(present)}. "
        "Pass columns={expected: actual} for a copy with other names"
    )


def _open_local(facts: Benchmark, path: Path) -> Dataset:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if not path.exists():
        raise UserError(f"no data at {path}. {how_to_get(facts)}")
    try:
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            loaded = load_from_disk(str(path))
            return _only_split(loaded, facts, path) if isinstance(loaded, DatasetDict) else loaded
        files = [path] if path.is_file() else sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.jsonl"))
        if not files:
            raise UserError(f"{path} holds no parquet or JSONL file. {how_to_get(facts)}")
        kind = "parquet" if files[0].suffix == ".parquet" else "json"
        found = load_dataset(kind, data_files=[str(file) for file in files], split="train")
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a dataset: {error}") from error
    assert isinstance(found, Dataset)
    return found


def _only_split(loaded: Any, facts: Benchmark, path: Path) -> Dataset:
    wanted = facts.hub.split if facts.hub else None
    if wanted in loaded:
        return loaded[wanted]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise UserError(f"{path} has the splits {', '.join(loaded)}; {facts.name} is scored on {wanted!r}")


def _open_hub(facts: Benchmark, origin: Origin, config: str | None) -> Dataset:
    from datasets import load_dataset

    hub = facts.hub
    if hub is None:
        raise UserError(f"{facts.name} is not a hub dataset; load it by its key")
    arguments = {
        "name": config or origin.config or hub.config,
        "split": origin.split or hub.split,
        "revision": origin.revision or hub.revision,
        "data_files": hub.data_files,
    }
    try:
        return load_dataset(origin.dataset or hub.id, **{k: v for k, v in arguments.items() if v is not None})
    except Exception as error:  # the hub client raises many types: offline, no such id, no access, no split
        first = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {first[0] if first else 'no message'}"
        raise UserError(
            f"{origin.dataset or hub.id} could not be loaded ({reason}). {how_to_get(facts)}"
        ) from error


def how_to_get(facts: Benchmark) -> str:
    """What is missing and how to get it: id, revision, licence, size, command."""
    if facts.hub is None:
        return facts.needs()
    return (
        f"Needed: {facts.needs()}. Get it on a machine with access: `hf download {facts.hub.id} "
        f"--repo-type dataset --local-dir DIR`, then pass path=DIR (or a parquet file in it), or another id "
        "with dataset=, config=, split=, revision="
    )


def _is_image(feature: Any) -> bool:
    from datasets import Image

    inner = getattr(feature, "feature", feature)
    if isinstance(feature, list) and feature:
        inner = feature[0]
    return isinstance(inner, Image)


def _undecoded(data: Dataset) -> Dataset:
    """The same rows with images left as stored, so that reading a row decodes nothing."""
    from datasets import Image, List

    for name, feature in data.features.items():
        if isinstance(feature, Image):
            data = data.cast_column(name, Image(decode=False))
        elif _is_image(feature):
            data = data.cast_column(name, List(Image(decode=False)))
    return data


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
