"""Prism: how much of an image is in its caption, measured by a text-only reader (paper, Table 3); and direct VQA.

Stage 1, a captioner describes every image (`sources`); stage 2, a reader answers the benchmarks' questions from the
caption alone (`answer_all`); stage 3, each benchmark's metric scores the answers (`scores`), a sample by the mean over
its captions. In direct VQA (paper, Tables 1 and 2) a model answers from the image itself. Every row is kept, so a
stopped evaluation goes on. What cannot be had after three tries is left out, counted and listed; too much of it stops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from caprl_utils import paths, prompts
from caprl_utils.captions.caption import failure_message
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed, value_hash
from caprl_utils.models.base import Backend, Request, Sampling, open_backend
from caprl_utils.prism import scores, sources
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.loading import OWN_PROMPT, too_many
from caprl_utils.prism.scores import Answer, Task
from caprl_utils.prism.sources import Captions, Source, image_ids, images_of
from caprl_utils.progress import Progress
from caprl_utils.records import Sample
from caprl_utils.registry import world_of
from caprl_utils.runs import RowStore, Run
from caprl_utils.schema import ModelConfig, Profile

STAGE, VQA_STAGE = "prism", "vqa"
RECIPE = [
    *(f"caprl_utils.prism.{name}" for name in ("evaluate", "metrics", "scores", "sources", "statistics", "told")),
    "caprl_utils.answers", "caprl_utils.captions.caption", "caprl_utils.models.local", "caprl_utils.prompts",
]  # fmt: skip
Mode = Literal["choice", "greedy", "sampled", "words"]  # of reading, see `Manner`
Wording = Literal["short", "authors"]  # of prompts, see `Profile.prompts`


def evaluate(
    profile: Profile, name: str, captioner: Backend | Source, reader: Backend, samples: Sequence[Sample],
    captions_run: str | None = None, stage: str = STAGE, mode: Mode | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the three stages, or what is left of them, as runs/<profile>/<stage>/<name> (answers.jsonl, samples.parquet
    with `scores.COLUMNS`, result.json); returns its record. reader: a text-only model; for `image_itself` a VLM.
    captions_run: name of the captions' run, which several readers can share. mode: of reading, by default the
    profile's. Raises UserError when too many captions or answers could not be had; finished rows stay on disk.
    """
    made = isinstance(captioner, Source)
    source = captioner if made else sources.model_captions(profile, captioner, captions_run or name)
    settings, mode = profile.prism, mode or reading(profile, source.looks)
    judge = open_backend(settings.judge_model, profile) if settings.judge_model else None
    asks = {s.benchmark: get_benchmark(s.benchmark).ask.model_dump(mode="json") for s in samples}
    parts = {
        "prism": {"reader": mode, "bootstrap_draws": settings.bootstrap_draws, "scoring": settings.scoring},
        "captioner": source.fingerprint, "reader": reader.model_hash,
        "asked": [profile.prompts, asks], "samples": samples_hash(samples), "seed": profile.seed,
        "judge": judge.model_hash if judge else None,
    }  # fmt: skip
    worlds = {module for sample in samples if (world := world_of(sample.meta)) for module in world.recipe}
    with Run.open(profile, stage, name, parts, [*RECIPE, *sorted(worlds)]) as run:
        if run.complete:
            return run.result
        asked = [sample for sample in samples if not source.looks or len(sample.images) == 1]
        captions = source.captions(images_of(asked))
        tasks = make_tasks(asked, captions, source.looks)
        store = run.rows("answers")
        tasks, answers, failed = answer_all(tasks, reader, mode, profile.prompts, store, profile.seed)
        left_out = _left_out(samples, tasks, failed, source.looks)
        verdicts = scores.Judge(judge, run.rows("verdicts")) if judge else None
        rows = scores.score_rows(tasks, answers, settings.scoring, verdicts)
        scores.write_samples(run.folder / "samples.parquet", rows, name)
        return run.finish(
            **scores.summarise(rows, settings.bootstrap_draws, profile.seed), unit="sample", captioner=source.name,
            reader={"name": reader.name, "mode": mode}, scoring=settings.scoring,
            judge=judge.name if judge else None, captions_per_image=max(map(len, captions.values())),
            left_out=left_out, unanswered=failed,
            set_aside=getattr(samples, "set_aside", {}), data=getattr(samples, "origins", {}),
        )  # fmt: skip


def evaluate_vqa(profile: Profile, name: str, model: Backend, samples: Sequence[Sample]) -> dict[str, Any]:
    """`evaluate` without captions: `model` is asked every question about its image; in runs/<profile>/vqa/<name>."""
    return evaluate(profile, name, sources.image_itself(), model, samples, stage=VQA_STAGE)


