"""Benchmark data as samples, from the hub's layouts, the authors' JSON files, or a local folder.

`load("chartqa")` takes id, config, split and revision from the registry, each of which can be given;
`load("chartqa", path="DIR_OR_PARQUET")` reads local data of the same layout; `load_caprl` reads the
authors' evaluation files and `load_own` a folder of one's own. A row that cannot be used is set aside
with its reason and counted; absent data are a UserError that says how to get them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import Benchmark, get_benchmark
from caprl_utils.prism.loaders.files import load_caprl_file, load_folder
from caprl_utils.prism.loaders.hub import Origin, open_table, require_columns
from caprl_utils.prism.loaders.layouts import LAYOUTS, generic, shuffle_captionqa
from caprl_utils.prism.loaders.sample import MAX_REJECTED_SHARE, Loaded, Rejected, Sample

__all__ = ["Loaded", "Rejected", "Sample", "load", "load_caprl", "load_own"]


def load(
    benchmark: str,
    *,
    path: str | Path | None = None,
    images_path: str | Path | None = None,
    dataset: str | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    max_rejected_share: float = MAX_REJECTED_SHARE,
) -> Loaded:
    """The samples of a benchmark in its own layout; those of a rendered benchmark from its maker.

    Args:
        benchmark: a key of the registry.
        path: local data (parquet, JSONL, or a saved dataset) instead of the hub.
        images_path: GQA only: the local data of its images configuration.
        dataset, config, split, revision: override the registry's.
        columns: expected column -> name in this copy.
        num_samples: a random subset of this size (drawn with `seed`, in the data's order), by image for
            benchmarks whose metric groups rows. None for all.

    Raises:
        UserError: absent data, wrong columns, or too many rows set aside.
    """
    facts = get_benchmark(benchmark)
    if facts.loader is not None:
        return Loaded(
            benchmark, tuple(_maker(facts)(benchmark, num_samples, seed)), (), {"made_by": facts.loader}
        )
    origin = Origin(Path(path) if path else None, dataset, config, split, revision, columns or {})
    samples, rejected = _read(facts, origin)
    if facts.key == "gqa":
        samples = _join_gqa(facts, origin, samples, Path(images_path) if images_path else None)
    if facts.key == "captionqa":
        samples = shuffle_captionqa(samples)
    chosen = tuple(_subset(samples, num_samples, seed))
    return Loaded(benchmark, chosen, tuple(rejected), origin.described(facts)).require(max_rejected_share)


def load_caprl(
    benchmark: str,
    path: str | Path,
    root: str | Path | None = None,
    max_rejected_share: float = MAX_REJECTED_SHARE,
) -> Loaded:
    """The authors' file of a benchmark; see `files.load_caprl_file`."""
    loaded = load_caprl_file(get_benchmark(benchmark), Path(path), Path(root) if root else None)
    return loaded.require(max_rejected_share)


def load_own(benchmark: str, folder: str | Path, max_rejected_share: float = MAX_REJECTED_SHARE) -> Loaded:
    """A folder with samples.jsonl and images; see `files.load_folder`."""
    return load_folder(get_benchmark(benchmark), Path(folder)).require(max_rejected_share)


def _read(facts: Benchmark, origin: Origin) -> tuple[list[Sample], list[Rejected]]:
    table = open_table(facts, origin)
    roles = facts.columns
    if roles is not None:
        images = roles.image[:1] if "image_1" in roles.image else roles.image
        vision_only = facts.key == "mmmu_pro" and "image" in table.data.column_names
        joined = facts.key == "gqa"
        needed = (*roles.question, *roles.options, *roles.answer) if not vision_only else roles.answer
        require_columns(table, needed if joined or vision_only else (*images, *needed), facts)
    layout = LAYOUTS.get(facts.key, generic)
    keep = facts.hub.keep if facts.hub else {}
    samples: list[Sample] = []
    rejected: list[Rejected] = []
    for record in table.rows():
        if any(record.get(column) != value for column, value in keep.items()):
            continue
        try:
            samples.extend(layout(record, facts))
        except UserError as error:
            rejected.append(Rejected(record.where, str(error)))
    return samples, rejected


def _join_gqa(facts: Benchmark, origin: Origin, samples: list[Sample], path: Path | None) -> list[Sample]:
    """Attach GQA's images, which live in a configuration of their own, once per image."""
    if origin.path is not None and path is None:
        raise UserError("GQA keeps its images in a second configuration: pass images_path= beside path=")
    place = replace(origin, path=path)
    table = open_table(facts, place, config=facts.hub.images_config if facts.hub else None)
    require_columns(table, ("id", "image"), facts)
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
        key = item.meta["image_id"] if item.benchmark in ("mmbench", "wemath") else index
        groups.setdefault(key, []).append(index)
    order = list(groups)
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    for key in order:
        if len(chosen) >= num_samples:
            break
        chosen.extend(groups[key])
    return [samples[index] for index in sorted(chosen)]


def _maker(facts: Benchmark) -> Callable[..., list[Sample]]:
    module, _, function = str(facts.loader).partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"benchmark {facts.key!r}: its loader {facts.loader!r} cannot be imported: {error}"
        ) from error
