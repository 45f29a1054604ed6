"""The mini world as an image source for curation and training, and as benchmarks for evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.mini.render import render
from caprl_utils.mini.world import KINDS, Picture, caption, derived_seed, distractors, picture
from caprl_utils.prism.loaders import Sample

BENCHMARK_KINDS = {f"mini-{kind}": kind for kind in KINDS}
OPTION_KINDS = ("scene", "geometry")  # asked with options; the others ask for a short answer
QUESTIONS_PER_IMAGE = 2


def images(
    split: str, num_images: int, kinds: Sequence[str] | None = None, seed: int = 0
) -> Iterator[tuple[str, object, str, dict]]:
    """(id, PIL image, kind, meta) of a split, kinds in turn; ``meta`` holds the true caption and the leaking keys."""
    for number in range(num_images):
        yield image_at(split, number, kinds, seed)


def image_at(
    split: str, number: int, kinds: Sequence[str] | None = None, seed: int = 0
) -> tuple[str, object, str, dict]:
    """Image ``number`` of those that `images` yields."""
    chosen = tuple(kinds or KINDS)
    if unknown := set(chosen) - set(KINDS):
        raise UserError(
            f"images.kinds: the mini world has no {', '.join(sorted(unknown))}; it has {', '.join(KINDS)}"
        )
    shown = picture(split, number // len(chosen), chosen[number % len(chosen)], seed)
    return shown.id, render(shown), shown.kind, truth(shown)


def truth(shown: Picture) -> dict:
    """What is true of a picture, for floors, ceilings and for checking the filter."""
    return {
        "true_caption": caption(shown.facts, shown.kind),
        "facts": {fact.key: fact.value for fact in shown.facts},
        "known": {fact.key: fact.value for fact in shown.known},
    }


def benchmark(name: str, num_samples: int | None = None, seed: int = 0) -> list[Sample]:
    """Samples of one mini benchmark: two questions an image, on images of the split ``benchmark``."""
    if name not in BENCHMARK_KINDS:
        raise UserError(f"no mini benchmark {name!r}: there are {', '.join(BENCHMARK_KINDS)}")
    kind, samples = BENCHMARK_KINDS[name], []
    for number in range((num_samples or 200) // QUESTIONS_PER_IMAGE):
        shown = picture("benchmark", number, kind, seed)
        rng = random.Random(derived_seed("benchmark", shown.id, seed))
        for fact in rng.sample(shown.facts, QUESTIONS_PER_IMAGE):
            options = [fact.value, *distractors(rng, fact, shown.facts)] if kind in OPTION_KINDS else []
            rng.shuffle(options)
            gold = prompts.LETTERS[options.index(fact.value)] if options else fact.value
            samples.append(_sample(name, shown, fact.question, options, gold))
    return samples


def _sample(name: str, shown: Picture, question: str, options: list[str], gold: str) -> Sample:
    return Sample(
        id=f"{shown.id}-{question.removeprefix('What is the ').rstrip('?').replace(' ', '-')}",
        benchmark=name,
        images=(lambda: render(shown),),
        question=question,
        options=tuple(options),
        gold=gold,
        meta=truth(shown) | {"image_id": shown.id},
    )
