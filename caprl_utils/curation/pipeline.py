"""The stages of curation, each resumable by image id (paper, QA curation); `curate` runs all on a job of `open_job`.

Everything is streamed: one image and a few requests are in memory at a time, beside the ids. A request that
fails is listed in <stage>.failed.json and tried again when the stage runs again; the others are not held up.

The filter model answers each question several times, options shuffled, with the image and without it; an answer that
states neither letter nor option counts as wrong. As released (`prompts: authors`) it is asked for the letter alone and
may say with the image that no option is right. Ours: the question with another image, and without its options.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL.Image import Image

from caprl_utils import prompts
from caprl_utils.answers import read_letter
from caprl_utils.curation.checks import DuplicateFinder, check_image, perceptual_hash
from caprl_utils.curation.extract import NUM_QUESTIONS, QuestionSet, extract
from caprl_utils.curation.keep import QA_FILE, write_tables
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.hashing import derive_seed
from caprl_utils.image_sources import fingerprint, open_images
from caprl_utils.images import BadImage, ImageItem
from caprl_utils.models.base import Backend, Completion, Request, Sampling, open_backend
from caprl_utils.paths import shown
from caprl_utils.progress import Progress
from caprl_utils.records import Question
from caprl_utils.registry import drawn_source
from caprl_utils.runs import RowStore, Run
from caprl_utils.schema import Profile

STAGE = "curation"
CHECKED, WRITTEN, EXTRACTED, ANSWERED = "images", "generated", "extracted", "answered"
RECIPE = [
    *(f"caprl_utils.curation.{name}" for name in ("pipeline", "checks", "extract", "keep")),
    *(f"caprl_utils.{name}" for name in ("image_sources", "images", "answers", "prompts", "records")),
    "caprl_utils.models.local",
]  # fmt: skip
WRITER_TEMPERATURE, REPETITION_PENALTY = 0.1, 1.05  # paper
ANSWER_TOKENS = 10  # author script: the reward LLM's; their filter's 4 are too few for an answer in words (ours)
NONE = "None of the above"  # author script: a fifth option where the image is shown
ASK_LETTER = "{question}{options}. Answer the question with only the correct letter"  # author script
VISUAL, TEXT, OTHER, OPEN = "visual", "text", "other", "open"  # what a request shows: the fields of `Question`
Made = tuple[str, dict[str, Any] | QuestionSet | str]  # of a stage: id of an image, and its row or why it has none


@dataclass
class Job:
    """One curation run: its settings, its models and its files."""

    profile: Profile
    seed: int
    run: Run
    writer: Backend
    reader: Backend
    benchmarks: DuplicateFinder
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)  # what else lies in the source

    @property
    def as_authors(self) -> bool:
        """Whether the filter model is asked as released."""
        return self.profile.prompts == "authors"

    def rows(self, stage: str) -> RowStore:
        """The rows of a stage so far."""
        return self.run.rows(stage)

    @cached_property
    def good_ids(self) -> set[str]:
        """Ids of the images that passed all checks."""
        return {row["id"] for row in self.rows(CHECKED).read() if row["reason"] is None}

    def good_images(self) -> Iterator[ImageItem]:
        """The images that passed all checks."""
        return (item for item in open_images(self.profile) if item.id in self.good_ids)


def open_job(profile: Profile, seed: int = 0, held_out: Iterable[ImageItem] = (), name: str = "main") -> Job:
    """Open or continue the run runs/<profile>/curation/<name>. held_out: images of the evaluation; training images
    close to them are set aside.
    """
    writer = open_backend(profile.models.question_writer, profile)
    reader = open_backend(profile.models.question_filter, profile)
    drawn = drawn_source(profile.images.source)
    hashes = [(image.id, perceptual_hash(image.open())) for image in held_out]
    parts = {
        "curation": profile.curation, "images": profile.images, "source": fingerprint(profile.images.source),
        "image_seed": profile.seed, "seed": seed, "benchmarks": sorted(hashes), "prompts": profile.prompts,
        "writer": writer.model_hash, "reader": reader.model_hash,
    }  # fmt: skip
    run = Run.open(profile, STAGE, name, parts, recipe=[*RECIPE, *(drawn.recipe if drawn else ())])
    return Job(profile, seed, run, writer, reader, DuplicateFinder(hashes))


def curate(job: Job) -> dict[str, Any]:
    """All stages in order; stopped, they go on where they were. Returns the run's record."""
    for stage in (check_images, write_questions, extract_questions, answer_questions):
        stage(job)
    return filter_questions(job)