def _left_out(
    samples: Sequence[Sample], tasks: Sequence[Task], failed: Mapping[str, str], looks: bool
) -> dict[str, dict[str, str]]:
    """Benchmark -> samples without a task, with the reason. Raises UserError where a benchmark has no other."""
    there = {(task.sample.benchmark, task.sample.id) for task in tasks}
    found: dict[str, dict[str, str]] = {}
    for sample in samples:
        if (sample.benchmark, sample.id) not in there:
            several = looks and len(sample.images) != 1
            reason = f"{len(sample.images)} images" if several else "no caption of its image"
            reason = failed.get(f"{sample.benchmark}/{sample.id}#0", reason)
            found.setdefault(sample.benchmark, {})[sample.id] = reason
    if gone := found.keys() - {benchmark for benchmark, _ in there}:
        reasons = "; ".join(f"{name}: {next(iter(found[name].values()))}" for name in sorted(gone))
        raise UserError(f"no question of {', '.join(sorted(gone))} could be asked ({reasons})")
    return found


def reading(profile: Profile, looks: bool = False) -> Mode:
    """How answers are read; the authors' scorer reads <answer> tags, which only their sampled setting writes."""
    if profile.prism.scoring == "caprl":
        return "sampled"
    return "greedy" if looks else "choice"


def preview(profile: Profile, samples: Sequence[Sample], captions: Captions, reader: Backend) -> list[dict[str, Any]]:
    """Stages 2 and 3 for a few samples and captions of their images, kept nowhere: rows of `scores.COLUMNS`."""
    tasks = make_tasks(samples, captions, looks=False)
    with TemporaryDirectory() as folder, RowStore(Path(folder) / "answers.jsonl") as store:
        tasks, answers, _ = answer_all(tasks, reader, reading(profile), profile.prompts, store, seed=0)
    return scores.score_rows(tasks, answers, profile.prism.scoring)


def trained_captioners(profile: Profile, experiments: Sequence[str]) -> dict[str, ModelConfig]:
    """Run name -> captioner of every finished training of the named experiments, seeds in order."""
    runs, found = paths.RUNS / profile.name / "rl", []
    for name in experiments:
        names = (file.parent.name for file in runs.glob(f"{name}-seed*/result.json"))
        found += sorted(names, key=lambda name: (len(name), name))
    return {name: trained_captioner(profile, name) for name in found}


def trained_captioner(profile: Profile, run_name: str) -> ModelConfig:
    """The captioner that the training runs/<profile>/rl/<run_name> ends with."""
    path = str(paths.RUNS / profile.name / "rl" / run_name / "final")
    return profile.models.policy.model_copy(update={"path": path, "revision": None, "backend": "local"})


def make_tasks(samples: Sequence[Sample], captions: Captions, looks: bool) -> list[Task]:
    """One task per sample and caption; captions of several images are joined, numbered as in the question."""
    tasks = []
    for sample in samples:
        ids = image_ids(sample)
        numbers = sample.meta.get("image_numbers") or [*range(1, len(ids) + 1)]
        for index, used in enumerate(zip(*(captions.get(image_id, ()) for image_id in ids), strict=False)):
            texts, tokens = [c.caption for c in used], [c.num_tokens for c in used]
            if numbers != [1]:
                texts = [f"Image {number}: {text}" for number, text in zip(numbers, texts, strict=True)]
            tasks.append(Task(
                f"{sample.benchmark}/{sample.id}#{index}", sample, index, None if looks else "\n".join(texts), ids[0],
                None if None in tokens else sum(tokens),
                "length" if any(c.finish_reason == "length" for c in used) else "stop",
            ))  # fmt: skip
    return tasks


def samples_hash(samples: Sequence[Sample]) -> str:
    """Hash of everything of the samples that can change a score: texts, golds and images."""
    images = {image.id: sources.image_hash(image.load) for image in images_of(samples)}
    rows = [[s.benchmark, s.id, s.question, [*s.options], s.gold, {**s.meta}, image_ids(s)] for s in samples]
    return value_hash({"rows": rows, "images": images})


# Stage 2. `choice` takes of questions with options the likeliest letter after "The answer is" (one forward pass);
# others are read as in `greedy`: temperature 0 after the same prefill, or without it where the answer needs room
# (`Ask.reply`). `sampled` is the authors' setting. `words` shows no options and takes the one that is meant (`probes`).

