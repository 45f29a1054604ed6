"""Benchmark data as samples: from the hub's layouts, local copies of them, the authors' evaluation files, or the maker
of a rendered benchmark. What cannot be used (a row without an answer, a broken image) is set aside with its reason,
counted and told; absent data are a UserError that says how to get them. Images are opened late.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from pathlib import Path, PurePosixPath
from pkgutil import resolve_name
from typing import Any

from PIL import Image

from caprl_utils import paths
from caprl_utils.captions.export import read_tables
from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.files import text_lines
from caprl_utils.image_sources import csv_table
from caprl_utils.images import BadImageError, in_threads, is_strip, open_image
from caprl_utils.paths import shown
from caprl_utils.prism.benchmarks import Benchmark, get_benchmark, load_registry
from caprl_utils.prism.layouts import Row, described, samples_of, shuffle_captionqa
from caprl_utils.records import Sample
from caprl_utils.schema import PRISM_BENCHMARKS, Profile

MAX_BAD_SHARE, FEW = 0.05, 3  # ours: beyond both, data (or a model) are another thing than expected
_BAD_CELLS = (UserError, ValueError, LookupError, TypeError, AttributeError)  # cells of other types than the layout's
_SPLITS = ("train", "test", "testmini", "testdev", "val", "validation", "valid", "dev", "eval", "all")
_GROUPS = {"mmbench": "image_id", "wemath": "ID"}  # whose metric groups rows
Read = tuple[list[Sample], dict[str, str], Mapping[str, Any]]  # samples, why others cannot be used, what was read
log = logging.getLogger(__name__)


def too_many(bad: int, total: int) -> bool:
    """Whether so many of them cannot be used that the rest says nothing."""
    return bad == total > 0 or bad > max(FEW, MAX_BAD_SHARE * total)


class Samples(list[Sample]):
    """Samples, and per benchmark what was set aside (place or id -> reason) and where they came from."""

    def __init__(self, items: Iterable[Sample] = ()):
        super().__init__(items)
        self.set_aside: dict[str, dict[str, str]] = {}
        self.origins: dict[str, Mapping[str, Any]] = {}


def load_samples(profile: Profile, benchmarks: Sequence[str] | None = None, num_samples: int | None = None) -> Samples:
    """The samples of several benchmarks, in the order given: keys of the registry, or KEY=PATH for local data (as in
    `prism.paths`); these and num_samples (of each) are the profile's by default. With scoring "caprl" the authors'
    files (`prism.evaluation_files`) are read instead. Raises UserError when data are missing.
    """
    settings = profile.prism
    count = settings.num_samples if num_samples is None else num_samples
    files = paths.HOME / settings.evaluation_files if settings.evaluation_files else None
    found = Samples()
    for name in dict.fromkeys(settings.benchmarks if benchmarks is None else benchmarks):
        key, _, path = name.partition("=")
        path = path or (paths.HOME / settings.paths[key] if key in settings.paths else "")
        authors = settings.scoring == "caprl" or get_benchmark(key).hub is None
        part = load(key, count, profile.seed, Path(path) if path else None, files if authors else None)
        found += part
        found.set_aside |= part.set_aside
        found.origins |= part.origins
    if not found:
        raise UserError(f"{count} samples of each benchmark hold no whole question; ask for more")
    return found


def load(
    benchmark: str, num_samples: int | None = None, seed: int = 0, path: Path | None = None, files: Path | None = None
) -> Samples:  # fmt: skip
    """The samples of a benchmark in its own layout, or from its maker; so many by a draw with `seed`, in the data's
    order (whole groups where the metric groups rows). path: local data instead of the hub: a parquet or JSONL file, a
    folder of such (as `hf download` writes it) or of `Dataset.save_to_disk`. files: the authors' evaluation files.
    Raises UserError for absent data, wrong columns, ids that stand twice, or too many rows set aside.
    """
    facts = get_benchmark(benchmark)
    if facts.loader is not None:
        return Samples(resolve_name(facts.loader)(benchmark, num_samples, seed))
    by_authors = files or facts.hub is None
    samples, bad, origin = _authors_samples(facts, path or files) if by_authors else _from_table(facts, path)
    _refuse(facts, bad, len(samples))
    if twice := [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]:
        told = f"benchmark {facts.key!r}: {len(twice)} ids stand twice, first {twice[0]!r}. Splits or configurations"
        raise UserError(f"{told} are mixed, or a file is there twice: {str(origin)[:500]}")
    if num_samples is not None and num_samples < len(samples):
        groups: dict[Any, list[int]] = {}
        for index, item in enumerate(samples):
            groups.setdefault(item.meta.get(_GROUPS.get(item.benchmark), index), []).append(index)
        order, chosen = list(groups), []
        random.Random(seed).shuffle(order)
        while len(chosen) < num_samples:
            chosen += groups[order.pop(0)]
        samples = [samples[index] for index in sorted(chosen)]
    stored = {i: None for sample in samples for i in sample.images if isinstance(i, StoredImage)}
    problems = dict(in_threads(lambda image: (image, image.problem()), stored))  # now, so that all models get the same
    unopened = {s.id: why for s in samples for i in s.images if (why := problems.get(i))}
    found = Samples(sample for sample in samples if sample.id not in unopened)
    _refuse(facts, unopened, len(found))
    found.origins[facts.key] = origin
    if bad | unopened:
        found.set_aside[facts.key] = bad | unopened
    return found


def _refuse(facts: Benchmark, bad: Mapping[str, str], good: int) -> None:
    """Tell what was set aside; stop where it is too much."""
    if not bad and good:
        return
    first = "; first: {}: {}".format(*next(iter(bad.items()))) if bad else ""
    told = f"benchmark {facts.key!r}: {len(bad)} of {good + len(bad)} rows were set aside{first}"
    if too_many(len(bad), good + len(bad)) or not good:
        raise UserError(f"{told}. That is too much: check that the data have the expected layout")
    log.warning(told)


# The authors' own evaluation files (internlm/CapRL-Evaluation-Files): rows, prompts, SEED's 2,000 questions. A record
# of json_file/NAME.json has `prompt` (chat-template text with one vision slot), `answer`, and `image` (chat messages
# whose image entries are paths below the collection). The caption takes the slot's place.

COLLECTION = "internlm/CapRL-Evaluation-Files"
OWN_PROMPT = "own_prompt"  # in a sample's meta: its question holds its own instruction
_SLOT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"


def protocol(collection: Path) -> list[str]:
    """The settings of the authors' evaluation of all benchmarks whose files are there (author script): their rows and
    prompts, 4 captions an image at temperature 1.0, one sampled answer to each, their scorer.
    """
    files = {b.key: b.caprl.file for b in load_registry().values() if b.caprl and b.caprl.file}
    there = [key for key, file in files.items() if (collection / "json_file" / file).is_file()]
    return [
        "prompts=authors", "prism.scoring=caprl", f"prism.evaluation_files={collection.absolute()}",
        f"prism.benchmarks=[{', '.join(there or PRISM_BENCHMARKS)}]", "prism.num_samples=null",
        "prism.captions_per_image=4", "prism.caption_temperature=1.0", "prism.caption_max_tokens=2048",
    ]  # fmt: skip


def _authors_samples(facts: Benchmark, place: Path | None) -> Read:
    """Samples of a benchmark's file. place: the collection, or the file. Raises UserError where there is none."""
    if facts.caprl is None or facts.caprl.file is None:
        raise UserError(f"{facts.name} has no file in {COLLECTION}")
    file = place / "json_file" / facts.caprl.file if place and place.is_dir() else place
    if file is None or not file.is_file():
        raise UserError(
            f"no file {file or facts.caprl.file}. Needed for {facts.name}: {facts.caprl.file} and "
            f"bench_image_folder.zip of {COLLECTION}. Get them: `hf download {COLLECTION} --repo-type dataset "
            f"--local-dir DIR`, unzip the images in DIR, then set prism.evaluation_files=DIR"
        )
    root = file.parent.parent if file.parent.name == "json_file" else file.parent
    samples, bad = [], {}
    for number, record in enumerate(file_rows(file)):
        where = f"{file}, record {number}"
        try:
            if lacking := {"prompt", "answer", "image"} - record.keys():
                raise UserError(f"a record has prompt, answer and image; it lacks {', '.join(sorted(lacking))}")
            prompt, gold, names = record["prompt"], record["answer"], _image_names(record["image"])
            if not isinstance(prompt, str) or prompt.count(_SLOT) != 1:
                raise UserError("the prompt lacks the exact vision slot, so no caption would enter it")
            if not isinstance(gold, (str, int, float, list)) or isinstance(gold, bool) or gold in ("", []):
                raise UserError(f"the answer is {gold!r}, a text, a number or a list is needed")
            if not names:
                raise UserError("no image path in the record's image entry")
            images = tuple(StoredImage(inside(root, name, where).read_bytes, f"{where}, {name}") for name in names)
        except UserError as error:
            bad[f"record {number}"] = str(error)
            continue
        question = prompt.split(_SLOT, 1)[1].split("<|im_end|>", 1)[0].rstrip()
        gold, meta = gold if isinstance(gold, list) else str(gold), {"image_id": "+".join(names), OWN_PROMPT: True}
        samples.append(Sample(str(record.get("id", number)), facts.key, images, question, gold, meta=meta))
    return samples, bad, {"path": str(file), "collection": COLLECTION}


