"""Benchmark data as samples, from the hub's layouts, local copies of them, or the maker of a rendered benchmark.

`load("chartqa")` takes id, config, split and revision from the registry; with path it reads local data of the same
layout. A row that cannot be used is set aside with its reason and told; absent data are a UserError that says how to
get them.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.images import BadImageError, open_image
from caprl_utils.prism.benchmarks import Benchmark, get_benchmark
from caprl_utils.prism.layouts import samples_of, shuffle_captionqa
from caprl_utils.records import Sample
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

MAX_REJECTED_SHARE = 0.05  # ours: beyond it the data are of another layout than expected
log = logging.getLogger(__name__)


def load_samples(
    profile: Profile, benchmarks: Sequence[str] | None = None, num_samples: int | None = None
) -> list[Sample]:
    """The samples of several benchmarks, in the order given.

    benchmarks: keys of the registry, or KEY=PATH for local data; those and num_samples (of each) are the profile's
    Prism settings by default. Raises UserError when data are missing.
    """
    settings = profile.prism
    count = settings.num_samples if num_samples is None else num_samples
    found: list[Sample] = []
    for name in settings.benchmarks if benchmarks is None else benchmarks:
        key, _, path = name.partition("=")
        found += load(key, count, profile.seed, Path(path) if path else None)
    return found


def load(
    benchmark: str, num_samples: int | None = None, seed: int = 0, path: Path | None = None
) -> list[Sample]:
    """The samples of a benchmark in its own layout; those of a rendered benchmark from its maker.

    num_samples: a random subset of this size (drawn with `seed`, in the data's order), by group for
    benchmarks whose metric groups rows. None for all. path: local data instead of the hub: a parquet or JSONL file, a
    folder of such (as `hf download` writes it), or a folder written by `Dataset.save_to_disk`.
    Raises UserError for absent data, wrong columns, or too many rows set aside.
    """
    facts = get_benchmark(benchmark)
    if facts.loader is not None:
        return list(resolve_name(facts.loader)(benchmark, num_samples, seed))
    samples = _read(facts, open_table(facts, path))
    if facts.key == "gqa":
        samples = _join_gqa(facts, path, samples)
    if facts.key == "captionqa":
        samples = shuffle_captionqa(samples)
    return _subset(samples, num_samples, seed)


def _read(facts: Benchmark, table: Table) -> list[Sample]:
    """The samples of all rows that can be used; tells of the others."""
    table.require(_needed_columns(facts, table), facts)
    samples: list[Sample] = []
    rejected: list[str] = []
    for record in table.rows():
        if any(record.get(column) != value for column, value in facts.hub.keep.items()):
            continue
        try:
            samples += samples_of(record, facts)
        except UserError as error:
            rejected.append(f"{table.label}, row {record.index}: {error}")
    total, first = len(samples) + len(rejected), f"; first: {rejected[0]}" if rejected else ""
    if not samples:
        raise UserError(f"benchmark {facts.key!r}: no usable row of {total} in {table.label}{first}")
    if len(rejected) > MAX_REJECTED_SHARE * total:
        raise UserError(
            f"benchmark {facts.key!r}: {len(rejected)} of {total} rows of {table.label} were set aside, more than "
            f"{MAX_REJECTED_SHARE:.0%}{first}. Check that the files have the expected layout"
        )
    if rejected:
        log.warning("%s: %d of %d rows were set aside%s", facts.key, len(rejected), total, first)
    return samples


def _needed_columns(facts: Benchmark, table: Table) -> tuple[str, ...]:
    roles = facts.columns
    if facts.key == "mmmu_pro" and "image" in table.data.column_names:  # config vision: all is in the picture
        return roles.answer
    images = () if facts.hub.images_config else roles.image[:1]  # of several only the first is in every row
    return (*images, *roles.question, *roles.options, *roles.answer)


def _join_gqa(facts: Benchmark, path: Path | None, samples: list[Sample]) -> list[Sample]:
    """Attach GQA's images, which live in a configuration of their own, once per image."""
    table = open_table(facts, path, facts.hub.images_config)
    table.require(("id", "image"), facts)
    images = {str(record.get("id")): record.image("image") for record in table.rows()}
    absent = sorted({str(item.meta["image_id"]) for item in samples} - set(images))
    if absent:
        raise UserError(f"{table.label} lacks {len(absent)} images of GQA questions, first: {absent[0]}")
    return [replace(item, images=(images[str(item.meta["image_id"])],)) for item in samples]


def _subset(samples: list[Sample], num_samples: int | None, seed: int) -> list[Sample]:
    if num_samples is None or num_samples >= len(samples):
        return samples
    groups: dict[Any, list[int]] = {}
    for index, item in enumerate(samples):
        whole = {"mmbench": "image_id", "wemath": "ID"}.get(item.benchmark)
        groups.setdefault(item.meta[whole] if whole else index, []).append(index)
    order = list(groups)
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    while len(chosen) < num_samples:
        chosen += groups[order.pop(0)]
    return [samples[index] for index in sorted(chosen)]


# --- rows of a data set ---


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a dataset in arrow format, so nothing is decoded; the columns `images` are read only when an image is
    opened. root: folder of local data.
    """

    data: Dataset
    images: frozenset[str]
    root: Path | None
    label: str

    def rows(self) -> Iterator[Record]:
        """Every row without its images, in order."""
        rest = [name for name in self.data.column_names if name not in self.images]
        if not rest:
            yield from (Record(self, index, {}) for index in range(len(self.data)))
            return
        batches = self.data.select_columns(rest).iter(1000)
        for index, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield Record(self, index, row)

    def require(self, columns: Sequence[str], facts: Benchmark) -> None:
        """Raises UserError naming the columns that are missing, with the nearest names there are."""
        present = self.data.column_names
        if missing := [name for name in columns if name not in present]:
            near = [difflib.get_close_matches(name, present, n=1, cutoff=0.5) for name in missing]
            hints = [
                repr(name) + (f" (there is {found[0]!r})" if found else "")
                for name, found in zip(missing, near, strict=True)
            ]
            raise UserError(
                f"{self.label} lacks the column {', '.join(hints)} of {facts.name}; it has {', '.join(present)}. "
                "For a copy with other names change columns in configs/benchmarks.yaml"
            )


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

    def image(self, column: str) -> StoredImage:
        """The image in `column` (the first, if the cell is a list), to be opened when it is called."""
        return StoredImage(self.table, self.index, column)


class StoredImage:
    """One image of a table: calling it opens it (RGB)."""

    def __init__(self, table: Table, index: int, column: str):
        self.table, self.index, self.column = table, index, column
        self.where = f"{table.label}, row {index}, column {column!r}"

    def __call__(self) -> Image.Image:
        """Raises UserError naming row and column for what is no image, too large or absent."""
        try:
            return open_image(self._bytes())
        except (BadImageError, ValueError) as error:  # ValueError: base64 text that is none
            raise UserError(f"{self.where}: {error}") from error

    def stored_hash(self) -> str:
        """Hash of the image file, nothing decoded: equal for questions about the same image."""
        return hashlib.sha256(self._bytes()).hexdigest()[:16]

    def _bytes(self) -> bytes:
        value = self.table.data.select_columns([self.column])[self.index].to_pylist()[0][self.column]
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, Mapping):  # the storage form of `datasets.Image`
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str) and self.column == "bytes":  # of MME-RealWorld: base64 text
            return base64.b64decode(value.split(",", 1)[-1])
        if isinstance(value, str):
            return inside(self.table.root, value, self.where).read_bytes()
        if not isinstance(value, bytes):
            raise UserError(f"{self.where} holds {_shown(value)}, an image is needed")
        return value


def inside(root: Path | None, relative: str, where: str) -> Path:
    """The file `relative` names under `root`. Raises UserError (with `where`) if it leaves the root or is missing."""
    if root is None:
        raise UserError(
            f"{where}: the data hold only a path; download them with their images and name the folder"
        )
    root = root.resolve()
    path = (root / PurePosixPath(relative.removeprefix("file://").replace("\\", "/"))).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"{where}: image {relative!r} lies outside {root}; paths must stay inside it")
    if not path.is_file():
        raise UserError(f"{where}: image {relative!r} is missing, expected at {path}")
    return path


def open_table(facts: Benchmark, path: Path | None, config: str | None = None) -> Table:
    """The benchmark's rows, or those of another configuration. Raises UserError when they are absent."""
    config = config or facts.hub.config
    data = _open_local(facts, path, config) if path else _open_hub(facts, config)
    images = {name for name, feature in data.features.items() if "Image(" in repr(feature)}
    images |= {*facts.columns.image} & {*data.column_names}
    root = path if path is None or path.is_dir() else path.parent
    return Table(data.with_format("arrow"), frozenset(images), root, str(path or facts.hub.id))


def _open_local(facts: Benchmark, path: Path, config: str | None) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not path.exists():
        raise UserError(f"no data at {path}. {how_to_get(facts)}")
    if config and (path / config).is_dir():  # a repository of several configurations
        path = path / config
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = load_from_disk(str(path))
            return _only_split(loaded, facts, path) if isinstance(loaded, DatasetDict) else loaded
        files = [path] if path.is_file() else sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.jsonl"))
        if not files:
            raise UserError(f"{path} holds no parquet or JSONL file. {how_to_get(facts)}")
        of_split = [str(file) for file in files if file.name.startswith(facts.hub.split)]
        kind = "parquet" if files[0].suffix == ".parquet" else "json"
        return load_dataset(kind, data_files=of_split or list(map(str, files)), split="train")
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a dataset: {error}") from error


def _only_split(loaded: Any, facts: Benchmark, path: Path) -> Dataset:
    wanted = facts.hub.split
    if wanted not in loaded and len(loaded) > 1:
        raise UserError(f"{path} has the splits {', '.join(loaded)}; {facts.name} is scored on {wanted!r}")
    return loaded[wanted if wanted in loaded else next(iter(loaded))]


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
        f"a machine with access: `hf download {hub.id} --repo-type dataset --local-dir DIR`, then name it "
        f"{facts.key}=DIR (a folder, or a parquet file in it); another copy or revision is named in "
        "configs/benchmarks.yaml"
    )


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
