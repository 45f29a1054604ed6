"""Captions that somebody else made, from a file, matched to the images of benchmarks by what the file calls them."""

from __future__ import annotations

import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_utils.captions.export import caption_in, read_tables
from caprl_utils.errors import UserError
from caprl_utils.files import text_lines
from caprl_utils.hashing import value_hash
from caprl_utils.image_sources import IMAGE_KEYS, csv_table
from caprl_utils.images import has_picture_name
from caprl_utils.paths import shown
from caprl_utils.prism.benchmarks import load_registry
from caprl_utils.prism.sources import PrismImage, Source, written_captions

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
NAME_KEYS = ("image_id", *IMAGE_KEYS, "question_id", "id")  # ours: the first that names an image of the benchmarks


def given_captions(file: Path, images: Sequence[PrismImage]) -> tuple[Source, list[str]]:
    """The captions of a file as a source, and lines for people: how they were matched, what was set aside.

    An image is named under one of `NAME_KEYS`: by its id, with or without the benchmark's name, by its file's name or
    that without suffix. It may have several captions (see `caption_in`), in rows or in a list. Raises UserError for a
    file that cannot be read, a benchmark without a caption, and two names that mean one image.
    """
    rows, index = list(_rows(file)), _index([image.id for image in images])
    named = {key: [(name, row) for row in rows if (name := _name(row.get(key)))] for key in NAME_KEYS}
    key = next((key for key, some in named.items() if any(_image(name, index) for name, _ in some)), "")
    found: dict[str, list[str]] = defaultdict(list)
    names: dict[str, str] = {}
    aside = Counter({f"without {key!r}": len(rows) - len(named.get(key, ()))})
    for name, row in named.get(key, ()):
        said, image = caption_in(row), _image(name, index)
        texts = [text.strip() for text in (said if isinstance(said, list) else [said]) if isinstance(text, str)]
        if image and (other := names.setdefault(image, name)) != name:
            raise UserError(f"{shown(file)}: {other!r} and {name!r} both mean {image}; write whole ids")
        if image and any(texts):
            found[image] += filter(None, texts)
        else:
            aside["without a caption" if image else "of other images than these questions are about"] += 1
    if lacking := [image for image in images if image.benchmark not in {name.partition("/")[0] for name in found}]:
        theirs = [name for some in named.values() for name, _ in some[:2]] or [f"none under {', '.join(NAME_KEYS)}"]
        raise UserError(
            f"{shown(file)} has no caption of {lacking[0].benchmark}. It names {', '.join(theirs[:4])}; its "
            f"images are {', '.join(image.id for image in lacking[:3])} (its name and a suffix may be left out). "
            "--benchmark names others"
        )
    captions = {image: written_captions(image, texts, file.name, lambda text: None) for image, texts in found.items()}
    told = [f"{sum(map(len, found.values()))} captions of {len(found)} images, matched by {key!r}"]
    told += [f"set aside: {count} rows {what}" for what, count in aside.items() if count]
    return Source(file.name, {"source": "given", "captions": value_hash(found)}, lambda images: captions), told


def _name(value: Any) -> str:
    """What a cell calls an image: a path or number, also in a list of one or beside bytes; "" for none."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    value = value.get("path") if isinstance(value, dict) else value
    return str(value).strip() if isinstance(value, (str, int)) else ""


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file; of a JSON object those of the last list of rows in it, or what it maps names to."""
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            light = [field.name for field in pq.read_schema(file) if "binary" not in str(field.type)]
            rows = [row for table in read_tables(file, light) for row in table.to_pylist()]
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for _, line in text_lines(file)]
        else:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                rows = json.load(lines) if file.suffix == ".json" else list(csv_table(lines))
    except ValueError as error:  # JSON, UTF-8, parquet
        raise UserError(f"{shown(file)} is no sound {file.suffix} file: {error}") from None
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        rows = lists[-1] if lists else [{"image_id": name, "caption": text} for name, text in rows.items()]
    return (row for row in rows if isinstance(row, dict))


def _forms(name: str) -> list[str]:
    """How a name may be written, strictest first: whole, without suffix, the last part of its path, both."""
    whole = posixpath.normpath(name.replace("\\", "/"))
    bare = posixpath.splitext(whole)[0] if has_picture_name(whole) else whole
    return [whole, bare, posixpath.basename(whole), posixpath.basename(bare)]


def _index(images: Sequence[str]) -> dict[str, set[str]]:
    """Form -> the images that it may mean; a stricter form wins."""
    index: dict[str, set[str]] = {}
    for level in range(4):
        found: dict[str, set[str]] = defaultdict(set)
        for image in images:
            for name in (image, image.partition("/")[2]):
                found[_forms(name)[level]].add(image)
        index = found | index
    return index


def _image(name: str, index: Mapping[str, set[str]]) -> str | None:
    """The one image that a name means. Where it starts with a benchmark's key, the last part alone says nothing."""
    forms = _forms(name)
    forms = forms[:2] if forms[0].partition("/")[0] in load_registry() else forms
    found = next((index[form] for form in forms if form in index), ())
    return next(iter(found)) if len(found) == 1 else None
