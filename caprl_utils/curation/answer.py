"""Can the question be answered from the image, and only from it? (paper, QA curation, step 4)

The filter model answers each question several times, options shuffled, with the image and without it; an answer that
states neither letter nor option counts as wrong. As released (`prompts: authors`) it is asked for the letter alone and
may say with the image that no option is right. Ours: the question with another image, and without its options.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from PIL.Image import Image

from caprl_utils import prompts
from caprl_utils.answers import read_letter
from caprl_utils.hashing import derive_seed
from caprl_utils.models.base import Completion, Request, Sampling
from caprl_utils.records import Question

MAX_TOKENS = 10  # author script: the reward LLM's; their filter's 4 are too few for an answer in words (ours)
NONE = "None of the above"  # author script: a fifth option where the image is shown
ASK_LETTER = "{question}{options}. Answer the question with only the correct letter"  # author script
VISUAL, TEXT, OTHER, OPEN = "visual", "text", "other", "open"  # what a probe shows: the fields of `Question`


def shuffled(seed: int, image_id: str, number: int, round_: int, count: int) -> list[int]:
    """Order of the options in one round: place -> index of the option as written. Stable over machines."""
    order = list(range(count))
    random.Random(derive_seed(seed, f"{image_id}#{number}", round_, bits=64)).shuffle(order)
    return order


def _probe_id(image_id: str, number: int, view: str, round_: int) -> str:
    """Id of a request; the sampling of its answer is seeded by it."""
    return f"{image_id}#{number}/{view}/{round_}"


def sampling(authors: bool, seed: int) -> Sampling:
    """How the filter model answers: at 0.1, penalty 1.05 (author script), or 0.6 (ours: as their reward reader)."""
    temperature, penalty = (0.1, 1.05) if authors else (0.6, 1.0)
    return Sampling(MAX_TOKENS, temperature, repetition_penalty=penalty, seed=seed)


def requests_about(
    image_id: str, questions: Sequence[Question], image: Image, other: Image | None, rounds: int, seed: int,
    authors: bool = False,
) -> Iterator[Request]:  # fmt: skip
    """All requests about one image; `other` is another image, or None to leave that probe out."""
    views = {VISUAL: image, TEXT: None} | ({OTHER: other} if other is not None else {})
    for question in questions:
        for round_ in range(rounds):
            order = shuffled(seed, image_id, question.number, round_, len(question.options))
            options = [question.options[index] for index in order]
            for view, shown in views.items():
                probe = _probe_id(image_id, question.number, view, round_)
                if authors:
                    told = prompts.format_options([*options, NONE] if view == VISUAL else options)
                    yield Request(probe, ASK_LETTER.format(question=question.question, options=told), shown)
                else:
                    asked = prompts.look_question(question.question, options)
                    yield Request(probe, asked, shown, prompts.ANSWER_PREFILL)
        bare = prompts.look_question(question.question)
        yield Request(_probe_id(image_id, question.number, OPEN, 0), bare, image, prompts.ANSWER_PREFILL)


def image_of(probe_id: str) -> str:
    """Id of the image that a request is about."""
    return probe_id.rpartition("#")[0]


def with_answers(
    image_id: str, question: Question, found: Mapping[str, Completion], rounds: int, seed: int, authors: bool = False
) -> Question:  # fmt: skip
    """A question with the answers to its requests. found: by id, all that were sent."""
    letters: dict[str, list[str | None]] = {VISUAL: [], TEXT: [], OTHER: []}
    for round_ in range(rounds):
        order = shuffled(seed, image_id, question.number, round_, len(question.options))
        for view, given in letters.items():
            if completion := found.get(_probe_id(image_id, question.number, view, round_)):
                none = [NONE] if authors and view == VISUAL else []
                given.append(_letter_of(completion, order, [*question.options, *none]))
    bare = found[_probe_id(image_id, question.number, OPEN, 0)].text
    answers = {view: tuple(given) for view, given in letters.items()}
    return question.model_copy(update=answers | {"open_answer": bare.strip()})


def _letter_of(completion: Completion, order: Sequence[int], options: Sequence[str]) -> str | None:
    """The letter of `options` that a completion to the question states; order: of all but the last one, `NONE`, if
    that was offered. A completion that is exactly one option's text states its letter; None when nothing is clear.
    """
    order = [*order, *range(len(order), len(options))]
    letters = prompts.LETTERS[: len(order)]
    stated = read_letter(completion.text, letters, [options[index] for index in order]).letter
    return None if stated is None else letters[order[letters.index(stated)]]
