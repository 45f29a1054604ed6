"""The mini world as an image source, as benchmarks, and as rows for the stages of pretraining without captions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed
from caprl_utils.mini.render import render
from caprl_utils.mini.world import KINDS, UNSEEN, Picture, caption, distractors, picture
from caprl_utils.records import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "mini-world"
BENCHMARK_KINDS = {f"mini-{kind}": kind for kind in (*KINDS, *UNSEEN)}
OPTION_KINDS = ("scene", "geometry")  # asked with options; the others ask for a short answer
QUESTIONS_PER_IMAGE = 2
QUESTIONS_IN_TURN = 4  # asked of a training image in one conversation


def image_at(
    split: str, number: int, kinds: Sequence[str] | None = None, seed: int = 0
) -> tuple[str, Image, str, dict[str, Any]]:
    """(id, PIL image, kind, meta) of image `number` of a split, kinds in turn; see `registry.DrawnSource`.

    Raises UserError for a kind that the mini world lacks.
    """
    chosen = tuple(kinds or KINDS)
    if unknown := set(chosen) - set(KINDS):
        raise UserError(f"images.kinds: the mini world has no {', '.join(sorted(unknown))}; it has {', '.join(KINDS)}")
    shown = picture(split, number // len(chosen), chosen[number % len(chosen)], seed)
    return shown.id, render(shown), shown.kind, truth(shown)


def truth(shown: Picture) -> dict[str, Any]:
    """What is true of a picture, for floors, ceilings and for checking the filter; `known` is guessed rightly."""
    return {
        "world": NAME,
        "true_caption": caption(shown.facts, shown.kind),
        "facts": {fact.key: fact.value for fact in shown.facts},
        "known": {fact.key: fact.value for fact in shown.known if fact.value == fact.options[0]},
        "asked": {fact.question(form): fact.key for fact in shown.facts for form in range(2)},
    }


def benchmark(name: str, num_samples: int | None = None, seed: int = 0) -> list[Sample]:
    """Samples of one mini benchmark: two questions an image, on images of the split ``benchmark``."""
    if name not in BENCHMARK_KINDS:
        raise UserError(f"no mini benchmark {name!r}: there are {', '.join(BENCHMARK_KINDS)}")
    kind, samples = BENCHMARK_KINDS[name], []
    for number in range((num_samples or 200) // QUESTIONS_PER_IMAGE):
        shown = picture("benchmark", number, kind, seed)
        rng = random.Random(derive_seed("benchmark", shown.id, seed))
        asked = [fact for fact in shown.facts if kind != "chart-type" or fact.relation not in ("chart type", "unit")]
        for fact in rng.sample(asked, QUESTIONS_PER_IMAGE):
            options = [fact.value, *distractors(rng, fact, shown.facts)] if kind in OPTION_KINDS else []
            rng.shuffle(options)
            samples.append(Sample(
                id=f"{shown.id}-{fact.key.replace(' ', '-')}", benchmark=name, images=(partial(render, shown),),
                question=fact.question(rng.randrange(2)), options=tuple(options),
                gold=prompts.LETTERS[options.index(fact.value)] if options else fact.value,
                meta=truth(shown) | {"image_id": shown.id, "asks": fact.key},
            ))  # fmt: skip
    return samples


def training_rows(stage: str, num_images: int, seed: int) -> Iterator[tuple[str, Image, list[tuple[str, str]]]]:
    """(id, image, turns) of the split `pretraining` for a stage of pretraining.

    "align" (BLIP-558K's role): the true caption, complete where BLIP's are short: of captions with two facts drawn
    at random no projector learned to read in 640 steps (reports/lab-log.md). "sft" (Open-LLaVA-NeXT-1M's role):
    short and multiple-choice questions in turn, in the words of the evaluation. A question with options is answered by
    the option's text, as in the zoo's lessons: letters asked of images were learned at chance (reports/lab-log.md).
    """
    for number in range(num_images):
        shown, turns = picture("pretraining", number // len(KINDS), KINDS[number % len(KINDS)], seed), []
        if stage == "align":
            turns.append((prompts.CAPTION, caption(shown.facts, shown.kind)))
        else:
            rng = random.Random(derive_seed("sft", shown.id, seed))
            for place, fact in enumerate(rng.sample(shown.facts, min(QUESTIONS_IN_TURN, len(shown.facts)))):
                options = [fact.value, *distractors(rng, fact, shown.facts)] if place % 2 == 1 else []
                rng.shuffle(options)
                question = prompts.look_question(fact.question(rng.randrange(2)), options)
                turns.append((question, f"{prompts.ANSWER_PREFILL} {fact.value}"))
        yield shown.id, render(shown), turns