def check_images(job: Job) -> None:
    """Set aside what cannot be used: undecodable, too small, too plain, near-duplicates, benchmark images."""

    def rows(store: RowStore) -> Iterator[Made]:
        finder = DuplicateFinder((row["id"], row["phash"]) for row in store.read() if row["reason"] is None)
        for item in open_images(job.profile, passed=job.passed):
            if item.id not in store:
                row = check_image(item, finder, job.benchmarks)  # what is unreadable is perhaps not next time
                yield item.id, str(item.problem) if row["reason"] == BadImage.UNREADABLE else row

    _make(job, CHECKED, rows, "check images", job.profile.images.num_images, "images cannot be read")
    if not (len(job.rows(CHECKED)) or job.failures.get(CHECKED)):
        raise UserError(f"images.source {job.profile.images.source!r} holds no image")


def write_questions(job: Job) -> None:
    """Have the writer write about every good image that it has not written about yet."""
    limit = job.profile.curation.max_tokens
    sampling = Sampling(limit, WRITER_TEMPERATURE, repetition_penalty=REPETITION_PENALTY, seed=job.seed)

    def rows(store: RowStore) -> Iterator[Made]:
        todo = (item for item in job.good_images() if item.id not in store)
        requests = (Request(item.id, prompts.WRITE_QUESTIONS, item.image) for item in todo)
        for done in job.writer.stream(requests, sampling):
            told = {"text": done.text, "num_tokens": done.num_tokens, "finish_reason": done.finish_reason}
            yield done.id, {"id": done.id, **told} if done.error is None else done.error

    _make(job, WRITTEN, rows, "write questions", len(job.good_ids), "images got no questions")


def extract_questions(job: Job) -> None:
    """Find the questions in what was written, with a reason for every piece that is none."""
    if job.run.complete:
        return
    store = job.rows(EXTRACTED)
    with Progress("extract", len(job.rows(WRITTEN))) as bar:
        for row in job.rows(WRITTEN).read():
            if row["id"] not in store:
                questions, rejected = extract(row["text"], row["finish_reason"])
                store.append(QuestionSet(id=row["id"], questions=questions, rejected=rejected))
            bar.update()


def answer_questions(job: Job) -> None:
    """Have the filter model answer every question with and without its image."""
    extracted = job.rows(EXTRACTED)
    # at 0.1, penalty 1.05 (author script), or 0.6 (ours: as their reward reader)
    temperature, penalty = (0.1, REPETITION_PENALTY) if job.as_authors else (0.6, 1.0)
    sampling = Sampling(ANSWER_TOKENS, temperature, repetition_penalty=penalty, seed=job.seed)
    waiting: dict[str, dict[str, Completion | None]] = {}  # image -> its requests, None while one is out

    def requests(store: RowStore) -> Iterator[Request]:
        other = None
        for item in job.good_images():
            if item.id in extracted and item.id not in store:
                questions = extracted.get(item.id, QuestionSet).questions
                if asked := list(requests_about(job, item.id, questions, item.image, other and other.image)):
                    waiting[item.id] = {request.id: None for request in asked}
                    yield from asked
                else:
                    store.append(QuestionSet(id=item.id, questions=()))
            other = item

    def rows(store: RowStore) -> Iterator[Made]:
        for completion in job.reader.stream(requests(store), sampling):
            image_id = completion.id.rpartition("#")[0]
            found = waiting[image_id]
            found[completion.id] = completion
            if None not in found.values():
                del waiting[image_id]
                error = next((one.error for one in found.values() if one.error), None)
                questions = () if error else extracted.get(image_id, QuestionSet).questions
                answered = tuple(with_answers(job, image_id, question, found) for question in questions)
                yield image_id, error or QuestionSet(id=image_id, questions=answered)

    _make(job, ANSWERED, rows, "answer", len(extracted), "images have unanswered questions")


def _make(
    job: Job, stage: str, rows: Callable[[RowStore], Iterator[Made]], label: str, total: int, what: str
) -> None:  # fmt: skip
    """Make the rows of a stage that are not there yet. Those that failed are listed for the user. Raises UserError when
    they are too many, with the images that can never be read. total: rows to expect. what: the trouble in words.
    """
    if job.run.complete:
        return
    store, failed = job.rows(stage), {}
    with Progress(label, total) as bar:
        bar.update(len(store))
        for row_id, made in rows(store):
            if isinstance(made, str):
                failed[row_id] = made
            else:
                store.append(made)
            bar.update()
    write_json(job.run.folder / f"{stage}.failed.json", failed)
    job.failures[stage] = failed
    checked = store.read() if stage == CHECKED else ()
    bad = {row["id"]: row["reason"] for row in checked if row["reason"] in set(BadImage)} | failed
    count, limit = len(store) + len(failed), job.profile.curation.max_bad_share
    if len(bad) > limit * count:
        row_id, reason = next(iter(bad.items()))
        raise UserError(
            f"{len(bad)} of {count} {what}, more than curation.max_bad_share = {limit}. The first is row "
            f"{row_id!r}: {reason} ({shown(store.path)}). Mend the cause and run again (only these rows are tried "
            "again), or raise the limit."
        )


