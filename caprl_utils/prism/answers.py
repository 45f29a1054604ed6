"""Stage 2 of Prism: a reader answers every question from the caption alone.

Three ways to read, none of which guesses:
`choice`   questions with options: the letter of highest probability after "The answer is" (one forward pass, no dice);
           others: greedy. `letter_mass` tells how much probability the reader put on letters at all.
`greedy`   temperature 0 after the same prefill, for all questions.
`sampled`  the authors' setting: temperature 1.0, top-p 1.0, at most 2048 tokens, no prefill.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from caprl_utils import prompts
from caprl_utils.captions.caption import failure_message
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed
from caprl_utils.models.base import Backend, Request, Sampling
from caprl_utils.progress import Progress
from caprl_utils.records import Sample
from caprl_utils.runs import RowStore

Mode = Literal["choice", "greedy", "sampled"]
CHUNK_QUESTIONS = 256
GREEDY = Sampling(max_tokens=32)  # ours: after the prefill an answer is a word, a number or a letter
AUTHORS = Sampling(max_tokens=2048, temperature=1.0, top_p=1.0)  # author script, stage 2


@dataclass(frozen=True)
class Task:
    """One question about one caption. `caption` None: the reader sees the image instead.

    image_id: of the first image, the unit of the statistics. num_tokens: of the caption, None if unknown.
    finish_reason: "length" for a caption that was cut.
    """

    id: str
    sample: Sample
    caption_index: int
    caption: str | None
    image_id: str
    num_tokens: int | None
    finish_reason: str


class Answer(BaseModel):
    """What the reader said: a row of answers.jsonl. letters: what was read from probabilities and needs no reading any
    more: the likeliest letter, or all that are exactly as likely.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    text: str
    letters: str = ""
    finish_reason: str
    letter_mass: float | None = None


def answer_all(
    tasks: Sequence[Task], reader: Backend, mode: Mode, store: RowStore, seed: int
) -> dict[str, Answer]:
    """Answer every task that `store` does not hold yet; returns all answers by id.

    All benchmarks go through together. Raises UserError when the reader failed on a task: the finished
    rows stay and the next call makes the rest.
    """
    failed: dict[str, str] = {}
    with Progress("answers", len(tasks)) as progress:
        for number, chunk in enumerate(_chunks(tasks, mode)):
            if any(task.id not in store for task in chunk):  # whole chunks, so that a restart draws the same
                for key, answer in _ask(reader, mode, chunk, derive_seed(seed, "answers", number, bits=31)):
                    if key in store:
                        continue
                    if isinstance(answer, Answer):
                        store.append(answer)
                    else:
                        failed[key] = answer
                if len(chunk) > 1 and all(task.id in failed for task in chunk):
                    break  # nothing works any more
            progress.update(len(chunk))
    if failed:
        raise UserError(failure_message("questions were not answered", failed, len(tasks), store))
    wanted = {task.id for task in tasks}
    return {row.id: row for row in store.read(Answer) if row.id in wanted}


def _chunks(tasks: Sequence[Task], mode: Mode) -> Iterator[list[Task]]:
    """Tasks that can be asked in one call: letter questions by number of options, all others together."""
    groups: dict[int, list[Task]] = {}
    for task in tasks:
        groups.setdefault(len(task.sample.options) if mode == "choice" else 0, []).append(task)
    for _, group in sorted(groups.items()):
        for start in range(0, len(group), CHUNK_QUESTIONS):
            yield group[start : start + CHUNK_QUESTIONS]


def _ask(reader: Backend, mode: Mode, tasks: Sequence[Task], seed: int) -> Iterator[tuple[str, Answer | str]]:
    """Task id and answer, or the reason why there is none."""
    requests = [_request(task, prefilled=mode != "sampled") for task in tasks]
    letters = prompts.LETTERS[: len(tasks[0].sample.options)]
    if mode == "choice" and letters:
        rows = reader.choice_logprobs(requests, [f" {letter}" for letter in letters])
        for task, row in zip(tasks, rows, strict=True):
            yield task.id, _likeliest(task.id, row, letters) if row else "the reader gave no probabilities"
        return
    for c in reader.generate(requests, replace(AUTHORS if mode == "sampled" else GREEDY, seed=seed)):
        if c.text is None:
            yield c.id, c.error or "the reader gave no text"
        else:  # a reader without prefill may write the same words itself; they are no part of the answer
            text = c.text.strip().removeprefix(prompts.ANSWER_PREFILL).strip()
            yield c.id, Answer(id=c.id, text=text, finish_reason=c.finish_reason)


def _likeliest(task_id: str, logprobs: Sequence[float], letters: str) -> Answer:
    best, mass = max(logprobs), sum(map(math.exp, logprobs))
    ahead = "".join(letter for letter, value in zip(letters, logprobs, strict=True) if value == best)
    return Answer(id=task_id, text=ahead[0], letters=ahead, finish_reason="stop", letter_mass=mass)


def _request(task: Task, prefilled: bool) -> Request:
    sample, prefill = task.sample, prompts.ANSWER_PREFILL if prefilled else ""
    if task.caption is not None:
        prompt = prompts.read_question(task.caption, sample.question, sample.options)
        return Request(task.id, prompt, prefill=prefill)
    if len(sample.images) != 1:
        raise UserError(
            f"{sample.benchmark}, sample {sample.id}: {len(sample.images)} images; a model is asked "
            "about one at a time, so leave this sample out of a run that looks at the image"
        )
    prompt = prompts.look_question(sample.question, sample.options)
    return Request(task.id, prompt, sample.images[0](), prefill)