CHUNK_QUESTIONS = 256
MINI = Sampling(max_tokens=32)  # ours: the mini world's answers, which end by themselves
SHORT = Sampling(max_tokens=64)  # ours: a word, a number or a letter, and the end of its line
LONG = Sampling(max_tokens=1024)  # lmms-eval: free answers (MM-Vet) and mathematics
AUTHORS = Sampling(max_tokens=2048, temperature=1.0, top_p=1.0)  # author script, stage 2


@dataclass(frozen=True)
class Manner:
    """How a question is answered: by the probabilities of `letters`, or in words ("") of which one line may count."""

    letters: str
    sampling: Sampling = MINI
    prefill: str = prompts.ANSWER_PREFILL
    one_line: bool = False
    by_words: bool = False  # letters stand for options that the reader is not shown


def how_to_ask(sample: Sample, caption: str | None, mode: Mode, wording: Wording) -> tuple[Manner, str]:
    """A question as it is put, and how it is answered; with the authors' scorer a reader is asked for the layout that
    the scorer reads.
    """
    letters = prompts.LETTERS[: len(sample.options)]
    if mode == "words":
        how = Manner(letters, prefill=prompts.WORDS_PREFILL, by_words=True)
        return how, prompts.read_question(caption, sample.question)
    in_words = Manner("")
    if wording == "short" and caption is None:
        prompt = prompts.look_question(sample.question, sample.options)
    elif wording == "short":
        prompt = prompts.read_question(caption, sample.question, sample.options)
    elif OWN_PROMPT in sample.meta:
        prompt, in_words = prompts.ask(sample.question, (), "", caption), Manner("", LONG, "")
    else:
        ask = get_benchmark(sample.benchmark).ask
        long, form = not letters and ask.reply == "long", prompts.LETTER_ONLY if letters else ask.text(sample.meta)
        form = f"{form}\n{prompts.THINK}".strip() if mode == "sampled" else form
        prompt = prompts.ask(sample.question, sample.options, form, caption)
        in_words = Manner("", LONG, "") if long else Manner("", SHORT, one_line=True)
    if mode == "sampled":
        return Manner("", AUTHORS, ""), prompt
    return Manner(letters) if mode == "choice" and letters else in_words, prompt


def answer_all(
    tasks: Sequence[Task], reader: Backend, mode: Mode, wording: Wording, store: RowStore, seed: int
) -> tuple[list[Task], dict[str, Answer], dict[str, str]]:
    """Answer every task that `store` does not hold yet, all benchmarks together. Returns the tasks with an answer (a
    question with rotations goes whole where one of them has none), all answers by id, and why others have none. Raises
    UserError when the reader failed on too many: the finished rows stay and the next call makes the rest.
    """
    groups: dict[Manner, list[tuple[Task, str]]] = {}  # of what can be asked in one call
    for task in tasks:
        how, text = how_to_ask(task.sample, task.caption, mode, wording)
        groups.setdefault(how, []).append((task, text))
    chunks = [
        (how, groups[how][start : start + CHUNK_QUESTIONS])
        for how in sorted(groups, key=lambda how: (len(how.letters), how.sampling.max_tokens))
        for start in range(0, len(groups[how]), CHUNK_QUESTIONS)
    ]
    told = "questions were not answered"
    with Progress("answers", len(tasks)) as progress:
        for attempt in range(sources.ATTEMPTS):
            failed: dict[str, str] = {}
            for number, (how, chunk) in enumerate(chunks):
                ids = [task.id for task, _ in chunk]
                if any(one not in store for one in ids):  # whole chunks, so that a restart draws the same
                    answered = _ask(reader, how, chunk, derive_seed(seed, "answers", number, bits=31))
                    for one, found in zip(ids, answered, strict=True):
                        if one not in store and isinstance(found, Answer):
                            store.append(found)
                        elif one not in store:
                            failed[one] = found
                progress.update(0 if attempt else len(chunk))
                if len(chunk) > 1 and failed.keys() >= {*ids}:  # nothing works any more
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


def _ask(reader: Backend, how: Manner, chunk: Sequence[tuple[Task, str]], seed: int) -> list[Answer | str]:
    """Of each task the answer, or the reason why there is none."""
    requests = [
        Request(task.id, text, task.sample.images[0]() if task.caption is None else None, how.prefill)
        for task, text in chunk
    ]
    found: list[Answer | str] = []
    if how.by_words:
        places = reader.choose(requests, [task.sample.options for task, _ in chunk])
        chosen = {request.id: how.letters[place] for request, place in zip(requests, places, strict=True)}
        return [Answer(id=name, text=letter, letters=letter) for name, letter in chosen.items()]
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
        found.append(Answer(id=said.id, text=text))
    return found
