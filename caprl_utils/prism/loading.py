"""Benchmark data as samples: from the hub's layouts, local copies of them, the authors' evaluation files, or the maker
of a rendered benchmark. What cannot be used (a row without an answer, a broken image) is set aside with its reason,
counted and told; absent data are a UserError that says how to get them.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.images import in_threads
from caprl_utils.prism.authors import Read, authors_samples
from caprl_utils.prism.benchmarks import Benchmark, get_benchmark
from caprl_utils.prism.layouts import samples_of, shuffle_captionqa
from caprl_utils.prism.tables import StoredImage, Table, open_table
from caprl_utils.records import Sample
from caprl_utils.schema import Profile

MAX_BAD_SHARE, FEW = 0.05, 3  # ours: beyond both, data (or a model) are another thing than expected
_BAD_CELLS = (UserError, ValueError, LookupError, TypeError, AttributeError)  # cells of other types than the layout's
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
    for name in settings.benchmarks if benchmarks is None else benchmarks:
        key, _, path = name.partition("=")
        path = path or (paths.HOME / settings.paths[key] if key in settings.paths else "")
        authors = settings.scoring == "caprl" or get_benchmark(key).hub is None
        part = load(key, count, profile.seed, Path(path) if path else None, files if authors else None)
        found += part
        found.set_aside |= part.set_aside
        found.origins |= part.origins
    return found


def load(
    benchmark: str, num_samples: int | None = None, seed: int = 0, path: Path | None = None, files: Path | None = None
) -> Samples:  # fmt: skip
    """The samples of a benchmark in its own layout; those of a rendered benchmark from its maker.

    num_samples: a random subset of this size (drawn with `seed`, in the data's order), by group for benchmarks whose
    metric groups rows. None for all. path: local data instead of the hub: a parquet or JSONL file, a folder of such (as
    `hf download` writes it), or a folder written by `Dataset.save_to_disk`. files: the authors' evaluation files
    instead (a folder, or the benchmark's JSON in it). Raises UserError for absent data, wrong columns, ids that stand
    twice, or too many rows set aside.
    """
    facts = get_benchmark(benchmark)
    if facts.loader is not None:
        return Samples(resolve_name(facts.loader)(benchmark, num_samples, seed))
    if files or facts.hub is None:
        samples, bad, origin = authors_samples(facts, path or files)
    else:
        samples, bad, origin = _from_table(facts, path)
    _refuse(facts, bad, len(samples))
    twice = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if twice:
        told = f"benchmark {facts.key!r}: {len(twice)} ids stand twice, first {twice[0]!r}. Splits or configurations"
        raise UserError(f"{told} are mixed, or a file is there twice: {str(origin)[:500]}")
    usable, unopened = _with_images(_subset(samples, num_samples, seed))
    _refuse(facts, unopened, len(usable))
    found = Samples(usable)
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


def _from_table(facts: Benchmark, path: Path | None) -> Read:
    """The samples of all rows that can be used, why the others cannot, and what was read."""
    table = open_table(facts, path)
    table.require(_needed_columns(facts, table), facts)
    samples: list[Sample] = []
    bad: dict[str, str] = {}
    for record in table.rows():
        if any(record.get(column) != value for column, value in facts.hub.keep.items()):
            continue
        try:
            samples += samples_of(record, facts)
        except _BAD_CELLS as error:
            bad[f"row {record.index}"] = str(error)
    if facts.key == "gqa":
        samples = _join_gqa(facts, path, samples)
    if facts.key == "captionqa":
        samples = shuffle_captionqa(samples)
    return samples, bad, table.origin


def _needed_columns(facts: Benchmark, table: Table) -> tuple[str, ...]:
    roles = facts.columns
    if facts.key == "mmmu_pro" and "image" in table.data.column_names:  # config vision: all is in the picture
        return roles.answer
    images = () if facts.hub.images_config else roles.image[:1]  # of several only the first is in every row
    return (*images, *roles.question[:1], *roles.options, *roles.answer[:1])


def _join_gqa(facts: Benchmark, path: Path | None, samples: list[Sample]) -> list[Sample]:
    """Attach GQA's images, which live in a configuration of their own, once per image."""
    table = open_table(facts, path, facts.hub.images_config)
    table.require(("id", "image"), facts)
    images = {str(record.get("id")): record.images("image") for record in table.rows()}
    absent = sorted({str(item.meta["image_id"]) for item in samples} - set(images))
    if absent:
        raise UserError(f"{table.label} lacks {len(absent)} images of GQA questions, first: {absent[0]}")
    return [replace(item, images=images[str(item.meta["image_id"])]) for item in samples]


def _with_images(samples: Sequence[Sample]) -> tuple[list[Sample], dict[str, str]]:
    """The samples all of whose images open, and why the others' do not. Every image is opened once, here, so that all
    models are asked the same questions.
    """
    stored = {i: None for sample in samples for i in sample.images if isinstance(i, StoredImage)}
    problems = dict(in_threads(lambda image: (image, image.problem()), stored))
    bad = {s.id: why for s in samples for i in s.images if (why := problems.get(i))}
    return [sample for sample in samples if sample.id not in bad], bad


def _subset(samples: list[Sample], num_samples: int | None, seed: int) -> list[Sample]:
    if num_samples is None or num_samples >= len(samples):
        return samples
    groups: dict[Any, list[int]] = {}
    for index, item in enumerate(samples):
        whole = {"mmbench": "image_id", "wemath": "ID"}.get(item.benchmark)
        groups.setdefault(item.meta.get(whole, index), []).append(index)
    order = list(groups)
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    while len(chosen) < num_samples:
        chosen += groups[order.pop(0)]
    return [samples[index] for index in sorted(chosen)]
