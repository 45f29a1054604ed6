"""Stage 2 of Prism: a reader answers every question from the caption alone.

`choice` takes of questions with options the likeliest letter after "The answer is" (one forward pass); others are read
as in `greedy`: temperature 0 after the same prefill, or without it where the answer needs room (`Ask.reply`). `sampled`
is the authors' setting. `words` shows no options and takes the one that a reader without letters means (`probes`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from caprl_utils import prompts
from caprl_utils.captions.caption import failure_message
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed
from caprl_utils.models.base import Backend, Request, Sampling
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.loading import OWN_PROMPT, too_many
from caprl_utils.prism.sources import ATTEMPTS
from caprl_utils.progress import Progress
from caprl_utils.records import Sample
from caprl_utils.runs import RowStore

Mode = Literal["choice", "greedy", "sampled", "words"]
Wording = Literal["short", "authors"]  # of prompts, see `Profile.prompts`
CHUNK_QUESTIONS = 256
MINI = Sampling(max_tokens=32)  # ours: the mini world's answers, which end by themselves
SHORT = Sampling(max_tokens=64)  # ours: a word, a number or a letter, and the end of its line
LONG = Sampling(max_tokens=1024)  # lmms-eval: free answers (MM-Vet) and mathematics
AUTHORS = Sampling(max_tokens=2048, temperature=1.0, top_p=1.0)  # author script, stage 2


@dataclass(frozen=True)
class Task:
    """One question about one caption; None: the reader sees the image instead. image_id: of the first image, the unit
    of the statistics. num_tokens, finish_reason: of the caption.
    """

    id: str
    sample: Sample
    caption_index: int
    caption: str | None
    image_id: str
    num_tokens: int | None
    finish_reason: str


class Answer(BaseModel):
    """What the reader said, a row of answers.jsonl. letters: the likeliest, or all exactly as likely."""

    model_config = ConfigDict(frozen=True)

    id: str
    text: str
    letters: str = ""
    finish_reason: str = "stop"
    letter_mass: float | None = None


@dataclass(frozen=True)
class Manner:
    """How a question is answered: by the probabilities of `letters`, or in words ("") of which one line may count."""

    letters: str
    sampling: Sampling = MINI
    prefill: str = prompts.ANSWER_PREFILL
    one_line: bool = False
    by_words: bool = False  # letters stand for options that the reader is not shown


def manner(sample: Sample, mode: Mode, wording: Wording) -> Manner:
    if mode == "sampled":
        return Manner("", AUTHORS, "")
    if mode == "words":
        return Manner(prompts.LETTERS[: len(sample.options)], prefill=prompts.WORDS_PREFILL, by_words=True)
    if mode == "choice" and sample.options:
        return Manner(prompts.LETTERS[: len(sample.options)])
    if wording == "short":
        return Manner("")
    room = not sample.options and get_benchmark(sample.benchmark).ask.reply == "long"
    if room or OWN_PROMPT in sample.meta:
        return Manner("", LONG, "")
    return Manner("", SHORT, one_line=True)


def prompt_of(sample: Sample, caption: str | None, mode: Mode, wording: Wording) -> str:
    """The question as it is put; with the authors' scorer a reader is asked for the layout that the scorer reads."""
    if mode == "words":
        return prompts.read_question(caption, sample.question)
    if wording == "short":
        if caption is None:
            return prompts.look_question(sample.question, sample.options)
        return prompts.read_question(caption, sample.question, sample.options)
    if OWN_PROMPT in sample.meta:
        return prompts.ask(sample.question, (), "", caption)
    form = prompts.LETTER_ONLY if sample.options else get_benchmark(sample.benchmark).ask.text(sample.meta)
    if mode == "sampled":
        form = f"{form}\n{prompts.THINK}".strip()
    return prompts.ask(sample.question, sample.options, form, caption)


