"""Look at every image of a source before anything expensive starts.

The result is images.parquet, one row an image in the source's order, a row group a shard: what stands where,
its size, what is wrong with it, and which earlier image has the same bytes. Workers read their shard of it.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from caprl_utils.captions.old_images import ImageItem, look_at_header
from caprl_utils.captions.old_sources import RawImage
from caprl_utils.captions.places import Place, in_threads, items, open_image, place_of
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.progress import track

Depth = Literal["decode", "header"]
SAME_ID = "id used by an earlier image"
SCHEMA = pa.schema(
    [
        ("number", pa.int64()), ("id", pa.string()), ("file", pa.string()), ("at", pa.int64()),
        ("path", pa.string()), ("kind", pa.string()), ("num_bytes", pa.int64()), ("width", pa.int32()),
        ("height", pa.int32()), ("problem", pa.string()), ("detail", pa.string()), ("same_as", pa.int64()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What the check found. problems: reason -> images, set aside; duplicates: same bytes as an earlier one."""

    images: int
    good: int
    problems: dict[str, int]
    duplicates: int
    num_bytes: int
    pixels: dict[str, int | None]  # smallest, median and largest width * height of the good images

    def lines(self) -> list[str]:
        """For people."""
        found = [f"{self.images} images, {self.good} good, {self.num_bytes / 2**20:.1f} MiB"]
        if self.good and self.pixels["median"] is not None:
            found.append("pixels: " + ", ".join(f"{name} {value}" for name, value in self.pixels.items()))
        found += [f"set aside: {count} {reason}" for reason, count in sorted(self.problems.items())]
        if self.duplicates:
            found.append(f"duplicates: {self.duplicates} have the same bytes as an earlier image")
        return found


def check_source(
    source: str,
    table: Path,
    shard_images: int,
    kinds: Sequence[str] | None = None,
    depth: Depth = "decode",
    limit: int | None = None,
) -> Report:
    """Read every image of `source`, write `table` (see the module) and return the counts.

    depth: "decode" finds truncated files too; "header" reads the size only, about ten times as fast. limit:
    only the first images. Raises UserError when the source is missing, holds no image, or no good one.
    """
    hashes = {"id": array("Q"), "bytes": array("Q")}
    scanned = table.with_name(f".{table.name}.scan")
    with full_disk_as_user_error(table):
        with _writer(scanned) as writer:
            found = islice(enumerate(items(source, kinds)), limit)
            looked = in_threads(partial(_look, depth=depth), track(found, "check"))
            for rows in _grouped(looked, shard_images, hashes):
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=shard_images)
        report = _mark_repeats(scanned, table, hashes)
        scanned.unlink()
    if not report.images:
        raise UserError(f"no image in {source!r}")
    if not report.good:
        raise UserError(f"no image of {source!r} can be used: {'; '.join(report.lines())}")
    return report


def places(table: Path, shard: int) -> list[tuple[Place, str | None, int | None]]:
    """(place, problem, number of an earlier image with the same bytes) of every image of one shard."""
    rows = pq.ParquetFile(table).read_row_group(shard).to_pylist()
    return [
        (Place(**{name: row[name] for name in asdict(_PLACE)}), row["problem"], row["same_as"])
        for row in rows
    ]


_PLACE = Place("", None, None, None)


def _look(numbered: tuple[int, RawImage | ImageItem], depth: Depth) -> tuple[dict[str, Any], int]:
    """(row, hash of the bytes or 0 without bytes) of one image."""
    number, item = numbered
    place = place_of(item, number)
    seen = look_at_header(item) if depth == "header" and isinstance(item, RawImage) else _opened(item)
    row = {**asdict(place), "number": number, **seen, "same_as": None}
    data = item.data if isinstance(item, RawImage) else None
    return row, short_hash(data) if data else 0


def _opened(item: RawImage | ImageItem) -> dict[str, Any]:
    found = open_image(item)
    width, height = found.image.size if found.image else (None, None)
    return {"width": width, "height": height, "problem": found.problem, "detail": found.detail}


def short_hash(data: bytes) -> int:
    """The first 64 bits of the SHA-256, never 0: what is held of each image's id and bytes."""
    return int.from_bytes(sha256(data).digest()[:8], "big") or 1


def _grouped(
    looked: Iterator[tuple[dict[str, Any], int]], size: int, hashes: dict[str, array]
) -> Iterator[list[dict[str, Any]]]:
    while some := list(islice(looked, size)):
        hashes["bytes"].extend(digest for _, digest in some)
        hashes["id"].extend(short_hash(row["id"].encode()) for row, _ in some)
        yield [row for row, _ in some]


def _mark_repeats(scanned: Path, table: Path, hashes: dict[str, array]) -> Report:
    """Write the final table, with `same_as` and repeated ids marked; empties `hashes`.

    Memory: 24 bytes an image for the hashes and places, some 20 more while they are sorted, and the footer of a
    table with a row group a shard.
    """
    first_id, first_bytes = (_first_places(hashes.pop(name)) for name in ("id", "bytes"))
    problems: Counter[str] = Counter()
    pixels, images, duplicates, num_bytes = array("Q"), 0, 0, 0
    source = pq.ParquetFile(scanned)
    temporary = table.with_name(f".{table.name}.tmp")
    with _writer(temporary) as writer:
        for group in range(source.num_row_groups):
            rows = source.read_row_group(group).to_pylist()
            for row in rows:
                number = row["number"]
                if row["problem"] is None and first_id[number] != number:
                    row["problem"] = SAME_ID
                if first_bytes[number] != number:
                    row["same_as"] = int(first_bytes[number])
                    duplicates += row["problem"] is None
                problems[row["problem"]] += 1
                num_bytes += row["num_bytes"] or 0
                if row["problem"] is None:
                    pixels.append(row["width"] * row["height"])
            images += len(rows)
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(table)
    good = problems.pop(None, 0)
    sizes = np.frombuffer(pixels, dtype=np.uint64) if good else None
    spread = {
        name: None if sizes is None else int(pick(sizes))
        for name, pick in (("smallest", np.min), ("median", np.median), ("largest", np.max))
    }
    return Report(images, good, {str(k): v for k, v in problems.items()}, duplicates, num_bytes, spread)


def _first_places(values: array) -> np.ndarray:
    """For each value the place of its first occurrence, shape (N,); 0 is no value and equals none."""
    numbers = np.frombuffer(values, dtype=np.uint64) if values else np.zeros(0, np.uint64)
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    again = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)) + 1
    del ordered
    first = np.arange(len(numbers))
    for place in again:  # in order, so the third occurrence finds what the second has found
        first[order[place]] = first[order[place - 1]]
    return first


def _writer(file: Path) -> pq.ParquetWriter:
    """Without statistics: of every column of every shard they would fill the footer, which all workers read."""
    return pq.ParquetWriter(file, SCHEMA, write_statistics=False)


def read_report(file: Path) -> Report:
    """The report that a job wrote beside its images."""
    return Report(**json.loads(file.read_text(encoding="utf-8")))