def orders(job: Job, image_id: str, question: Question) -> Iterator[list[int]]:
    """Order of the options in each round: place -> index of the option as written. Stable over machines."""
    for round_ in range(job.profile.curation.rounds):
        order = list(range(len(question.options)))
        random.Random(derive_seed(job.seed, f"{image_id}#{question.number}", round_, bits=64)).shuffle(order)
        yield order


def requests_about(
    job: Job, image_id: str, questions: Sequence[Question], image: Image, other: Image | None
) -> Iterator[Request]:  # fmt: skip
    """All requests about one image; `other` is another image, or None to leave that one out. The sampling of an answer
    is seeded by the request's id, IMAGE#NUMBER/VIEW/ROUND.
    """
    views = {VISUAL: image, TEXT: None} | ({OTHER: other} if other is not None else {})
    for question in questions:
        name = f"{image_id}#{question.number}"
        for round_, order in enumerate(orders(job, image_id, question)):
            options = [question.options[index] for index in order]
            for view, picture in views.items():
                if job.as_authors:
                    told = prompts.format_options([*options, NONE] if view == VISUAL else options)
                    asked, prefill = ASK_LETTER.format(question=question.question, options=told), ""
                else:
                    asked, prefill = prompts.look_question(question.question, options), prompts.ANSWER_PREFILL
                yield Request(f"{name}/{view}/{round_}", asked, picture, prefill)
        yield Request(f"{name}/{OPEN}/0", prompts.look_question(question.question), image, prompts.ANSWER_PREFILL)


def with_answers(job: Job, image_id: str, question: Question, found: Mapping[str, Completion]) -> Question:
    """A question with the letters of its options that the completions to its requests state, None where nothing is
    clear; one that is exactly an option's text states its letter. found: by id, all that were sent.
    """
    name, options = f"{image_id}#{question.number}", [*question.options, NONE]
    letters: dict[str, list[str | None]] = {VISUAL: [], TEXT: [], OTHER: []}
    for round_, order in enumerate(orders(job, image_id, question)):
        for view, given in letters.items():
            if completion := found.get(f"{name}/{view}/{round_}"):
                asked = [*order, len(order)] if job.as_authors and view == VISUAL else order
                stated = read_letter(completion.text, prompts.LETTERS[: len(asked)], [options[i] for i in asked]).letter
                given.append(stated and prompts.LETTERS[asked[prompts.LETTERS.index(stated)]])
    answers = {view: tuple(given) for view, given in letters.items()}
    return question.model_copy(update=answers | {"open_answer": found[f"{name}/{OPEN}/0"].text.strip()})


def filter_questions(job: Job) -> dict[str, Any]:
    """Apply the limits, write qa.parquet and questions.parquet, and return the run's record."""
    if job.run.complete:
        return job.run.result
    rejected, extracted = Counter[str](), 0
    for row in job.rows(EXTRACTED).read():
        extracted += len(row["questions"])
        rejected.update(piece["reason"] for piece in row["rejected"])
    set_aside = Counter(row["reason"] for row in job.rows(CHECKED).read() if row["reason"] is not None)
    values = {
        "images_read": len(job.rows(CHECKED)), "images_set_aside": dict(set_aside),
        "images_passed_over": dict(job.passed), "images_written_about": len(job.rows(WRITTEN)),
        "questions_asked_for": len(job.rows(EXTRACTED)) * NUM_QUESTIONS, "questions_extracted": extracted,
        "rejected": dict(rejected), "failed": {stage: len(bad) for stage, bad in job.failures.items() if bad},
        **write_tables(job.run.folder, open_images(job.profile), job.rows(ANSWERED), job.profile.curation),
    }  # fmt: skip
    if values["questions_kept"] == 0:
        (job.run.folder / QA_FILE).unlink()  # nothing to train on
        why = "Look at the accuracies in questions.parquet; the limits are curation.min_visual_accuracy and "
        why += "curation.max_text_accuracy."
        if not extracted:
            why = f"No question could be read from what the writer wrote: {dict(rejected) or 'nothing'}."
        raise UserError(f"the filter kept none of {extracted} questions ({values['verdicts']}). {why}")
    return job.run.finish(values, extracted, "question", values["unparsed_answers"], seeds=[job.seed])


def funnel(values: dict[str, Any]) -> list[tuple[str, int]]:
    """Steps from what was asked for to what is kept, with their counts, from a run's record."""
    leaking = sum(count for name, count in values["verdicts"].items() if name.startswith("answered without"))
    answered, kept = values["questions_extracted"], values["questions_kept"]
    return [
        ("asked for", values["questions_asked_for"]), ("well formed", answered),
        ("not answered without the image", answered - leaking), ("and answered with it: kept", kept),
    ]  # fmt: skip
