"""Stage 1 of Prism, where captions come from: a model, or what bounds a model's score and controls its length (ours).

Floors: an empty caption (what the question gives away) and another image's, as long (what fluent text gives away).
Ceilings: the complete true facts (rendered images only) and the image itself (direct VQA). Length: captions under a
budget of tokens, and short captions joined to the length of long ones.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from PIL.Image import Image

from caprl_utils import paths, prompts
from caprl_utils.captions.caption import Caption, Tally, caption_id, draw, failure_message, token_counter, tokenizer_of
from caprl_utils.errors import UserError
from caprl_utils.images import ImageItem
from caprl_utils.models.base import Backend, Sampling
from caprl_utils.prism.loading import too_many
from caprl_utils.progress import Progress
from caprl_utils.records import Sample
from caprl_utils.runs import RowStore, Run, load_result
from caprl_utils.schema import ModelConfig, Profile

CAPTIONS_STAGE = "captions"
RECIPE = ["caprl_utils.captions.caption", "caprl_utils.models.local", "caprl_utils.prompts"]
ATTEMPTS = 3  # ours: an image, or a question, that fails as often is left out
Captions = Mapping[str, list[Caption]]  # by image id
TokenCounter = Callable[[str], int | None]
log = logging.getLogger(__name__)


def image_ids(sample: Sample) -> list[str]:
    """Ids of a sample's images, unique over benchmarks: its loader's `image_id`, numbered if there are several."""
    name = f"{sample.benchmark}/{sample.meta.get('image_id', sample.id)}"
    return [name] if len(sample.images) == 1 else [f"{name}/{i}" for i in range(1, len(sample.images) + 1)]


def images_of(samples: Sequence[Sample]) -> list[ImageItem]:
    """Every image once, in the order of the samples. kind: its benchmark; meta: of its first sample."""
    found: dict[str, ImageItem] = {}
    for sample in samples:
        for image_id, image in zip(image_ids(sample), sample.images, strict=True):
            found.setdefault(image_id, ImageItem(image_id, image, kind=sample.benchmark, meta=dict(sample.meta)))
    return list(found.values())


@lru_cache(maxsize=100_000)  # of the images of several captioners
def image_hash(image: Callable[[], Image]) -> str:
    """Hash of an image: of its stored bytes where its opener knows them (`StoredImage`), else of its pixels."""
    if hasattr(image, "stored_hash"):
        return image.stored_hash()
    opened = image()
    data = f"{opened.size}/{opened.mode}/".encode() + opened.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """Gives images captions; looks: the reader sees them instead. fingerprint: JSON values for the run's key."""

    name: str
    fingerprint: Mapping[str, Any]
    captions: Callable[[Sequence[ImageItem]], Captions]
    looks: bool = False


def model_captions(profile: Profile, captioner: Backend, run: str) -> Source:
    """Captions written by a model, sampled as profile.prism says: a run of their own, runs/<profile>/captions/<run>, so
    that another reader or scoring does not caption again. An image that fails `ATTEMPTS` times is left out; too many
    of them are a UserError.
    """
    sampling = caption_sampling(profile)
    made_by = {"model": captioner.model_hash, "sampling": asdict(sampling), "prompt": prompts.CAPTION}

    def captions(images: Sequence[ImageItem]) -> Captions:
        parts = {"captioner": made_by, "images": {image.id: image_hash(image.load) for image in images}}
        with Run.open(profile, CAPTIONS_STAGE, run, parts, RECIPE) as opened:
            store = opened.rows("captions")
            if opened.complete:
                return by_image(store)
            with Progress("captions", len(images) * sampling.n) as bar:
                bar.update(len(store))
                for _ in range(ATTEMPTS):
                    tally = Tally()
                    for row in draw(enumerate(images), lambda: captioner, sampling, prompts.CAPTION, tally, done=store):
                        store.append(row)
                        bar.update()
                    if not (failed := tally.bad | tally.failed):
                        break
            if too_many(len(failed), len(images)):
                raise UserError(failure_message("images were not captioned", failed, len(images), store))
            if failed:
                log.warning(failure_message("images were not captioned and are left out", failed, len(images), store))
            found = by_image(store)
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


