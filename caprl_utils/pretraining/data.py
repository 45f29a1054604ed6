"""Rows to pretrain on: read from files, sampled, checked against every model's token limit, written for LLaMA-Factory.

Rows are checked before training (ours): LLaMA-Factory cuts a row that is too long anywhere, image tokens too, and dies
at its step hours later (hiyouga/LlamaFactory#5968); so it does at an image that is missing or was cut off.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.images import BadImage, BadImageError, in_threads, is_strip, open_image, orientation, peek
from caprl_utils.paths import shown
from caprl_utils.progress import track
from caprl_utils.records import PLACEHOLDER, Conversation, register

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MIN_PIXELS = 32 * 32  # LLaMA-Factory's default: smaller images are enlarged
_ROLES = {"human": "user", "gpt": "assistant"}
_NAMED = 5  # bad rows in a message


@dataclass(frozen=True)
class DataSet:
    """One checked data set. folder: of NAME.jsonl; media: where its image paths start. values: of the run that made it:
    "rows", "hash" (of rows and images), "longest" and "tokens" by setting, "set_aside" (lines on rows that cannot be
    trained on), "left_out" (reason -> captions not trained on), "captions" (see `prepare.described`).
    """

    name: str
    folder: Path
    media: Path
    values: Mapping[str, Any]


class BadRow(str):
    """A row that is set aside: a line that names it and says why."""


def write_rows(folder: Path, name: str, rows: Sequence[Conversation]) -> None:
    """Write NAME.jsonl and its entry in dataset_info.json. Raises UserError without any row."""
    if not rows:
        raise UserError(f"data set {name!r} would be empty; nothing was written to {shown(folder)}")
    write_atomic(folder / f"{name}.jsonl", "".join(row.model_dump_json() + "\n" for row in rows))
    register(folder / f"{name}.jsonl")


def read_rows(file: Path, count: int | None = None, seed: int = 0) -> list[Conversation | BadRow]:
    """The rows of a file in LLaVA's form or LLaMA-Factory's, a JSON list or lines; with a count only those drawn.
    Others, or with other marks than their images', are BadRows. Raises UserError for no file, no JSON, too few rows.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")  # a foreign byte spoils its row alone
    except FileNotFoundError:
        raise UserError(f"no data file {shown(file)}; the profile's section `pretraining` names it") from None
    if re.match(r"\s*\[", text):
        try:
            rows = list(enumerate(json.loads(text), start=1))
        except ValueError as error:
            raise UserError(f"{shown(file)} is not valid JSON ({error})") from None
    else:
        rows = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [_parse(*row) for row in (rows if count is None else sample(rows, count, seed))]


def _parse(number: int, raw: Any) -> Conversation | BadRow:
    """raw: a JSON value, or a line that holds one."""
    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
        row = Conversation.model_validate(_by_our_names(value, number))
        row.model_dump_json()
    except ValidationError as error:
        reason = "; ".join(found["msg"] for found in error.errors())
    except PydanticSerializationError:
        reason = "its text is not UTF-8"
    except ValueError as error:
        reason = f"not valid JSON ({error})"
    except (KeyError, TypeError, AttributeError) as error:
        forms = "neither `image` and `conversations` (from, value) nor `images` and `messages`"
        reason = f"{forms} (role, content): {error!r}"
    else:
        return BadRow(f"row {number} (id {row.id}): {row.mark_problem}") if row.mark_problem else row
    return BadRow(f"row {number}: {reason}")


def _by_our_names(row: Any, number: int) -> dict[str, Any]:
    images, messages = row.get("images", row.get("image")) or [], row.get("messages")
    if messages is None:
        turns = row["conversations"]
        messages = [{"role": _ROLES.get(m["from"], m["from"]), "content": m["value"]} for m in turns]
    images = [images] if isinstance(images, str) else images
    return {"id": str(row.get("id", number)), "messages": messages, "images": images}


