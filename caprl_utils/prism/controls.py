"""Pseudo-captioners that bound a captioner's score, and controls for length (all ours).

Floors: an empty caption (what the question gives away) and another image's (what a fluent, unrelated text gives away).
Ceilings: the complete true facts (what the reader can reach, rendered images only) and the image itself (direct VQA).
Length: captions under a budget of tokens, and short captions joined to the length of long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path

from caprl_utils import paths
from caprl_utils.captions.caption import Caption, caption_id, token_counter, tokenizer_of
from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.prism.sources import Captions, PrismImage, Source, TokenCounter, captions_of, written_captions
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


def other_image_captions(run_folder: Path) -> Source:
    """Floor: each image gets the captions of the next image of its benchmark, from a finished Prism run."""

    def captions(images: Sequence[PrismImage]) -> Captions:
        """Raises UserError for a benchmark of one image, which has no other."""
        there, moved = captions_of(run_folder), {}
        for benchmark in dict.fromkeys(image.benchmark for image in images):
            ids = [image.id for image in images if image.benchmark == benchmark and image.id in there]
            if len(ids) < 2:
                raise UserError(f"{benchmark} has not two images with captions in {shown(run_folder)}")
            for image_id, other in zip(ids, [*ids[1:], ids[0]], strict=True):
                moved[image_id] = [
                    row.model_copy(update={"id": caption_id(image_id, row.index), "image_id": image_id})
                    for row in there[other]
                ]
        return moved

    taken_from = {"source": "other image", "run": load_result(run_folder)["key"]}
    return Source("another image's caption", taken_from, captions)


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
    found = {"floor-empty": empty_captions(), "floor-other-image": other_image_captions(folder / base)}
    found[f"{base}-joined"] = joined_captions(folder / base, [folder / name for name in trained])
    if all(sample.meta.get("true_caption") for sample in samples):
        found["ceiling-true-facts"] = true_captions(token_counter(captioners[base]))
    for count, (name, model) in product(profile.prism.token_budgets, captioners.items()):
        found[budget_run(name, count)] = first_tokens(folder / name, model, count)
    return found


def budget_run(run: str, count: int) -> str:
    """Name of the Prism run of a run's captions under a budget of tokens."""
    return f"{run}-first-{count}"
