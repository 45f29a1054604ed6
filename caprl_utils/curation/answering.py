"""Can the question be answered from the image, and only from it? (paper, QA curation, step 4)

The filter model answers each question several times, options shuffled, with the image and without it.
Letters are read by the project's one parser, which takes an option's exact text for its letter; an answer that
states neither counts as wrong. Two further probes, ours: the question with another image, and the question without
its options.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from caprl_utils import prompts
from caprl_utils.answers import parse_letter
from caprl_utils.models.base import Completion, Request
from caprl_utils.records import Answered, Answers, Question

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_TOKENS = 10  # author script: the reward LLM's limit; a letter needs one or two
VISUAL, TEXT, OTHER, OPEN = "visual", "text", "other", "open"


@dataclass(frozen=True)
class Probe:
    """One request: which question, in which round, and what the model is shown."""

    image_id: str
    number: int
    round: int
    view: str  # VISUAL, TEXT, OTHER or OPEN

    @property
    def id(self) -> str:
        """Row id; the sampling of the answer is seeded by it."""
        return f"{self.image_id}#{self.number}/{self.view}/{self.round}"


@lru_cache(maxsize=2**14)  # asked for when the question is sent and when its answers are read
def shuffled(seed: int, image_id: str, number: int, round_: int, count: int) -> tuple[int, ...]:
    """Order of the options in one round: place -> index of the option as written. Stable over machines."""
    digest = hashlib.sha256(f"{seed}/{image_id}#{number}/{round_}".encode()).digest()
    order = list(range(count))
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    return tuple(order)


def requests_for(
    image_id: str,
    questions: Mapping[int, Question],
    image: Image,
    other: Image | None,
    rounds: int,
    seed: int,
) -> Iterator[tuple[Probe, Request]]:
    """All requests about one image; `other` is another image, or None to leave that probe out."""
    views = {VISUAL: image, TEXT: None} | ({OTHER: other} if other is not None else {})
    for number, question in questions.items():
        for round_ in range(rounds):
            order = shuffled(seed, image_id, number, round_, len(question.options))
            options = [question.options[index] for index in order]
            prompt = prompts.look_question(question.question, options)
            for view, shown in views.items():
                probe = Probe(image_id, number, round_, view)
                yield probe, Request(probe.id, prompt, shown, prompts.ANSWER_PREFILL)
        probe = Probe(image_id, number, 0, OPEN)
        bare = prompts.look_question(question.question)
        yield probe, Request(probe.id, bare, image, prompts.ANSWER_PREFILL)


def letter_of(completion: Completion, order: Sequence[int], options: Sequence[str]) -> str | None:
    """The letter of `options` (in their own order) that a completion to the shuffled question states.

    A completion that is exactly one option's text states its letter; None when nothing is stated clearly.
    """
    letters = prompts.LETTERS[: len(order)]
    stated = parse_letter(completion.text, letters, options=[options[index] for index in order])
    return None if stated is None else letters[order[letters.index(stated)]]


def collect(
    image_id: str,
    questions: Mapping[int, Question],
    found: Mapping[Probe, Completion],
    seed: int,
    rounds: int,
) -> Answered:
    """The answers about one image as a row. `found` holds a completion for every probe that was sent."""
    rows = []
    for number, question in questions.items():
        letters: dict[str, list[str | None]] = {VISUAL: [], TEXT: [], OTHER: []}
        for round_ in range(rounds):
            order = shuffled(seed, image_id, number, round_, len(question.options))
            for view, given in letters.items():
                completion = found.get(Probe(image_id, number, round_, view))
                if completion is not None:
                    given.append(letter_of(completion, order, question.options))
        bare = found[Probe(image_id, number, 0, OPEN)].text
        rows.append(
            Answers(
                number=number,
                visual=tuple(letters[VISUAL]),
                text=tuple(letters[TEXT]),
                other=tuple(letters[OTHER]),
                open_answer=None if bare is None else bare.strip(),
            )
        )
    return Answered(id=image_id, answers=tuple(rows))


def accuracy(letters: Sequence[str | None], answer: str) -> float | None:
    """Share of rounds that gave the right letter; None without rounds."""
    return sum(letter == answer for letter in letters) / len(letters) if letters else None
