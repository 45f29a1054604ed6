"""The stages of curation, each resumable by image id (paper, QA curation).

    job = open_job(profile, seed)
    check_images(job)
    write_questions(job)
    extract_questions(job)
    answer_questions(job)
    record = filter_questions(job)

Everything is streamed: one image and a few requests are in memory at a time, beside the ids. A request that
fails is listed in <stage>.failed.json and tried again when the stage runs again; the others are not held up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from caprl_utils import prompts
from caprl_utils.curation import answering
from caprl_utils.curation.checks import DuplicateFinder, Unwanted, check_image, finder_of
from caprl_utils.curation.clusters import semantic_duplicates
from caprl_utils.curation.export import write_tables
from caprl_utils.curation.extract import extract
from caprl_utils.curation.index import RowIndex
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.images import BadImage, ImageItem, fingerprint, open_images
from caprl_utils.models import Backend, Completion, Request, Sampling, open_backend
from caprl_utils.paths import shown
from caprl_utils.progress import Progress
from caprl_utils.records import Answered, CheckedImage, Extracted, Row, Written
from caprl_utils.runs import RowStore, Run
from caprl_utils.schema import Profile

STAGE = "curation"
CHECKED, SIMILAR, GENERATED, EXTRACTED, ANSWERED = "images", "similar", "generated", "extracted", "answered"
AnyRow = TypeVar("AnyRow", bound=Row)
_EMBEDDED_AT_ONCE = 64  # images


@dataclass
class Job:
    """One curation run: its settings, its models and its files."""

    profile: Profile
    seed: int
    split: str
    run: Run
    writer: Backend
    reader: Backend
    benchmarks: DuplicateFinder
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def images(self) -> Iterator[ImageItem]:
        """All images of the source, in its order."""
        return open_images(self.profile, self.split)

    def rows(self, stage: str) -> RowStore:
        """The rows of a stage so far."""
        return self.run.rows(stage)

    def read(self, stage: str, model: type[AnyRow]) -> Iterator[AnyRow]:
        """The rows of a stage as typed records."""
        return self.rows(stage).read(model)

    @cached_property
    def good_ids(self) -> set[str]:
        """Ids of the images that passed all checks."""
        passed = {row["id"] for row in self.rows(CHECKED).read() if row["reason"] is None}
        return passed - self.rows(SIMILAR).done_ids()


def open_job(
    profile: Profile,
    seed: int = 0,
    benchmark_hashes: Sequence[tuple[str, str]] = (),
    split: str = "rl",
    name: str = "main",
) -> Job:
    """Open or continue the run runs/<profile>/curation/<name>.

    benchmark_hashes: (name, `checks.perceptual_hash`) of evaluation images; training images close to them are
    set aside.
    """
    writer = open_backend(profile.models.question_writer, profile)
    reader = open_backend(profile.models.question_filter, profile)
    source = profile.images.source
    parts = {
        "curation": profile.curation,
        "images": profile.images,
        "source": fingerprint(source),
        "image_seed": profile.seed,
        "seed": seed,
        "split": split,
        "benchmarks": sorted(benchmark_hashes),
        "prompts": prompts.prompt_hash(),
        "writer": writer.model_hash,
        "reader": reader.model_hash,
    }
    run = Run.open(profile, STAGE, name, parts, recipe=[__name__])
    return Job(profile, seed, split, run, writer, reader, finder_of(benchmark_hashes))


def check_images(job: Job) -> None:
    """Set aside what cannot be used: undecodable, too small, too plain, near-duplicates, benchmark images."""
    if job.run.complete:
        return
    store, finder = job.rows(CHECKED), DuplicateFinder()
    for row in store.read(CheckedImage):
        if row.reason is None:
            finder.add(row.id, row.phash)
    with Progress("check images", job.profile.images.num_images) as bar:
        for item in job.images():
            if item.id not in store:
                row = check_image(item, finder, job.benchmarks)
                store.append(row)
            bar.update()
    if len(store) == 0:
        raise UserError(f"images.source {job.profile.images.source!r} holds no image")
    bad = {row.id: row.reason for row in store.read(CheckedImage) if row.reason in _BROKEN}
    _stop_if_too_many(job, CHECKED, bad, len(store), "images cannot be read")
    if job.profile.curation.near_duplicates == "embedding":
        _set_aside_similar(job)


def _set_aside_similar(job: Job) -> None:
    """Embed the good images with the filter model and set aside those that repeat an earlier one."""
    if not hasattr(job.reader, "image_features"):
        raise UserError(
            f"curation.near_duplicates 'embedding' needs the filter model {job.reader.name} in this process "
            "(models.question_filter.backend: local), or take 'hash'"
        )
    good = {row.id: row for row in job.read(CHECKED, CheckedImage) if row.reason is None}
    waiting = (item for item in job.images() if item.id in good)
    features = []
    with Progress("embed images", len(good)) as bar:
        while some := list(islice(waiting, _EMBEDDED_AT_ONCE)):
            features.append(job.reader.image_features([item.image for item in some]))
            bar.update(len(some))
    found = semantic_duplicates(
        list(good), np.concatenate(features), job.profile.curation.max_similarity, job.seed
    )
    store = job.rows(SIMILAR)
    for name, original in found.items():
        if name not in store:
            store.append(good[name].model_copy(update={"reason": Unwanted.SIMILAR, "detail": original}))
    vars(job).pop("good_ids", None)


def set_aside(job: Job) -> dict[str, int]:
    """Reason -> number of images that are not used."""
    rows = (row for stage in (CHECKED, SIMILAR) for row in job.rows(stage).read())
    return dict(Counter(row["reason"] for row in rows if row["reason"] is not None))


_BROKEN = frozenset(BadImage)


def write_questions(job: Job) -> None:
    """Have the writer write about every good image that it has not written about yet."""
    if job.run.complete:
        return
    settings, store = job.profile.curation, job.rows(GENERATED)
    sampling = Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        repetition_penalty=settings.repetition_penalty,
        seed=job.seed,
    )
    requests = (
        Request(item.id, prompts.WRITE_QUESTIONS, item.image)
        for item in job.images()
        if item.id in job.good_ids and item.id not in store
    )
    with Progress("write questions", len(job.good_ids)) as bar:
        bar.update(len(store))
        for completion in job.writer.stream(requests, sampling):
            if _usable(job, GENERATED, completion.id, completion):
                store.append(
                    Written(
                        id=completion.id,
                        text=completion.text,
                        num_tokens=completion.num_tokens,
                        finish_reason=completion.finish_reason,
                    )
                )
            bar.update()
    _end_of_stage(job, GENERATED, len(job.good_ids), "images got no questions")


def extract_questions(job: Job) -> None:
    """Find the questions in what was written, with a reason for every piece that is none."""
    if job.run.complete:
        return
    store, count = job.rows(EXTRACTED), job.profile.curation.questions_per_image
    with Progress("extract", len(job.rows(GENERATED))) as bar:
        for row in job.read(GENERATED, Written):
            if row.id not in store:
                found, rejected = extract(row.text, row.finish_reason, count)
                store.append(Extracted(id=row.id, questions=found, rejected=tuple(rejected)))
            bar.update()


def answer_questions(job: Job) -> None:
    """Have the filter model answer every question with and without its image."""
    if job.run.complete:
        return
    settings, store = job.profile.curation, job.rows(ANSWERED)
    sampling = Sampling(answering.MAX_TOKENS, temperature=settings.answer_temperature, seed=job.seed)
    extracted = RowIndex(job.rows(EXTRACTED).path, Extracted)
    waiting: dict[str, _Pending] = {}
    with Progress("answer", len(extracted)) as bar:
        bar.update(len(store))
        for completion in job.reader.stream(_probes(job, extracted, store, waiting), sampling):
            image_id = completion.id.rsplit("#", 1)[0]
            pending = waiting[image_id]
            pending.take(completion)
            if pending.left:
                continue
            del waiting[image_id]
            if pending.error is None:
                store.append(
                    answering.collect(image_id, pending.questions, pending.found, job.seed, settings.rounds)
                )
            else:
                job.failures.setdefault(ANSWERED, {})[image_id] = pending.error
            bar.update()
    _end_of_stage(job, ANSWERED, len(extracted), "images have unanswered questions")


@dataclass
class _Pending:
    """The answers about one image while they come in."""

    questions: dict[int, Any]
    probes: dict[str, answering.Probe]
    found: dict[answering.Probe, Completion] = field(default_factory=dict)
    error: str | None = None

    @property
    def left(self) -> int:
        return len(self.probes)

    def take(self, completion: Completion) -> None:
        self.found[self.probes.pop(completion.id)] = completion
        self.error = self.error or completion.error


def _probes(
    job: Job, extracted: RowIndex[Extracted], store: RowStore, waiting: dict[str, _Pending]
) -> Iterator[Request]:
    """Requests for all unanswered images; notes in `waiting` what each image still waits for."""
    other = None
    for item in job.images():
        if item.id not in job.good_ids:
            continue
        row = extracted.get(item.id) if item.id not in store else None
        if row is not None:
            pairs = list(
                answering.requests_for(
                    item.id, row.questions, item.image, other, job.profile.curation.rounds, job.seed
                )
            )
            if pairs:
                waiting[item.id] = _Pending(row.questions, {probe.id: probe for probe, _ in pairs})
                yield from (request for _, request in pairs)
            else:
                store.append(Answered(id=item.id, answers=()))
        other = item.image


def filter_questions(job: Job) -> dict[str, Any]:
    """Apply the limits, write qa.parquet and questions.parquet, and return the run's record."""
    if job.run.complete:
        return job.run.result
    extracted = RowIndex(job.rows(EXTRACTED).path, Extracted)
    answered = RowIndex(job.rows(ANSWERED).path, Answered)
    counts = write_tables(job.run.folder, job.images(), extracted, answered, job.profile.curation)
    values = _funnel(job) | counts
    if values["questions_kept"] == 0:
        raise UserError(
            f"the filter kept none of {values['questions_extracted']} questions ({values['verdicts']}). Look "
            "at the accuracies in questions.parquet; the limits are curation.min_visual_accuracy and "
            "curation.max_text_accuracy."
        )
    return job.run.finish(
        values, n=values["questions_extracted"], unit="question", unparsed=counts["unparsed_answers"],
        seeds=[job.seed],
    )  # fmt: skip


