"""Caption files that others released (internlm/CapRL-2M): read them, or bring them into our columns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_utils.captions.check import short_hash
from caprl_utils.captions.loops import is_loop
from caprl_utils.captions.old_sources import IMAGE_KEYS
from caprl_utils.captions.rows import caption_id
from caprl_utils.captions.work import SCHEMA
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.hashing import file_hash
from caprl_utils.paths import shown
from caprl_utils.progress import track

CAPTION_KEYS = ("caption", "captions", "text", "response", "output", "answer")
RELEASED_KEY = b"released_captions"  # in the parquet file's metadata: no job knows the images
_BATCH_ROWS = 4096


@dataclass(frozen=True)
class ReleasedCaption:
    """A row of a released caption file: the image's path as it stands there, and the caption."""

    image: str
    caption: str


def read_released(file: Path, limit: int | None = None) -> Iterator[ReleasedCaption]:
    """Rows of a released caption JSONL such as internlm/CapRL-2M's.

    Its card says only that the files hold captions and image paths. Taken as one JSON object a line, with the
    path under one of `IMAGE_KEYS` and the caption under one of `CAPTION_KEYS` (the sibling CapRL-Video-178K has
    `video` and `caption`), or in LLaVA's `conversations` or sharegpt's `messages` (the last turn of the
    assistant). limit: only the first lines. Raises UserError for a missing file, and with the keys found for a
    line that is none of these.
    """
    if not Path(file).is_file():
        raise UserError(f"no caption file {shown(file)}; name the JSONL file of the release")
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, limit), start=1):
                if line.strip():
                    yield _parsed(file, number, line)
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(file)} is no JSONL file: it is not UTF-8 text ({error})") from None


def write_released(files: Sequence[Path], out: Path, limit: int | None = None) -> int:
    """Write released JSONL files as one parquet file with our columns; returns the number of captions.

    The image's path is id and key of the image. What the release does not say (tokens, finish reason, seed,
    attempts, prompt) is null; the model is named by the file, whose hash stands for its own. limit: only the first
    lines of each file. Memory: some 100 bytes an image, to number the captions of one image. Raises UserError as
    `read_released`, and when there is no row.
    """
    out, written = Path(out), 0
    temporary = out.with_name(f".{out.name}.tmp")
    schema = SCHEMA.with_metadata({RELEASED_KEY: ", ".join(Path(file).name for file in files)})
    rows = track(_rows(files, limit), "captions")
    with full_disk_as_user_error(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer:
            while some := list(islice(rows, _BATCH_ROWS)):
                writer.write_table(pa.Table.from_pylist(some, schema))
                written += len(some)
        if not written:
            temporary.unlink()
            raise UserError(f"{', '.join(shown(file) for file in files)}: no line holds a caption")
        temporary.replace(out)
    return written


def _rows(files: Sequence[Path], limit: int | None) -> Iterator[dict[str, Any]]:
    """Rows with the columns of `work.SetRow`."""
    seen: Counter[int] = Counter()
    for file in files:
        maker = {"model": Path(file).name, "model_hash": file_hash(file)}
        for row in read_released(file, limit):
            key = short_hash(row.image.encode())
            text, index = row.caption.strip(), seen[key]
            seen[key] += 1
            yield maker | {
                "id": caption_id(row.image, index), "image_id": row.image, "image_key": row.image,
                "index": index, "caption": text, "looped": is_loop(text),
            }  # fmt: skip


def _parsed(file: Path, number: int, line: str) -> ReleasedCaption:
    try:
        row = json.loads(line)
        image, caption = _first(row, IMAGE_KEYS), _caption_in(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{shown(file)}, line {number} is no JSON object ({error})") from None
    image = image[0] if isinstance(image, list) and image else image
    if not isinstance(image, str) or not isinstance(caption, str):
        raise UserError(
            f"{shown(file)}, line {number} has no image path and caption that we know; its keys: "
            f"{', '.join(row)}. Known are {', '.join(IMAGE_KEYS)} and {', '.join(CAPTION_KEYS)}."
        )
    return ReleasedCaption(image, caption)


def _caption_in(row: dict[str, Any]) -> Any:
    for turns, who, what, name in (
        ("conversations", "from", "value", "gpt"), ("messages", "role", "content", "assistant"),
    ):  # fmt: skip
        said = [turn[what] for turn in row.get(turns) or [] if turn[who] == name]
        if said:
            return said[-1]
    return _first(row, CAPTION_KEYS)


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
