"""Rows that travel between the stages of the work, as typed records.

The layout of `ImageQA` is that of the released data set internlm/CapRL-QA-75K, so that its files drop in
and ours can go to verl or OpenRLHF.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.paths import shown

if TYPE_CHECKING:
    from PIL import Image


class Row(BaseModel):
    """Base of all rows: frozen, and an unknown column is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Question(Row):
    """One multiple-choice question; ``options`` are texts without letters, ``answer`` is a letter. What curation adds:
    its number in the writer's text, and how the filter model answered it, a letter (of these options) per round with
    the image (visual), without it (text) and with another one (other), None where no letter could be read; open_answer:
    its words when it sees the image but no options.
    """

    question: str
    options: tuple[str, ...]
    answer: str
    number: int | None = None
    visual: tuple[str | None, ...] = ()
    text: tuple[str | None, ...] = ()
    other: tuple[str | None, ...] = ()
    open_answer: str | None = None

    @model_validator(mode="after")
    def _sound(self) -> Self:
        letters, count = prompts.LETTERS[: len(self.options)], len(self.options)
        if not all(text.strip() for text in (self.question, *self.options)):
            raise ValueError("question and options must not be empty")
        if not 2 <= count <= len(prompts.LETTERS):
            raise ValueError(f"{count} options; 2 to {len(prompts.LETTERS)} are possible")
        if len(set(map(text_key, self.options))) < count:
            raise ValueError("two options have the same text")
        if len(self.answer) != 1 or self.answer not in letters:
            raise ValueError(f"answer {self.answer!r} is not one of {letters}")
        return self

    @property
    def answer_text(self) -> str:
        """Text of the right option."""
        return self.options[prompts.LETTERS.index(self.answer)]

    def ground_truth(self) -> dict[str, Any]:
        """As CapRL-QA-75K stores it: choices with their letters, "A) text"."""
        choices = [f"{letter}) {text}" for letter, text in zip(prompts.LETTERS, self.options, strict=False)]
        return {"question": self.question, "choices": choices, "answer": self.answer}

    @classmethod
    def from_ground_truth(cls, value: dict[str, Any]) -> Self:
        """The reverse of `ground_truth`. Raises ValueError for what is not in that form."""
        for letter, choice in zip(prompts.LETTERS, value["choices"], strict=False):
            if not choice.startswith(f"{letter})"):
                raise ValueError(f"choice {choice!r} does not start with '{letter})'")
        options = tuple(choice[2:].strip() for choice in value["choices"])
        return cls(question=value["question"], options=options, answer=value["answer"])


class ImageQA(Row):
    """One image with its questions: a row of CapRL-QA-75K."""

    id: str
    image: bytes
    path: str | None
    questions: tuple[Question, ...]

    def to_row(self) -> dict[str, Any]:
        """In the columns of CapRL-QA-75K."""
        return {
            "id": self.id, "image": {"bytes": self.image, "path": self.path},
            "prompt": [{"role": "user", "content": f"<image> {prompts.CAPTION}"}], "data_source": "image_caption_rl",
            "reward_model": {"ground_truth": [question.ground_truth() for question in self.questions]},
        }  # fmt: skip

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Raises ValueError (or KeyError for a missing column) for a row that is not in that form."""
        questions = tuple(Question.from_ground_truth(q) for q in row["reward_model"]["ground_truth"])
        image = row["image"]
        return cls(id=str(row["id"]), image=image["bytes"], path=image["path"], questions=questions)


_SMALL_WORD = re.compile(r"a|am|an|as|at|be|by|do|go|he|i|if|in|is|it|me|my|no|of|on|or|so|to|up|us|we", re.IGNORECASE)


def text_key(text: str) -> str:
    """What makes two option texts the same: spaces, width and a final full stop do not count, nor does the case of
    words. It does where it tells units and variables apart (mW and MW), as powers and indices do (10² and 102).
    """

    def plain(character: str) -> str:
        mark = {"<super>": "^", "<sub>": "_"}.get(unicodedata.decomposition(character).partition(" ")[0], "")
        return mark + unicodedata.normalize("NFKC", character)

    def word_key(found: re.Match[str]) -> str:
        word = found[0]
        usual = word.islower() or word.isupper() or word.istitle()
        return word.casefold() if usual and (len(word) > 2 or _SMALL_WORD.fullmatch(word)) else word

    text = re.sub(r"[^\W\d_]+", word_key, "".join(map(plain, text)))
    return " ".join(unicodedata.normalize("NFKC", text).split()).removesuffix(".")


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one or several images. images: one function per image, that opens it (RGB). question: as the
    data hold it, without an instruction of ours. options: texts in letter order, without letters; empty where the
    question has none or holds them in its text. gold: as the metric takes it: a letter, a text, or the list of accepted
    answers. meta: what metric, prompts and reports need (see `prism.metrics.METRICS`); its `image_id` names the image,
    the unit of the statistics.
    """

    id: str
    benchmark: str
    images: tuple[Callable[[], Image.Image], ...]
    question: str
    gold: Any
    options: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


PLACEHOLDER = "<image>"
MARKS = (PLACEHOLDER, "<video>", "<audio>")  # LLaMA-Factory takes them for a medium wherever they stand in a text
_TAGS = {f"{name}_tag": name for name in ("role", "content", "user", "assistant", "system")}


class Message(Row):
    """One turn of a conversation."""

    role: str
    content: str


class Conversation(Row):
    """A row of LLaMA-Factory's `sharegpt` format; `images` are paths below the media folder, one per placeholder
    (`mark_problem` says where they are not).
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...]

    @model_validator(mode="after")
    def _sound(self) -> Self:
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

    @property
    def mark_problem(self) -> str | None:
        """Which marks in the text LLaMA-Factory would look for a medium for, in vain; None where all is well."""
        text = "\n".join(message.content for message in self.messages)
        if (asked := text.count(PLACEHOLDER)) != len(self.images):
            return f"{asked} {PLACEHOLDER} for {len(self.images)} images"
        other = next((mark for mark in MARKS[1:] if mark in text), None)
        return f"its text holds {other}, which LLaMA-Factory takes for a medium" if other else None


def mark_in(text: str) -> str | None:
    """The first of MARKS that a text holds; a caption with one cannot be trained on."""
    return next((mark for mark in MARKS if mark in text), None)


def about_image(name: str, image: str, turns: Sequence[tuple[str, str]]) -> Conversation:
    """A conversation about one image, which stands before the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        mark = PLACEHOLDER if number == 0 else ""
        messages += [Message(role="user", content=mark + question), Message(role="assistant", content=answer)]
    return Conversation(id=name, messages=tuple(messages), images=(image,))


def register(file: Path) -> None:
    """Enter a file NAME.jsonl of conversations as NAME in dataset_info.json beside it, as LLaMA-Factory asks."""
    info = file.parent / "dataset_info.json"
    try:
        entries = json.loads(info.read_text(encoding="utf-8-sig")) if info.is_file() else {}
    except ValueError as error:
        raise UserError(f"{shown(info)} is no sound JSON ({error}); mend it and run again") from None
    if not isinstance(entries, dict):
        raise UserError(f"{shown(info)} holds no object of data sets; move it away and run again")
    entries[file.stem] = {
        "file_name": file.name, "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"}, "tags": _TAGS,
    }  # fmt: skip
    write_json(info, dict(sorted(entries.items())))