def _funnel(job: Job) -> dict[str, Any]:
    """Counts of the stages before the filter."""
    rejected: Counter[str] = Counter()
    num_extracted = 0
    for row in job.rows(EXTRACTED).read():
        num_extracted += len(row["questions"])
        rejected.update(piece["reason"] for piece in row["rejected"])
    asked = len(job.rows(EXTRACTED)) * job.profile.curation.questions_per_image
    return {
        "images_read": len(job.rows(CHECKED)),
        "images_set_aside": set_aside(job),
        "images_written_about": len(job.rows(GENERATED)),
        "questions_asked_for": asked,
        "questions_extracted": num_extracted,
        "rejected": dict(rejected),
        "failed": {stage: len(failed) for stage, failed in job.failures.items()},
    }


def _usable(job: Job, stage: str, row_id: str, completion: Completion) -> bool:
    if completion.error is not None:
        job.failures.setdefault(stage, {})[row_id] = completion.error
    return completion.error is None


def _end_of_stage(job: Job, stage: str, total: int, what: str) -> None:
    """List the failed rows for the user and stop when they are too many."""
    failed = job.failures.get(stage, {})
    write_json(job.run.folder / f"{stage}.failed.json", failed)
    _stop_if_too_many(job, stage, failed, total, what)


def _stop_if_too_many(job: Job, stage: str, bad: dict[str, Any], total: int, what: str) -> None:
    limit = job.profile.curation.max_bad_share
    if not bad or len(bad) <= limit * total:
        return
    row_id, reason = next(iter(bad.items()))
    raise UserError(
        f"{len(bad)} of {total} {what}, more than curation.max_bad_share = {limit}. The first is row "
        f"{row_id!r}: {reason} ({shown(job.rows(stage).path)}). Mend the cause and run again (only these "
        "rows are tried again), or raise the limit."
    )
