"""Captions of a list of images, row by row in one JSONL file.

Images are worked on in chunks that depend on the whole list alone, each with a seed of its own. A chunk
of which any caption is missing is generated anew and only the missing rows are added, so a restarted job
writes the captions that an undisturbed one would have written, whatever the backend does with a batch.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from caprl_utils import paths, prompts
from caprl_utils.errors import UserError
from caprl_utils.models.base import Backend, Completion, Request, Sampling
from caprl_utils.paths import shown
from caprl_utils.progress import Progress
from caprl_utils.runs import RowStore
from caprl_utils.schema import ModelConfig

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK_IMAGES = 64


class Caption(BaseModel):
    """One caption of one image: a row of captions.jsonl.

    num_tokens: in the captioner's own tokens; None where no model wrote the text. finish_reason "length":
    it was cut at the token limit.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    id: str
    image_id: str
    index: int
    text: str
    num_tokens: int | None
    finish_reason: str
    model: str
    model_hash: str
    sampling: dict[str, Any] | None = None


@dataclass(frozen=True)
class CaptionSet:
    """Captions by image id, in the order of their index, and the images that have none, with the reason."""

    captions: Mapping[str, list[Caption]]
    failed: Mapping[str, str] = field(default_factory=dict)


def caption_images(
    images: Sequence[tuple[str, "Image | Callable[[], Image]"]],
    captioner: Backend,
    sampling: Sampling,
    store: RowStore,
    prompt: str = prompts.CAPTION,
    max_failed_share: float = 0.0,
    label: str = "captions",
) -> CaptionSet:
    """Write `sampling.n` captions of every image to `store` and return them all, old and new.

    images: (id, image or a function that opens it), ids distinct. max_failed_share: images without a
    caption that are put up with; they come back in `failed`. Above it, or when a whole chunk fails,
    UserError: what is done stays on disk and the next call makes the rest.
    """
    ids = [image_id for image_id, _ in images]
    if len(set(ids)) != len(ids):
        raise ValueError("two images have one id")
    _check_same_maker(store, captioner, sampling)
    failed: dict[str, str] = {}
    with Progress(label, len(images)) as progress:
        for number, chunk in enumerate(_chunks(images)):
            if any(caption_id(image_id, i) not in store for image_id, _ in chunk for i in range(sampling.n)):
                seeded = replace(sampling, seed=chunk_seed(sampling.seed, label, number))
                failed |= _caption_chunk(chunk, captioner, seeded, store, prompt)
            progress.update(len(chunk))
    if len(failed) > max_failed_share * len(images):
        raise UserError(failure_message("images were not captioned", failed, len(images), store))
    wanted = set(ids)
    found: dict[str, list[Caption]] = {image_id: [] for image_id in ids if image_id not in failed}
    for row in store.read(Caption):
        if row.image_id in wanted and row.image_id not in failed and row.index < sampling.n:
            found[row.image_id].append(row)
    return CaptionSet({k: sorted(rows, key=lambda row: row.index) for k, rows in found.items()}, failed)


def token_counter(model: ModelConfig) -> Callable[[str], int]:
    """A function that counts a text's tokens as this model's captions are counted, the end of turn
    included.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        paths.resolve_model(model.path), revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1


def caption_id(image_id: str, index: int) -> str:
    """Row id of caption `index` of an image."""
    return f"{image_id}#{index}"


def chunk_seed(seed: int, label: str, number: int) -> int:
    """Seed of one chunk, the same in every process (< 2**31)."""
    digest = hashlib.sha256(f"{seed}/{label}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def failure_message(what: str, failed: Mapping[str, str], total: int, store: RowStore) -> str:
    """Text of the error for rows that a model did not answer."""
    first, reason = next(iter(failed.items()))
    return (
        f"{len(failed)} of {total} {what}; first: {first}: {reason}. The finished rows are kept in "
        f"{shown(store.path)}; mend the cause and run again, only the missing ones are made."
    )


def _chunks(images: Sequence[Any], size: int = CHUNK_IMAGES) -> Iterator[Sequence[Any]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _caption_chunk(
    chunk: Sequence[tuple[str, "Image | Callable[[], Image]"]],
    captioner: Backend,
    sampling: Sampling,
    store: RowStore,
    prompt: str,
) -> dict[str, str]:
    """Caption one chunk; returns image id -> reason for those that failed."""
    failed: dict[str, str] = {}
    requests = []
    for image_id, image in chunk:
        try:
            requests.append(Request(image_id, prompt, image() if callable(image) else image))
        except (OSError, UserError) as error:
            failed[image_id] = f"the image cannot be opened ({error})"
    completions = captioner.generate(requests, sampling) if requests else []
    for completion in completions:
        if completion.text is None:
            failed.setdefault(completion.id, completion.error or "the captioner gave no text")
        elif caption_id(completion.id, completion.index) not in store:
            store.append(_row(completion, captioner, sampling))
    for request in requests:
        if any(caption_id(request.id, i) not in store for i in range(sampling.n)):
            failed.setdefault(request.id, f"the captioner gave fewer than {sampling.n} captions")
    if len(failed) == len(chunk) > 1:
        raise UserError(failure_message("images of one batch were not captioned", failed, len(chunk), store))
    return failed


def _row(completion: Completion, captioner: Backend, sampling: Sampling) -> Caption:
    return Caption(
        id=caption_id(completion.id, completion.index),
        image_id=completion.id,
        index=completion.index,
        text=completion.text.strip(),
        num_tokens=completion.num_tokens,
        finish_reason=completion.finish_reason,
        model=captioner.name,
        model_hash=captioner.model_hash,
        sampling=asdict(sampling),
    )


def _check_same_maker(store: RowStore, captioner: Backend, sampling: Sampling) -> None:
    first = next(store.read(Caption), None)
    if first is None:
        return
    now = {**asdict(sampling), "seed": None, "n": None}
    before = {**(first.sampling or {}), "seed": None, "n": None}
    if first.model_hash != captioner.model_hash or before != now:
        raise UserError(
            f"{shown(store.path)} holds captions of {first.model} ({first.model_hash}) sampled with "
            f"{first.sampling}, not of {captioner.name} ({captioner.model_hash}) with {asdict(sampling)}. "
            "Take another folder, or delete that file."
        )
