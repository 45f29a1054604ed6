"""Data files of LLaMA-Factory: conversations about images, in its `sharegpt` format, one JSON object a line.

A data folder holds NAME.jsonl for every data set, dataset_info.json that describes them, and the images that
were rendered for it. Files of a user come in LLaVA's form (`image`, `conversations` of from and value) or in
this one (`images`, `messages` of role and content), as a JSON list or one object a line.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic, write_json
from caprl_utils.paths import shown

INFO = "dataset_info.json"
PLACEHOLDER = "<image>"
MARKS = (PLACEHOLDER, "<video>", "<audio>")
"""What LLaMA-Factory takes for a medium wherever it stands in a text."""
_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "system_tag": "system",
}  # fmt: skip
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    content: str


class Example(BaseModel):
    """One conversation about its images; `images` are paths below the media folder, one per placeholder
    (`mark_problem` says where they are not).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...]

    @model_validator(mode="after")
    def _sound(self) -> Example:
        turns = self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages
        roles = [message.role for message in turns]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError(f"turns are {roles}, expected user and assistant in turn")
        if not all(message.content.strip() for message in self.messages):
            raise ValueError("a turn has no text")
        for name in self.images:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"image path {name!r} leads outside the media folder")
        return self


@dataclass(frozen=True)
class BadRow:
    """A row that is set aside, with the reason."""

    id: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.id}: {self.reason}"


def mark_in(text: str) -> str | None:
    """The first of MARKS that a text holds; a caption with one cannot be trained on."""
    return next((mark for mark in MARKS if mark in text), None)


def about_image(example_id: str, image: str, turns: Sequence[tuple[str, str]]) -> Example:
    """A conversation about one image, which stands before the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        mark = PLACEHOLDER if number == 0 else ""
        messages += [Message(role="user", content=mark + question), Message(role="assistant", content=answer)]
    return Example(id=example_id, messages=tuple(messages), images=(image,))


def write_examples(folder: Path, name: str, examples: Iterable[Example]) -> int:
    """Write NAME.jsonl and its entry in dataset_info.json; returns the number of rows.

    Raises UserError when there are none.
    """
    lines = [example.model_dump_json() for example in examples]
    if not lines:
        raise UserError(f"data set {name!r} would be empty; nothing was written to {shown(folder)}")
    write_atomic(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    register(folder / f"{name}.jsonl")
    return len(lines)


def register(file: Path) -> None:
    """Enter a file NAME.jsonl of such rows as NAME in dataset_info.json beside it."""
    info = file.parent / INFO
    entries = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
    entries[file.stem] = {
        "file_name": file.name, "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"}, "tags": _TAGS,
    }  # fmt: skip
    write_json(info, dict(sorted(entries.items())))


def read_examples(file: Path) -> list[Example]:
    """Rows that `write_examples` wrote. Raises UserError naming file and row for any that is not sound."""
    rows = read_rows(file)
    if bad := [row for row in rows if isinstance(row, BadRow)]:
        raise UserError(f"{shown(file)}, {bad[0]}")
    return rows


def read_rows(file: Path) -> list[Example | BadRow]:
    """A user's file in one of the two forms. A row whose text holds other marks than its images' is a BadRow.

    Raises UserError naming file and row for what has not the form of a row.
    """
    return [_parse(file, number, row) for number, row in _raw_rows(file)]


def _parse(file: Path, number: int, raw: Any) -> Example | BadRow:
    try:
        row = Example.model_validate(_ours(raw, number))
        reason = mark_problem(row)
        return BadRow(f"{number} (id {row.id})", reason) if reason else row
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        reason = (
            "; ".join(e["msg"] for e in error.errors()) if isinstance(error, ValidationError) else repr(error)
        )
        raise UserError(
            f"{shown(file)}, row {number}: {reason}. A row has `image` and `conversations` (from, value), or "
            "`images` and `messages` (role, content), with one <image> in the text for every image."
        ) from None


def mark_problem(example: Example) -> str | None:
    """Marks in a row's text that LLaMA-Factory would look for a medium for, in vain; None where all is well."""
    text = "\n".join(message.content for message in example.messages)
    if (asked := text.count(PLACEHOLDER)) != len(example.images):
        return f"{asked} {PLACEHOLDER} for {len(example.images)} images"
    other = next((mark for mark in MARKS[1:] if mark in text), None)
    return f"its text holds {other}, which LLaMA-Factory takes for a medium" if other else None


def sample(examples: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` of the examples, drawn by the seed; a larger count holds a smaller one.

    Raises UserError when there are too few.
    """
    if count > len(examples):
        raise UserError(f"{count} rows are asked for, the data set has {len(examples)}")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return [examples[place] for place in sorted(order[:count])]


def _ours(row: Any, number: int) -> dict[str, Any]:
    """LLaVA's columns by our names."""
    images = row.get("images", row.get("image", []))
    messages = row.get("messages")
    if messages is None:
        messages = [{"role": _ROLES[m["from"]], "content": m["value"]} for m in row["conversations"]]
    return {
        "id": str(row.get("id", number)),
        "messages": messages,
        "images": [images] if isinstance(images, str) else images or [],
    }


def _raw_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, JSON value) of a JSON list or of JSON lines."""
    try:
        with open(file, encoding="utf-8") as lines:
            if lines.read(1) == "[":
                lines.seek(0)
                yield from enumerate(json.load(lines), start=1)
                return
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise UserError(f"{shown(file)}, row {number} is not valid JSON ({error})") from None
    except FileNotFoundError:
        raise UserError(f"no data file {shown(file)}; the profile's section `pretraining` names it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{shown(file)} is not valid JSON ({error})") from None
