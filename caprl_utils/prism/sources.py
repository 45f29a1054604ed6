"""Stage 1 of Prism, where captions come from: a model (here), or a pseudo-captioner that bounds it (`controls`)."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from caprl_utils import prompts
from caprl_utils.captions.caption import Caption, Tally, caption_id, draw, failure_message
from caprl_utils.errors import UserError
from caprl_utils.images import ImageItem
from caprl_utils.models.base import Backend, Sampling
from caprl_utils.prism.loading import too_many
from caprl_utils.progress import Progress
from caprl_utils.records import Sample
from caprl_utils.runs import RowStore, Run
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    from PIL.Image import Image

CAPTIONS_STAGE = "captions"
RECIPE = [
    "caprl_utils.captions.caption", "caprl_utils.models.decoding", "caprl_utils.models.local", "caprl_utils.prompts",
]  # fmt: skip
ATTEMPTS = 3  # ours: an image, or a question, that fails as often is left out
Captions = Mapping[str, list[Caption]]  # by image id
TokenCounter = Callable[[str], int | None]
log = logging.getLogger(__name__)
_HASHES: WeakKeyDictionary[Callable[[], Image], str] = WeakKeyDictionary()  # of the images of several captioners


@dataclass(frozen=True)
class PrismImage:
    """One image to caption: `id` is unique over all benchmarks, `true_caption` is of rendered images only."""

    id: str
    benchmark: str
    open: Callable[[], Image]
    true_caption: str | None = None


def image_ids(sample: Sample) -> list[str]:
    """Ids of a sample's images, unique over benchmarks: its loader's `image_id`, numbered if there are several."""
    name = f"{sample.benchmark}/{sample.meta.get('image_id', sample.id)}"
    return [name] if len(sample.images) == 1 else [f"{name}/{i}" for i in range(1, len(sample.images) + 1)]


def images_of(samples: Sequence[Sample]) -> list[PrismImage]:
    """Every image once, in the order of the samples."""
    found: dict[str, PrismImage] = {}
    for sample in samples:
        facts = sample.meta.get("true_caption")
        for image_id, image in zip(image_ids(sample), sample.images, strict=True):
            found.setdefault(image_id, PrismImage(image_id, sample.benchmark, image, facts))
    return list(found.values())


def image_hash(image: Callable[[], Image]) -> str:
    """Hash of an image: of its stored bytes where its opener knows them (`StoredImage`), else of its pixels."""
    if image not in _HASHES:
        _HASHES[image] = image.stored_hash() if hasattr(image, "stored_hash") else _pixel_hash(image())
    return _HASHES[image]


def _pixel_hash(image: Image) -> str:
    return hashlib.sha256(f"{image.size}/{image.mode}/".encode() + image.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """Gives every image at least one caption. looks: the reader gets the image instead. fingerprint: JSON values that
    change the captions, for the run's key.
    """

    name: str
    fingerprint: Mapping[str, Any]
    captions: Callable[[Sequence[PrismImage]], Captions]
    looks: bool = False


def model_captions(profile: Profile, captioner: Backend, run: str) -> Source:
    """Captions written by a model, sampled as profile.prism says: a run of their own, runs/<profile>/captions/<run>, so
    that another reader or scoring does not caption again.
    """
    sampling = caption_sampling(profile)
    made_by = {"model": captioner.model_hash, "sampling": asdict(sampling), "prompt": prompts.CAPTION}

    def captions(images: Sequence[PrismImage]) -> Captions:
        parts = {"captioner": made_by, "images": {image.id: image_hash(image.open) for image in images}}
        with Run.open(profile, CAPTIONS_STAGE, run, parts, RECIPE) as opened:
            store = opened.rows("captions")
            if opened.complete:
                return by_image(store, sampling.n)
            failed = _write(captioner, sampling, images, store)
            found = by_image(store, sampling.n)
            tokens = [caption.num_tokens for captions in found.values() for caption in captions]
            opened.finish(
                values={"caption_tokens": sum(tokens) / len(tokens)}, n=len(found), unit="image",
                seeds=[sampling.seed], captions_per_image=sampling.n, left_out=failed,
            )  # fmt: skip
        return found

    return Source(captioner.name, made_by, captions)


def caption_sampling(profile: Profile) -> Sampling:
    """How captions are drawn for Prism."""
    how, seed = profile.prism, profile.seed
    return Sampling(how.caption_max_tokens, how.caption_temperature, n=how.captions_per_image, seed=seed)


def draw_captions(profile: Profile, captioner: Backend, image: PrismImage) -> list[Caption]:
    """A model's captions of one image, sampled as profile.prism says and kept nowhere."""
    sampling = caption_sampling(profile)
    with TemporaryDirectory() as folder, RowStore(Path(folder) / "captions.jsonl") as store:
        _write(captioner, sampling, [image], store)
        return by_image(store, sampling.n)[image.id]


def _write(captioner: Backend, sampling: Sampling, images: Sequence[PrismImage], store: RowStore) -> dict[str, str]:
    """Write what is missing; returns the images that got no caption in `ATTEMPTS` tries, with the reason. Raises
    UserError where that is too many: what is done stays on disk and the next call makes the rest.
    """
    items = [ImageItem(image.id, image.open) for image in images]
    with Progress("captions", len(images) * sampling.n) as bar:
        bar.update(len(store))
        for _ in range(ATTEMPTS):
            tally = Tally()
            rows = draw(enumerate(items), lambda: captioner, sampling, prompts.CAPTION, tally, done=store)
            for row in rows:
                store.append(row)
                bar.update()
            if not (failed := tally.bad | tally.failed):
                return {}
    if too_many(len(failed), len(images)):
        raise UserError(failure_message("images were not captioned", failed, len(images), store))
    log.warning(failure_message("images were not captioned and are left out", failed, len(images), store))
    return failed


def by_image(store: RowStore, most: int) -> dict[str, list[Caption]]:
    """Image id -> its captions by index, at most so many; images without one are not in it."""
    found: dict[str, list[Caption]] = {}
    for row in store.read(Caption):
        if row.index < most:
            found.setdefault(row.image_id, []).append(row)
    return {image_id: sorted(rows, key=lambda row: row.index) for image_id, rows in found.items()}


def captions_of(run_folder: Path) -> dict[str, list[Caption]]:
    """Image id -> captions of a Prism run."""
    folder = run_folder.parents[1] / CAPTIONS_STAGE / run_folder.name
    return by_image(RowStore(folder / "captions.jsonl"), sys.maxsize)


def written_captions(image_id: str, texts: Sequence[str], name: str, count: TokenCounter) -> list[Caption]:
    """Captions that no model wrote for this image."""
    return [
        Caption(id=caption_id(image_id, index), image_id=image_id, index=index, caption=text, model=name,
                num_tokens=count(text), finish_reason="stop")
        for index, text in enumerate(texts)
    ]  # fmt: skip
