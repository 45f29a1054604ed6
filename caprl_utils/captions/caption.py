"""Caption images: one captioner for Prism, the quick start, the pretraining sets and anybody's folder (`job`).

No caption is drawn twice. One that was cut at the token limit or repeats itself says so, stays and is counted: an
evaluation must see what a model does; whoever trains on captions leaves those out (`export.is_sound`). A caption's seed
is that of its image's place in the source, by chunks of `CHUNK_IMAGES`: the same in this process or in many (`scale`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed, text_hash
from caprl_utils.images import BadImageError, ImageItem, in_threads
from caprl_utils.models.base import Backend, Request, Sampling
from caprl_utils.models.local import load_tokenizer
from caprl_utils.paths import shown
from caprl_utils.runs import RowStore
from caprl_utils.schema import ModelConfig

CHUNK_IMAGES = 64  # images of one seed; ours
MIN_REPEATS = 4  # ours: lists repeat a phrase two or three times, loops do so for the rest of the caption
MIN_CHARS = 60  # ours: shorter tails are dotted lines and table borders
MIN_SENTENCE_WORDS = 5  # ours: "Yes." may stand in a list more often


class Caption(BaseModel):
    """One caption of one image: a row of captions.jsonl and of the parquet files.

    id: IMAGE#INDEX. image_key: where the image stands in its source. num_tokens: in the captioner's own tokens; None
    where no model wrote it. finish_reason "length": cut at the token limit. looped: it repeats itself.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    id: str
    image_id: str
    image_key: str = ""
    index: int
    caption: str
    num_tokens: int | None
    finish_reason: str
    looped: bool = False
    seed: int | None = None
    model: str
    model_hash: str = ""
    prompt_hash: str = ""


def caption_id(image_id: str, index: int) -> str:
    """Row id of caption `index` of an image."""
    return f"{image_id}#{index}"


@dataclass
class Tally:
    """Captions made, images looked at, and images without a caption, with the reason: bad ones cannot be used, of
    failed ones the captioner said nothing. passed: what else lies in the source (`images.read_source`).
    """

    made: int = 0
    looked: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)

    def refuse_none(self) -> None:
        """Raise UserError when images could be asked about and the captioner said nothing of any."""
        if self.failed and not self.made:
            name, reason = next(iter(self.failed.items()))
            raise UserError(
                f"none of {len(self.failed)} images was captioned; {name}: {reason}. Mend the cause and run again; "
                "nothing that was finished is lost."
            )


def draw(
    images: Iterable[tuple[int, ImageItem]], opener: Callable[[], Backend], sampling: Sampling, prompt: str,
    tally: Tally, max_pixels: int | None = None, done: Collection[str] = (),
) -> Iterator[Caption]:  # fmt: skip
    """`sampling.n` captions of every image, as soon as each is there; what has none goes to `tally`.

    images: (place in the source, image), ids distinct. opener: gives the captioner; asked when there is work.
    max_pixels: larger images are scaled down. done: ids of the captions that are there already.
    Raises UserError when the captioner answers nothing about the first `CHUNK_IMAGES` images.
    """
    asked: dict[str, tuple[str, int]] = {}  # image id -> key, seed
    tally.made += len(done)

    def requests() -> Iterator[Request]:
        lacking = (
            numbered for numbered in images
            if any(caption_id(numbered[1].id, index) not in done for index in range(sampling.n))
        )  # fmt: skip
        for (number, item), image in in_threads(partial(_opened, max_pixels), lacking):
            if isinstance(image, BadImageError):
                tally.bad[item.id] = str(image)
            elif isinstance(image, Exception):
                tally.failed[item.id] = f"the image cannot be opened: {image}"
            else:
                seed = derive_seed(sampling.seed, "captions", number // CHUNK_IMAGES, bits=31)
                asked[item.id] = item.key, seed
                yield Request(item.id, prompt, image, seed=seed)

    waiting = requests()
    if (first := next(waiting, None)) is None:
        return
    captioner, prompt_hash = opener(), text_hash(prompt)
    for answer in captioner.stream(chain([first], waiting), sampling):
        if answer.text is None or not answer.text.strip():
            tally.failed.setdefault(answer.id, answer.error or "the captioner gave no text")
            if len(tally.failed) >= CHUNK_IMAGES:
                tally.refuse_none()
            continue
        tally.made += 1
        row_id, text, (key, seed) = caption_id(answer.id, answer.index), answer.text.strip(), asked[answer.id]
        if row_id not in done:
            yield Caption(
                id=row_id, image_id=answer.id, image_key=key, index=answer.index, caption=text,
                num_tokens=answer.num_tokens, finish_reason=answer.finish_reason, looped=is_loop(text), seed=seed,
                model=captioner.name, model_hash=captioner.model_hash, prompt_hash=prompt_hash,
            )  # fmt: skip


def _opened(max_pixels: int | None, numbered: tuple[int, ImageItem]) -> tuple[tuple[int, ImageItem], Image | Exception]:
    try:
        return numbered, numbered[1].open(max_pixels)
    except (OSError, UserError) as error:
        return numbered, error


def failure_message(what: str, failed: Mapping[str, str], total: int, store: RowStore) -> str:
    """Text of the error for rows that a model did not answer."""
    name, reason = next(iter(failed.items()))
    return (
        f"{len(failed)} of {total} {what}; first: {name}: {reason}. The finished rows are kept in {shown(store.path)}; "
        "mend the cause and run again, only the missing ones are made."
    )


def tokenizer_of(model: ModelConfig) -> Any:
    """A model's tokenizer, without its weights."""
    return load_tokenizer(paths.resolve_model(model.path), revision=model.revision)


def token_counter(model: ModelConfig) -> Callable[[str], int]:
    """A function that counts a text's tokens as this model's captions are counted, the end of turn included."""
    tokenizer = tokenizer_of(model)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1


# Captions that repeat themselves until the token limit, the common failure of captioners


def is_loop(text: str) -> bool:
    """Whether a text ends in a phrase said at least `MIN_REPEATS` times, or says a sentence of some words as often."""
    sentences = (part.strip().casefold() for part in re.split(r"(?<=[.!?。！？])\s*|\n+", text))
    counts = Counter(s for s in sentences if len(s.split()) >= MIN_SENTENCE_WORDS)
    return any(count >= MIN_REPEATS for count in counts.values()) or _tail_repeats(text)


def _tail_repeats(text: str) -> bool:
    """Whether the end of the text is one phrase over and over, the last time perhaps not whole.

    The prefix function of the reversed text gives the shortest period of every tail in linear time.
    """
    turned = text.rstrip()[-20_000:][::-1]
    border = [0] * len(turned)
    length = 0
    for place in range(1, len(turned)):
        while length and turned[place] != turned[length]:
            length = border[length - 1]
        length += turned[place] == turned[length]
        border[place] = length
        size = place + 1
        if size >= MIN_CHARS and size >= MIN_REPEATS * (size - length):
            return True
    return False