def draw_captions(profile: Profile, captioner: Backend, image: ImageItem) -> list[Caption]:
    """A model's captions of one image, sampled as profile.prism says and kept nowhere."""
    rows = draw([(0, image)], lambda: captioner, caption_sampling(profile), prompts.CAPTION, Tally())
    return sorted(rows, key=lambda row: row.index)


def by_image(store: RowStore) -> dict[str, list[Caption]]:
    """Image id -> its captions by index; images without one are not in it."""
    found: dict[str, list[Caption]] = {}
    for row in sorted(store.read(Caption), key=lambda row: row.index):
        found.setdefault(row.image_id, []).append(row)
    return found


def written_captions(image_id: str, texts: Sequence[str], name: str, count: TokenCounter) -> list[Caption]:
    """Captions that no model wrote for this image."""
    return [
        Caption(id=caption_id(image_id, index), image_id=image_id, index=index, caption=text, model=name,
                num_tokens=count(text), finish_reason="stop")
        for index, text in enumerate(texts)
    ]  # fmt: skip


# Floors, ceilings, and captions of finished runs in another form


def empty_captions() -> Source:
    """Floor: the caption is empty."""
    return _one_each("empty caption", "empty", lambda image: "", lambda text: 0)


def true_captions(count_tokens: TokenCounter) -> Source:
    """Ceiling: every fact of the image, from the benchmark itself (rendered images only)."""
    return _one_each("complete true facts", "true", lambda image: image.meta["true_caption"], count_tokens)


def image_itself() -> Source:
    """Ceiling: the reader, a VLM, looks at the image (direct VQA); one placeholder an image."""
    return replace(_one_each("the image itself", "image", lambda image: "", lambda text: None), looks=True)


def _one_each(name: str, source: str, text_of: Callable[[ImageItem], str], count: TokenCounter) -> Source:
    return Source(name, {"source": source}, lambda images: {
        image.id: written_captions(image.id, [text_of(image)], name, count) for image in images
    })  # fmt: skip


def other_image_captions(source: Source, images: Sequence[ImageItem]) -> Source | None:
    """Floor, a placebo: each image gets captions of other images of its benchmark, for each of its own the one that is
    nearest to it in length (characters). Images without a caption get none. None where that cannot be: a benchmark
    has no captions of two different pictures.
    """
    own, moved = source.captions(images), {}
    for benchmark in dict.fromkeys(image.kind for image in images):
        there = [image for image in images if image.kind == benchmark and image.id in own]
        pictures = {image.id: image_hash(image.load) for image in there}
        if len(set(pictures.values())) < 2:
            return None
        rows = sorted((row for image in pictures for row in own[image]), key=lambda row: (len(row.caption), row.index))
        found: dict[str, list[Caption]] = {image: [] for image in pictures}
        for place, row in enumerate(rows):
            near = []  # the next shorter and the next longer one of another picture
            for way in (reversed(rows[:place]), rows[place + 1 :]):
                near += [next((one for one in way if pictures[one.image_id] != pictures[row.image_id]), None)]
            other = min(filter(None, near), key=lambda one: abs(len(one.caption) - len(row.caption)))
            update = {"id": row.id, "image_id": row.image_id, "index": row.index}
            found[row.image_id].append(other.model_copy(update=update))
        moved |= {image: sorted(rows, key=lambda row: row.index) for image, rows in found.items()}
    made_from = {"source": "other image", "of": source.fingerprint}
    return Source("another image's caption", made_from, lambda images: moved)


def captions_of_run(
    run_folder: Path, name: str = "", form: Callable[[list[Caption]], list[Caption]] = list, **made_from: Any
) -> Source:
    """The captions of a finished Prism run again; form: what is made of those of an image, as `made_from` tells."""
    file = run_folder.parents[1] / CAPTIONS_STAGE / run_folder.name / "captions.jsonl"
    made_from["run"] = load_result(run_folder)["key"]
    return Source(name or run_folder.name, made_from, lambda images: {
        image: form(rows) for image, rows in by_image(RowStore(file)).items()
    })  # fmt: skip