def _image_names(value: Any) -> list[str]:
    """Image paths in chat messages, a path, or a list of paths."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        inner = value.get("content") if isinstance(value.get("content"), list) else None
        value = [inner, *(value.get(key) for key in ("image", "image_url", "url"))]
    return [name for part in value for name in _image_names(part)] if isinstance(value, list) else []


def file_rows(file: Path) -> list[Mapping[str, Any]]:
    """The rows of a .json, .jsonl, .csv, .tsv or .parquet file without its pictures; of a JSON object those of the last
    list of rows in it, or what it maps names to (as image_id and caption).
    """
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            fields = {field.name: str(field.type) for field in pq.read_schema(file)}
            light = [name for name, kind in fields.items() if "binary" not in kind]
            beside = (name for name, kind in fields.items() if re.match("struct<.*binary.*path: string", kind))
            light += [f"{name}.path" for name in beside]
            rows = [row for table in read_tables(file, light) for row in table.to_pylist()]
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for _, line in text_lines(file)]
        else:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                rows = json.load(lines) if file.suffix == ".json" else list(csv_table(lines))
    except (ValueError, csv.Error) as error:  # JSON, UTF-8, parquet
        raise UserError(f"{shown(file)} is no sound {file.suffix} file: {error}") from None
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        rows = lists[-1] if lists else [{"image_id": name, "caption": text} for name, text in rows.items()]
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if wide := next((number for number, row in enumerate(rows, 1) if None in row), None):
        raise UserError(f"{shown(file)}, row {wide} has more cells than the head: put texts with commas in quotes")
    return rows


# A data set in the hub's layout


def _from_table(facts: Benchmark, path: Path | None) -> Read:
    rows, origin = _rows(facts, path)
    samples: list[Sample] = []
    bad: dict[str, str] = {}
    for number, row in enumerate(rows):
        if any(row.get(column) != value for column, value in facts.hub.keep.items()):
            continue
        try:
            samples += samples_of(row, number, facts)
        except _BAD_CELLS as error:
            bad[f"row {number}"] = str(error)
    if facts.hub.images_config:  # GQA's images have a configuration of their own
        others, _ = _rows(facts, path, images=True)
        found = {str(row.get("id")): row["image"] for row in others}
        if absent := sorted({str(item.meta["image_id"]) for item in samples} - found.keys()):
            raise UserError(f"{path or facts.hub.id} lacks {len(absent)} images of GQA questions, first: {absent[0]}")
        samples = [replace(item, images=found[str(item.meta["image_id"])]) for item in samples]
    if facts.key == "captionqa":
        samples = shuffle_captionqa(samples)
    return samples, bad, origin


def _rows(facts: Benchmark, path: Path | None, images: bool = False) -> tuple[Iterator[Row], Mapping[str, Any]]:
    """Every row of the benchmark, or of the configuration of its images, in order, and what is read. Raises UserError
    when they are absent, or columns are.
    """
    from datasets import load_dataset

    hub, roles = facts.hub, facts.columns
    config = hub.images_config if images else hub.config
    origin: dict[str, Any] = {"config": config, "split": hub.split}
    if path:
        data, files = _open_local(facts, path, config)
        origin |= {"path": str(path), "files": files}
    else:
        try:
            data = load_dataset(hub.id, config, split=hub.split, revision=hub.revision, data_files=hub.data_files)
        except Exception as error:  # the hub client raises many types: offline, no such id, no access, no split
            reason = f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])}"
            raise UserError(f"{hub.id} could not be loaded ({reason}). {how_to_get(facts)}") from error
        origin |= {"dataset": hub.id, "revision": hub.revision}
    there, label, root = data.column_names, str(path or hub.id), path if path is None or path.is_dir() else path.parent
    if facts.key == "mmmu_pro" and "image" in there:  # config vision: all is in the picture
        needed = roles.answer
    else:  # of several images only the first is in every row
        own = () if hub.images_config else roles.image[:1]
        needed = ("id", "image") if images else (*own, *roles.question[:1], *roles.options, *roles.answer[:1])
    if missing := [repr(name) + did_you_mean(name, there) for name in needed if name not in there]:
        told = f"{label} lacks columns of {facts.name}: {', '.join(missing)}. It has {', '.join(there)};"
        raise UserError(f"{told} for a copy with other names change columns in configs/benchmarks.yaml")
    late = {name for name, feature in data.features.items() if "Image(" in repr(feature)} | {*roles.image} & {*there}
    data = data.with_format("arrow")
    rows = (row for batch in data.remove_columns([*late]).iter(1000) for row in batch.to_pylist())

    def whole(index: int, row: dict[str, Any]) -> Row:
        cells = {name: value for name, value in row.items() if value is not None}
        places = {name: f"{label}, row {index}, column {name!r}" for name in late}
        return cells | {name: _images(data, index, name, where, root) for name, where in places.items()}

    return starmap(whole, enumerate(rows)), origin


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


def _images(data: Any, index: int, column: str, where: str, root: Path | None) -> tuple[StoredImage, ...]:
    """The image in a cell, or all images of a list, to be opened when they are called. data: in arrow's format."""
    listed = "List(" in repr(data.features[column])

    def cell() -> Any:  # a lazy arrow scalar
        return data.select_columns([column])[index].column(0)[0]

    def read(place: int) -> bytes:
        value = (cell()[place] if listed else cell()).as_py()
        if isinstance(value, Mapping):  # the storage form of `datasets.Image`
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str) and column == "bytes":  # of MME-RealWorld: base64 text
            return base64.b64decode(value.split(",", 1)[-1])
        if isinstance(value, str):
            return inside(root, value, where).read_bytes()
        if not isinstance(value, bytes):
            raise UserError(f"{where} holds {described(value)}, an image is needed")
        return value

    count = 1 if not listed else len(cell()) if cell().is_valid else 0
    return tuple(StoredImage(partial(read, place), where) for place in range(count))


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


def _open_local(facts: Benchmark, path: Path, config: str | None) -> tuple[Any, list[str]]:
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
    others = {name.parts[0] for name in names.values() if len(name.parts) > 1} - {"data", *_SPLITS}
    if others and (len(others) > 1 or (folder == path and config not in (None, "default"))):
        raise UserError(
            f"{path} holds {', '.join(sorted(others))}; {facts.name} is scored on the configuration "
            f"{config or 'default'!r}. Name its folder: {facts.key}={path}/..."
        )
    words = {file: re.split(r"[^a-z0-9]+", name.as_posix().lower()) for file, name in names.items()}
    by_split = {s: found for s in _SPLITS if (found := [file for file in files if s in words[file]])}
    return by_split[_chosen(by_split, facts, path)] if by_split else files


def _chosen(splits: Mapping[str, Any], facts: Benchmark, path: Path) -> str:
    wanted, same = facts.hub.split, ("validation", "val", "valid", "dev")
    for name in (wanted, *(same if wanted in same[:2] else ())):
        if name in splits:
            return name
    raise UserError(
        f"{path} has the splits {', '.join(splits)}; {facts.name} is scored on {wanted!r}. To take a file all the "
        f"same, name it: {facts.key}=FILE"
    )


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
