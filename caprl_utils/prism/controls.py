"""Pseudo-captioners that bound a captioner's score, and the control for length (all ours).

Floors: an empty caption (what the question gives away) and another image's (what a fluent, unrelated text gives away).
Ceilings: the complete true facts (what the reader can reach, rendered images only) and the image itself (direct VQA).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from caprl_utils.captions.caption import caption_id
from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.prism.sources import Captions, PrismImage, Source, TokenCounter, captions_of, written_captions
from caprl_utils.records import Sample
from caprl_utils.runs import load_result


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


def cut_captions(run_folder: Path, shorter: Path, count_tokens: TokenCounter) -> Source:
    """Control for length: a run's captions, each cut to the words that another run's caption of the image has. Whole
    sentences are kept while they fit; where not even the first fits, its first words. As many captions an image as both
    runs have.
    """
    name = f"{run_folder.name} cut to the length of {shorter.name}"

    def captions(images: Sequence[PrismImage]) -> Captions:
        long, short, found = captions_of(run_folder), captions_of(shorter), {}
        for image in images:
            pairs = zip(long.get(image.id, ()), short.get(image.id, ()), strict=False)
            texts = [cut(a.caption, len(b.caption.split())) for a, b in pairs]
            found[image.id] = written_captions(image.id, texts, name, count_tokens)
        return found

    keys = [load_result(folder)["key"] for folder in (run_folder, shorter)]
    return Source(name, {"source": "cut", "runs": keys}, captions)


def cut(text: str, num_words: int) -> str:
    """The first whole sentences of a text that have at most `num_words` words; else its first words."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    ends = accumulate(len(sentence.split()) for sentence in sentences)
    return " ".join(sentences[: sum(end <= num_words for end in ends)] or text.split()[:num_words])


def controls(
    samples: Sequence[Sample], base: Path, trained: Sequence[Path], count_tokens: TokenCounter
) -> dict[str, Source]:
    """Floors, ceilings and the control for length that need no captioner, by run name. base, trained: finished Prism
    runs; base's captions are moved around for the other-image floor, those of each in trained are cut to base's length.
    The true facts come only where every sample has them. count_tokens: see `caption.token_counter`.
    """
    found = {"floor-empty": empty_captions(), "floor-other-image": other_image_captions(base)}
    found |= {f"{run.name}-cut": cut_captions(run, base, count_tokens) for run in trained}
    if all(sample.meta.get("true_caption") for sample in samples):
        found["ceiling-true-facts"] = true_captions(count_tokens)
    return found
