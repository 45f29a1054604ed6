"""Data of the mini world for the stages of pretraining that captions do not cover: alignment and fine-tuning."""

from __future__ import annotations

import random
from collections.abc import Iterator

from caprl_utils import prompts
from caprl_utils.mini.render import render
from caprl_utils.mini.world import KINDS, Fact, Picture, caption, derived_seed, distractors, picture

SPLIT = "pretraining"
QUESTIONS = 4  # asked of each image in one conversation


def pictures(num_images: int, seed: int) -> Iterator[Picture]:
    """The pictures of "mini-world:pretraining:NUM_IMAGES:SEED", kinds in turn."""
    for number in range(num_images):
        yield picture(SPLIT, number // len(KINDS), KINDS[number % len(KINDS)], seed)


def alignment_captions(num_images: int, seed: int) -> Iterator[tuple[str, object, list[tuple[str, str]]]]:
    """(id, PIL image, one turn) with the true caption of each picture: BLIP-558K's role.

    Complete, where BLIP's are short: of captions with two facts drawn at random no projector learned to read in 640
    steps (reports/lab-log.md).
    """
    for shown in pictures(num_images, seed):
        yield shown.id, render(shown), [(prompts.CAPTION, caption(shown.facts, shown.kind))]


def conversations(num_images: int, seed: int) -> Iterator[tuple[str, object, list[tuple[str, str]]]]:
    """(id, PIL image, turns) with short and multiple-choice questions in turn: Open-LLaVA-NeXT-1M's role."""
    for shown in pictures(num_images, seed):
        rng = random.Random(derived_seed("sft", shown.id, seed))
        facts = rng.sample(shown.facts, min(QUESTIONS, len(shown.facts)))
        turns = [_turn(rng, fact, shown, with_options=number % 2 == 1) for number, fact in enumerate(facts)]
        yield shown.id, render(shown), turns


def _turn(rng: random.Random, fact: Fact, shown: Picture, with_options: bool) -> tuple[str, str]:
    """Question and answer in the words of the evaluation. A question with options is answered by the option's text,
    as in the zoo's lessons: letters asked of images were learned at chance (reports/lab-log.md).
    """
    options = [fact.value, *distractors(rng, fact, shown.facts)] if with_options else []
    rng.shuffle(options)
    return prompts.look_question(fact.question, options), f"{prompts.ANSWER_PREFILL} {fact.value}"
