"""Before training: does every row fit, image tokens included? (ours)

LLaMA-Factory cuts a row that is longer than the cutoff anywhere, image tokens too, and the step that meets it
dies of "Image features and image tokens do not match" hours later (hiyouga/LlamaFactory#5968). A missing image
only warns there and fails in the middle of the training, as does one that was cut off. All are found here, row by row.
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.images import MAX_ASPECT, BadImageError, in_threads, peek
from caprl_utils.paths import shown
from caprl_utils.pretraining.data import PLACEHOLDER, Example
from caprl_utils.progress import track

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_NAMED = 5  # bad rows in a message


@dataclass(frozen=True)
class Budget:
    """What the rows of a data set need of one model. bad: place of a row (ids may repeat) -> its id and the reason."""

    num_rows: int
    longest: int
    total_tokens: int
    image_tokens: int
    cutoff: int
    bad: dict[int, str]

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.num_rows} rows, {self.total_tokens} tokens, {self.image_tokens} of them images; "
            f"longest row {self.longest} of {self.cutoff}",
            *([f"{len(self.bad)} rows do not fit: {_first(list(self.bad.values()))}"] if self.bad else []),
        ]


class TokenCounter:
    """Tokens of a row as LLaMA-Factory makes them: image features by the processor, text by the chat template."""

    def __init__(self, processor: ProcessorMixin, min_pixels: int, max_pixels: int):
        self.processor, self.min_pixels, self.max_pixels = processor, min_pixels, max_pixels
        self.image_tokens = functools.lru_cache(maxsize=None)(self._image_tokens)

    def text(self, example: Example) -> str:
        """The row as the model sees it, each image as one placeholder."""
        messages = []
        for message in example.messages:
            parts: list[dict[str, Any]] = []
            for number, piece in enumerate(message.content.split(PLACEHOLDER)):
                parts += [{"type": "image"}] if number else []
                parts += [{"type": "text", "text": piece}] if piece else []
            messages.append({"role": message.role, "content": parts})
        return self.processor.apply_chat_template(messages, tokenize=False)

    def text_tokens(self, example: Example) -> int:
        """Tokens of the text, without the images' placeholders."""
        ids = self.processor.tokenizer(self.text(example), add_special_tokens=False)["input_ids"]
        return len(ids) - len(example.images)

    def _image_tokens(self, width: int, height: int) -> int:
        width, height = resized(width, height, self.min_pixels, self.max_pixels)
        found = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return found["num_image_tokens"][0]


def resized(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Size of an image after LLaMA-Factory's own resizing, which comes before the processor's."""
    if width * height > max_pixels:
        factor = math.sqrt(max_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
    if width * height < min_pixels:
        factor = math.sqrt(min_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
    return width, height


def check(
    examples: Sequence[Example], media: Path, counters: Mapping[str, TokenCounter], cutoff: int
) -> dict[str, Budget]:
    """Decode every image once and count every row's tokens for each model; returns model -> budget.

    counters: model -> what counts its tokens. cutoff: tokens that a row may have.
    """
    counts = {name: _Count(counter, cutoff) for name, counter in counters.items()}
    looked = in_threads(functools.partial(_sizes, media), examples)
    for place, (example, sizes) in enumerate(zip(track(examples, "token budget"), looked, strict=True)):
        for count in counts.values():
            count.add(place, example, sizes)
    return {name: count.budget(len(examples)) for name, count in counts.items()}


class _Count:
    """Sums over the rows for one model."""

    def __init__(self, counter: TokenCounter, cutoff: int):
        self.counter, self.cutoff = counter, cutoff
        self.longest = self.total = self.images = 0
        self.bad: dict[int, str] = {}

    def add(self, place: int, example: Example, sizes: list[tuple[int, int]] | str) -> None:
        """Count a row. sizes: of its images, or what is wrong with one of them."""
        if isinstance(sizes, str):
            self.bad[place] = f"row {example.id}: {sizes}"
            return
        images = sum(self.counter.image_tokens(*size) for size in sizes)
        tokens = self.counter.text_tokens(example) + images
        if tokens > self.cutoff:
            text = f"{tokens} tokens ({images} of images) are over the cutoff {self.cutoff}"
            self.bad[place] = f"row {example.id}: {text}"
            return
        self.longest = max(self.longest, tokens)
        self.total, self.images = self.total + tokens, self.images + images

    def budget(self, num_rows: int) -> Budget:
        """What was found."""
        return Budget(num_rows, self.longest, self.total, self.images, self.cutoff, self.bad)


def refuse(bad: Sequence[str], num_rows: int, name: str, max_bad_share: float) -> None:
    """Raise UserError naming the rows when more than the allowed share cannot be trained on.

    bad: a line for each such row, which names it.
    """
    if len(bad) > max_bad_share * num_rows:
        raise UserError(
            f"data set {name}: {len(bad)} of {num_rows} rows cannot be trained on: "
            f"{_first(bad)}. Mend or remove them, lower pretraining.max_pixels or raise "
            "pretraining.cutoff_tokens; pretraining.max_bad_share lets a share of them be left out."
        )


def _sizes(media: Path, example: Example) -> list[tuple[int, int]] | str:
    """Width and height of a row's images, or what is wrong with one of them."""
    try:
        return [_size(media / name) for name in example.images]
    except (OSError, ValueError) as error:
        return str(error)


def _size(path: Path) -> tuple[int, int]:
    """Width and height. Raises ValueError or OSError with what is wrong."""
    try:
        with peek(path) as image:
            width, height = image.size
            image.draft("RGB", (1, 1))  # a JPEG is read whole, but at an eighth of its size
            image.load()  # `verify` finds nothing wrong with a JPEG that was cut off
    except FileNotFoundError:
        raise ValueError(f"no image {shown(path)}") from None
    except BadImageError as error:
        raise ValueError(f"image {shown(path)}: {error}") from None
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, IndexError) as error:
        raise ValueError(f"image {shown(path)} cannot be decoded ({error})") from None
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"image {shown(path)} has the aspect {width} x {height}; at most {MAX_ASPECT} to 1")
    return width, height


def _first(bad: Sequence[str]) -> str:
    return "; ".join(bad[:_NAMED]) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
