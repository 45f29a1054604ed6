"""Pseudo-captioners that bound a captioner's score, and controls for length (all ours).

Floors: an empty caption (what the question gives away) and another image's, as long (what fluent text gives away).
Ceilings: the complete true facts (what the reader can reach, rendered images only) and the image itself (direct VQA).
Length: captions under a budget of tokens, and short captions joined to the length of long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path

from caprl_utils import paths
from caprl_utils.captions.caption import Caption, token_counter, tokenizer_of
from caprl_utils.errors import UserError
from caprl_utils.prism.sources import (
    Captions,
    PrismImage,
    Source,
    TokenCounter,
    captions_of,
    image_hash,
    written_captions,
)
from caprl_utils.records import Sample
from caprl_utils.runs import load_result
from caprl_utils.schema import ModelConfig, Profile


def empty_captions() -> Source:
    """Floor: the caption is empty."""
    return _one_each("empty caption", "empty", lambda image: "", lambda text: 0)


def true_captions(count_tokens: TokenCounter) -> Source:
    """Ceiling: every fact of the image, from the benchmark itself (rendered images only)."""
    return _one_each("complete true facts", "true", lambda image: image.true_caption, count_tokens)


def image_itself() -> Source:
    """Ceiling: the reader, a VLM, looks at the image (direct VQA); one placeholder an image."""
    return replace(_one_each("the image itself", "image", lambda image: "", lambda text: None), looks=True)


def _one_each(name: str, source: str, text_of: Callable[[PrismImage], str], count: TokenCounter) -> Source:
    def captions(images: Sequence[PrismImage]) -> Captions:
        return {image.id: written_captions(image.id, [text_of(image)], name, count) for image in images}

    return Source(name, {"source": source}, captions)


def other_image_captions(source: Source) -> Source:
    """Floor, a placebo: each image gets captions of other images of its benchmark, for each of its own the one that is
    nearest to it in length (characters). Images without a caption get none.
    """

    def captions(images: Sequence[PrismImage]) -> Captions:
        """Raises UserError for a benchmark without captions of two different pictures."""
        own, moved = source.captions(images), {}
        for benchmark in dict.fromkeys(image.benchmark for image in images):
            there = [image for image in images if image.benchmark == benchmark and image.id in own]
            pictures = {image.id: image_hash(image.open) for image in there}
            if len(set(pictures.values())) < 2:
                raise UserError(f"{benchmark} has not two images with captions of {source.name}")
            moved |= _nearest({image: own[image] for image in pictures}, pictures)
        return moved

    return Source("another image's caption", {"source": "other image", "of": source.fingerprint}, captions)


def captions_of_run(run_folder: Path) -> Source:
    """The captions of a finished Prism run again."""
    made_from = {"run": load_result(run_folder)["key"]}
    return Source(run_folder.name, made_from, lambda images: captions_of(run_folder))


def _nearest(own: Captions, pictures: Mapping[str, str]) -> dict[str, list[Caption]]:
    """Image -> for each of its captions the nearest in length of another picture (`pictures`: image -> its hash)."""
    rows = sorted((row for rows in own.values() for row in rows), key=lambda row: (len(row.caption), row.index))
    moved: dict[str, list[Caption]] = {image: [] for image in own}
    for place, row in enumerate(rows):
        ways = ((rows[i] for i in way) for way in (range(place - 1, -1, -1), range(place + 1, len(rows))))
        others = (next((o for o in way if pictures[o.image_id] != pictures[row.image_id]), None) for way in ways)
        other = min(filter(None, others), key=lambda other: abs(len(other.caption) - len(row.caption)))
        update = {"id": row.id, "image_id": row.image_id, "index": row.index}
        moved[row.image_id].append(other.model_copy(update=update))
    return {image: sorted(found, key=lambda row: row.index) for image, found in moved.items()}


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

    def captions(images: Sequence[PrismImage]) -> Captions:
        return {image: [cut(row) for row in rows] for image, rows in captions_of(run_folder).items()}

    made_from = {"source": "first tokens", "count": count, "run": load_result(run_folder)["key"]}
    return Source(f"first {count} tokens of {run_folder.name}", made_from, captions)


def joined_captions(run_folder: Path, longer: Sequence[Path]) -> Source:
    """A run's captions of an image joined, one after the other from each of them on, until their tokens are as near as
    they come to the mean of the runs `longer`: what length alone would bring.
    """
    means = [load_result(folder)["values"]["caption_tokens"] for folder in longer]
    target = sum(means) / len(means)

    def joined(rows: Sequence[Caption], start: int) -> Caption:
        turned = [*rows[start:], *rows[:start]]
        lengths = [*accumulate(row.num_tokens - 1 for row in turned)]  # without the end of each turn
        used = 1 + min(range(len(turned)), key=lambda place: abs(lengths[place] + 1 - target))
        text = " ".join(row.caption for row in turned[:used])
        return rows[start].model_copy(update={"caption": text, "num_tokens": lengths[used - 1] + 1})

    def captions(images: Sequence[PrismImage]) -> Captions:
        found = captions_of(run_folder).items()
        return {image: [joined(rows, start) for start in range(len(rows))] for image, rows in found}

    keys = [load_result(folder)["key"] for folder in (run_folder, *longer)]
    return Source(f"{run_folder.name} joined", {"source": "joined", "runs": keys}, captions)


def controls(
    profile: Profile, samples: Sequence[Sample], captioners: Mapping[str, ModelConfig], base: str,
    trained: Sequence[str],
) -> dict[str, Source]:  # fmt: skip
    """Floors, ceilings and controls for length that need no captioner, by run name. captioners: by the names of their
    finished Prism runs. base: the one whose captions are moved to other images, and joined to the length of those of
    `trained`. The true facts come only where every sample has them.
    """
    folder = paths.RUNS / profile.name / "prism"
    found = {"floor-empty": empty_captions(), "floor-other-image": other_image_captions(captions_of_run(folder / base))}
    found[f"{base}-joined"] = joined_captions(folder / base, [folder / name for name in trained])
    if all(sample.meta.get("true_caption") for sample in samples):
        found["ceiling-true-facts"] = true_captions(token_counter(captioners[base]))
    for count, (name, model) in product(profile.prism.token_budgets, captioners.items()):
        found[budget_run(name, count)] = first_tokens(folder / name, model, count)
    return found


def budget_run(run: str, count: int) -> str:
    """Name of the Prism run of a run's captions under a budget of tokens."""
    return f"{run}-first-{count}"
