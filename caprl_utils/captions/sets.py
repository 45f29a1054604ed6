"""Caption sets as parquet files: read them row by row, draw a seeded sample."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from caprl_utils.captions.check import short_hash
from caprl_utils.captions.manifest import readable
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.paths import shown

_BATCH_ROWS = 4096  # rows in memory at once
_REMEDY = "delete it and run the captioning again, which gathers it anew, or fetch it again"


def caption_files(captions: Path) -> list[Path]:
    """The parquet files of a caption set: a file, a job's folder, or a folder of shards.

    Raises UserError where there is none.
    """
    captions = Path(captions)
    if captions.is_file():
        return [captions]
    for folder in (captions / "shards", captions):
        if files := sorted(folder.glob("*.parquet")):
            return files
    raise UserError(f"no captions at {shown(captions)}: name a .parquet file or a folder of shards")


def schema_of(captions: Path) -> pa.Schema:
    """The columns of a caption set, with the metadata of its first file."""
    file = caption_files(captions)[0]
    with readable(file, _REMEDY):
        return pq.read_schema(file)


def read_captions(captions: Path, sound_only: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of a caption set (columns of `work.SetRow`), a batch in memory at a time.

    sound_only: without loops and cut captions. Raises UserError naming a file that cannot be read.
    """
    for table in _batches(captions):
        for row in table.to_pylist():
            if not sound_only or is_sound(row):
                yield row


def is_sound(row: dict[str, Any]) -> bool:
    """Neither cut nor a loop. A released caption does not say how it ended (None) and counts as whole."""
    return row["finish_reason"] != "length" and not row["looped"]


def sample(captions: Path, out: Path, n: int, seed: int = 0) -> int:
    """Write the captions of `n` images, drawn without repetition; returns the number of captions.

    CapRL-1M is such a sample of CapRL-5M. The order of the set is kept, and a set of fewer than `n` images is
    refused with UserError. Samples of one seed are nested: the smaller one is inside the larger one. Memory: some
    60 bytes an image, for 64-bit hashes of the ids.
    """
    out, schema = Path(out), schema_of(captions)
    ids = array("Q")
    for table in _batches(captions, ["image_id"]):
        ids.extend(_id_hashes(table))
    _, first = np.unique(np.frombuffer(ids, np.uint64) if ids else np.zeros(0, np.uint64), return_index=True)
    if n > len(first):
        raise UserError(f"{shown(captions)} has {len(first)} images, fewer than the {n} asked for")
    places = np.sort(first)[np.random.default_rng(seed).permutation(len(first))[:n]]
    return _write_kept(captions, out, schema, np.frombuffer(ids, np.uint64)[places])


def _write_kept(captions: Path, out: Path, schema: pa.Schema, drawn: np.ndarray) -> int:
    """Write the rows whose image was drawn (by the hash of its id); returns how many."""
    temporary, written = out.with_name(f".{out.name}.tmp"), 0
    with full_disk_as_user_error(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in _batches(captions):
                kept = table.filter(pa.array(np.isin(_id_hashes(table), drawn)))
                writer.write_table(kept.cast(schema))
                written += kept.num_rows
        temporary.replace(out)
    return written


def _id_hashes(table: pa.Table) -> np.ndarray:
    """Hashes of the image ids, shape (N,)."""
    hashes = (short_hash(name.encode()) for name in table["image_id"].to_pylist())
    return np.fromiter(hashes, np.uint64, table.num_rows)


def _batches(captions: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The set in pieces of `_BATCH_ROWS` rows."""
    for file in caption_files(captions):
        with readable(file, _REMEDY):
            table = pq.ParquetFile(file, page_checksum_verification=True)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                yield pa.Table.from_batches([batch])