def answer_all(
    tasks: Sequence[Task], reader: Backend, mode: Mode, wording: Wording, store: RowStore, seed: int
) -> tuple[list[Task], dict[str, Answer], dict[str, str]]:
    """Answer every task that `store` does not hold yet, all benchmarks together. Returns the tasks with an answer (a
    question with rotations goes whole where one of them has none), all answers by id, and why others have none. Raises
    UserError when the reader failed on too many: the finished rows stay and the next call makes the rest.
    """
    groups: dict[Manner, list[Task]] = {}  # of what can be asked in one call
    for task in tasks:
        groups.setdefault(manner(task.sample, mode, wording), []).append(task)
    chunks = [
        (how, groups[how][start : start + CHUNK_QUESTIONS])
        for how in sorted(groups, key=lambda how: (len(how.letters), how.sampling.max_tokens))
        for start in range(0, len(groups[how]), CHUNK_QUESTIONS)
    ]
    told = "questions were not answered"
    with Progress("answers", len(tasks)) as progress:
        for attempt in range(ATTEMPTS):
            failed: dict[str, str] = {}
            for number, (how, chunk) in enumerate(chunks):
                if any(task.id not in store for task in chunk):  # whole chunks, so that a restart draws the same
                    texts = [prompt_of(task.sample, task.caption, mode, wording) for task in chunk]
                    answered = _ask(reader, how, chunk, texts, derive_seed(seed, "answers", number, bits=31))
                    for task, found in zip(chunk, answered, strict=True):
                        if task.id not in store and isinstance(found, Answer):
                            store.append(found)
                        elif task.id not in store:
                            failed[task.id] = found
                progress.update(0 if attempt else len(chunk))
                if len(chunk) > 1 and all(task.id in failed for task in chunk):  # nothing works any more
                    raise UserError(failure_message(told, failed, len(tasks), store))
            if not failed:
                break
    if too_many(len(failed), len(tasks)):
        raise UserError(failure_message(told, failed, len(tasks), store))
    units = [(t.image_id, t.caption_index) if "rotation" in t.sample.meta else t.id for t in tasks]
    gone = {unit for unit, task in zip(units, tasks, strict=True) if task.id in failed}
    wanted = {task.id for task in tasks}
    answers = {row.id: row for row in store.read(Answer) if row.id in wanted}
    return [task for unit, task in zip(units, tasks, strict=True) if unit not in gone], answers, failed


def _ask(reader: Backend, how: Manner, tasks: Sequence[Task], texts: Sequence[str], seed: int) -> list[Answer | str]:
    """Of each task the answer, or the reason why there is none."""
    images = [task.sample.images[0]() if task.caption is None else None for task in tasks]
    requests = [Request(t.id, text, i, how.prefill) for t, text, i in zip(tasks, texts, images, strict=True)]
    found: list[Answer | str] = []
    if how.by_words:
        places = reader.choose(requests, [task.sample.options for task in tasks])
        chosen = zip(requests, (how.letters[place] for place in places), strict=True)
        return [Answer(id=request.id, text=letter, letters=letter) for request, letter in chosen]
    if how.letters:
        rows = reader.choice_logprobs(requests, [f" {letter}" for letter in how.letters])
        for request, row in zip(requests, rows, strict=True):
            if not row:
                found.append("the reader gave no letters")
                continue
            best = "".join(letter for letter, value in zip(how.letters, row, strict=True) if value == max(row))
            found.append(Answer(id=request.id, text=best[0], letters=best, letter_mass=sum(map(math.exp, row))))
        return found
    for said in reader.generate(requests, replace(how.sampling, seed=seed)):
        if said.text is None:
            found.append(said.error or "the reader gave no text")
            continue
        text = said.text.strip().removeprefix(prompts.ANSWER_PREFILL).strip()  # some write the prefill themselves
        text = text.split("\n")[0].strip() if how.one_line else text
        found.append(Answer(id=said.id, text=text, finish_reason=said.finish_reason))
    return found