def first_tokens(run_folder: Path, model: ModelConfig, count: int) -> Source:
    """A run's captions under a budget: what its captioner, `model`, would have written with so many tokens at most.
    Nothing is drawn again: a caption's tokens do not depend on those after them.
    """
    tokenizer = tokenizer_of(model)

    def cut(row: Caption) -> Caption:
        if row.num_tokens <= count:
            return row
        ids = tokenizer(row.caption, add_special_tokens=False)["input_ids"][:count]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return row.model_copy(update={"caption": text.strip(), "num_tokens": count, "finish_reason": "length"})

    name = f"first {count} tokens of {run_folder.name}"
    return captions_of_run(run_folder, name, lambda rows: [*map(cut, rows)], source="first tokens", count=count)


def joined_captions(profile: Profile, captioner: Backend, base: str, longer: Sequence[str]) -> Source:
    """What length alone would bring: captions of a picture by the captioner of the run `base`, further ones drawn as
    `model_captions` does, one after the other until their tokens are as near as they come to the mean of the runs
    `longer`. As many of them a picture as a run has captions.
    """
    folder, how = paths.RUNS / profile.name / "prism", profile.prism
    records = {name: load_result(folder / name) for name in (base, *longer)}
    tokens = {name: record["values"]["caption_tokens"] for name, record in records.items()}
    target = sum(tokens[name] for name in longer) / len(longer)
    many = max(how.captions_per_image, 1 + math.ceil(target / max(1, tokens[base])))
    wide = profile.model_copy(update={"prism": how.model_copy(update={"captions_per_image": many})})
    drawn = model_captions(wide, captioner, f"{base}-joined")

    def joined(rows: list[Caption]) -> Iterator[Caption]:
        for start, row in enumerate(rows[: how.captions_per_image]):
            turned = [*rows[start:], *rows[:start]]
            lengths = [*accumulate(one.num_tokens - 1 for one in turned)]  # without the end of each turn
            used = 1 + min(range(len(turned)), key=lambda place: abs(lengths[place] + 1 - target))
            text = " ".join(one.caption for one in turned[:used])
            yield row.model_copy(update={"caption": text, "num_tokens": lengths[used - 1] + 1})

    made_from = {"source": "joined", "of": drawn.fingerprint, "target": target}
    return Source(f"{base} joined", made_from, lambda images: {
        image: [*joined(rows)] for image, rows in drawn.captions(images).items()
    })  # fmt: skip


def controls(
    profile: Profile, samples: Sequence[Sample], captioners: Mapping[str, ModelConfig], base: str, writer: Backend,
    trained: Sequence[str],
) -> dict[str, Source]:  # fmt: skip
    """Floors, ceilings and controls for length, by run name. captioners: by the names of their finished Prism runs.
    base, writer: the one whose captions are moved to other images, and joined to the length of those of `trained`.
    Other images come only where each benchmark has two, the true facts only where every sample has them.
    """
    folder = paths.RUNS / profile.name / "prism"
    found = {"floor-empty": empty_captions()}
    if placebo := other_image_captions(captions_of_run(folder / base), images_of(samples)):
        found["floor-other-image"] = placebo
    found[f"{base}-joined"] = joined_captions(profile, writer, base, trained)
    if all(sample.meta.get("true_caption") for sample in samples):
        found["ceiling-true-facts"] = true_captions(token_counter(captioners[base]))
    for count, (name, model) in product(profile.prism.token_budgets, captioners.items()):
        found[budget_run(name, count)] = first_tokens(folder / name, model, count)
    return found


def budget_run(run: str, count: int) -> str:
    """Name of the Prism run of a run's captions under a budget of tokens."""
    return f"{run}-first-{count}"