def sample(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` of the rows, drawn by the seed; a larger count holds a smaller one. Raises UserError for too few."""
    if count > len(rows):
        raise UserError(f"{count} rows are asked for, the data set has {len(rows)}")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[place] for place in sorted(order[:count])]


class TokenCounter:
    """Tokens of a row as LLaMA-Factory makes them: image features by the processor, text by the chat template."""

    def __init__(self, processor: ProcessorMixin, max_pixels: int):
        self.processor, self.max_pixels = processor, max_pixels
        self.image_tokens = functools.lru_cache(maxsize=None)(self._image_tokens)

    def text(self, row: Conversation) -> str:
        """The row as the model sees it, each image as one placeholder."""
        messages = []
        for message in row.messages:
            pieces = re.split(f"({re.escape(PLACEHOLDER)})", message.content)
            shown = [{"type": "image"} if p == PLACEHOLDER else {"type": "text", "text": p} for p in pieces if p]
            messages.append({"role": message.role, "content": shown})
        return self.processor.apply_chat_template(messages, tokenize=False)

    def text_tokens(self, row: Conversation) -> int:
        """Tokens of the text, without the images' placeholders."""
        ids = self.processor.tokenizer(self.text(row), add_special_tokens=False)["input_ids"]
        return len(ids) - len(row.images)

    def _image_tokens(self, width: int, height: int) -> int:
        width, height = resized(width, height, self.max_pixels)
        return self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]


def resized(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Size of an image after LLaMA-Factory's own resizing, which comes before the processor's."""
    if width * height > max_pixels:
        factor = math.sqrt(max_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
    if width * height < MIN_PIXELS:
        factor = math.sqrt(MIN_PIXELS / (width * height))
        width, height = int(width * factor), int(height * factor)
    return width, height


def token_budgets(
    rows: Sequence[Conversation], media: Path, counters: Mapping[str, TokenCounter], cutoff: int
) -> tuple[dict[int, str], dict[str, int], dict[str, int]]:
    """Decode every image once and count every row's tokens for each model, of which `cutoff` are allowed. Returns place
    of a row (ids may repeat) -> why it cannot be trained on; model -> tokens of the longest, and of all.
    """
    bad, longest, total = {}, dict.fromkeys(counters, 0), dict.fromkeys(counters, 0)

    def sizes_of(row: Conversation) -> list[tuple[int, int]] | str:
        found = []
        for path in (media / name for name in row.images):
            try:
                found.append(image_size(path))
            except FileNotFoundError:
                return f"no image {shown(path)}"
            except BadImageError as error:
                return f"image {shown(path)}: {error}"
        return found

    for place, (row, sizes) in enumerate(zip(track(rows, "token budget"), in_threads(sizes_of, rows), strict=True)):
        if isinstance(sizes, str):
            bad[place] = f"row {row.id}: {sizes}"
            continue
        for name, counter in counters.items():
            images = sum(counter.image_tokens(*size) for size in sizes)
            tokens = counter.text_tokens(row) + images
            if tokens > cutoff:
                bad[place] = f"row {row.id}: {tokens} tokens ({images} of images) are over the cutoff {cutoff}"
            else:
                longest[name], total[name] = max(longest[name], tokens), total[name] + tokens
    return bad, longest, total


def refuse(bad: Sequence[str], num_rows: int, name: str, max_bad_share: float) -> None:
    """Raise UserError with the lines of the bad rows when they are more than the allowed share."""
    if len(bad) > max_bad_share * num_rows:
        named = "; ".join([*bad[:_NAMED], f"and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else bad)
        raise UserError(
            f"data set {name}: {len(bad)} of {num_rows} rows cannot be trained on: {named}. Mend or remove them, lower "
            "pretraining.max_pixels or raise pretraining.cutoff_tokens; pretraining.max_bad_share lets some be left."
        )


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image that can be decoded, upright. Raises BadImageError, and FileNotFoundError."""
    with peek(path) as image:
        width, height = image.size[::-1] if orientation(image) >= 5 else image.size
    open_image(path, MIN_PIXELS)  # read whole, a JPEG at an eighth of its size
    if is_strip((width, height)):
        raise BadImageError(BadImage.TOO_NARROW, f"{width} x {height}")
    return width, height
