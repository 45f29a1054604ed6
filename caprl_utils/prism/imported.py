"""Another toolkit's answers to our questions, scored and recorded as a run of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caprl_utils.answers import unwrap_commands
from caprl_utils.errors import UserError
from caprl_utils.hashing import value_hash
from caprl_utils.prism import judging, prism_scores
from caprl_utils.prism.prism import image_ids, samples_hash
from caprl_utils.prism.prism_answers import Answer, Task, answer_id
from caprl_utils.prism.scoring import Judge
from caprl_utils.prism.scoring.text import literal_list
from caprl_utils.runs import Run
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    from caprl_utils.prism.loaders import Sample

STAGE = "vqa"


@dataclass(frozen=True)
class Foreign:
    """What a file of another toolkit says of one question.

    answers: one or several texts. place: position among the benchmark's questions. sample_id, question, gold:
    what else may tell which question it is; each may be missing. row: where it stands, for messages.
    """

    answers: tuple[str, ...]
    place: int | None = None
    sample_id: str | None = None
    question: str | None = None
    gold: Any = None
    row: str = ""


def evaluate_answers(
    profile: Profile,
    name: str,
    answers: Sequence[Foreign],
    samples: Sequence[Sample],
    *,
    source: str,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Score the answers in mode "standard"; the run is runs/<profile>/vqa/<name>, as direct VQA writes it.

    source: what the record says of where they came from. Raises UserError when an answer fits no sample, a
    sample has none, or a gold is not ours.
    """
    judge = judge or judging.judge_of(profile)
    matched = match(answers, samples)
    texts = {key: list(found.answers) for key, found in matched.items()}
    parts = {
        "answers": value_hash([[*key, found] for key, found in texts.items()]),
        "samples": samples_hash(samples),
        "statistics": {"bootstrap_draws": profile.prism.bootstrap_draws, "seed": profile.seed},
        "judge": judging.fingerprint(judge),
    }
    with Run.open(profile, STAGE, name, parts, [__name__]) as run:
        if run.complete:
            return run.result
        tasks, found = [], {}
        for sample in samples:
            for index, text in enumerate(texts[sample.benchmark, sample.id]):
                tasks.append(task := Task(answer_id(sample, index), sample, index, None))
                found[task.id] = Answer(id=task.id, text=text, finish_reason="stop")
        facts = {
            task.id: {
                "image_id": image_ids(task.sample)[0], "caption": None, "num_tokens": None, "finish_reason": None,
            }
            for task in tasks
        }  # fmt: skip
        rows = prism_scores.score_rows(tasks, found, facts, "standard", judging.stored(judge, run))
        prism_scores.write_samples(run.folder / "samples.parquet", rows, name)
        summary = prism_scores.summarise(rows, profile.prism.bootstrap_draws, profile.seed)
        return run.finish(
            **summary, unit="sample", label=name, scoring="standard", imported_from=source,
            judge=judge.name if judge else None,
        )  # fmt: skip


def match(answers: Sequence[Foreign], samples: Sequence[Sample]) -> Mapping[tuple[str, str], Foreign]:
    """(benchmark, sample id) -> its answer: by the sample's id, else by its place, else by its question.

    One way is used for the whole file, the first that fits every row. Raises UserError where none does, or where
    golds differ.
    """
    if len(answers) != len(samples):
        raise UserError(
            f"{len(answers)} answers for {len(samples)} questions; evaluate the same questions in both (num_samples)"
        )
    by_id = {sample.id: sample for sample in samples}
    ways = (
        [by_id.get(str(answer.sample_id)) for answer in answers],
        [samples[a.place] if a.place is not None and 0 <= a.place < len(samples) else None for a in answers],
        _by_question(answers, samples),
    )
    for found in ways:
        if None not in found and len({(s.benchmark, s.id) for s in found if s}) == len(samples):
            pairs = list(zip(answers, found, strict=True))
            _check_golds(pairs)
            return {(sample.benchmark, sample.id): answer for answer, sample in pairs if sample}
    unknown = next((a for a, s in zip(answers, ways[0], strict=True) if s is None), answers[0])
    raise UserError(
        f"{unknown.row}: index {unknown.sample_id!r}, question {str(unknown.question)[:60]!r} fits no question of the "
        "benchmark, neither by id, nor by place, nor by text"
    )


def _by_question(answers: Sequence[Foreign], samples: Sequence[Sample]) -> list[Sample | None]:
    """Row by row where the questions are equal; one question text may stand for several images."""
    return [
        sample if answer.question is not None and answer.question.strip() == sample.question.strip() else None
        for answer, sample in zip(answers, samples, strict=True)
    ]


def _check_golds(pairs: Sequence[tuple[Foreign, Sample | None]]) -> None:
    """A gold that is not ours means that the rows are not the ones we take them for."""
    for answer, sample in pairs:
        if sample is None or answer.gold in (None, ""):
            continue
        ours, theirs = _golds(sample.gold), _golds(answer.gold)
        if theirs != ours and not (len(theirs) == 1 and theirs <= ours):
            raise UserError(
                f"{answer.row}: its answer is {answer.gold!r}, that of {sample.benchmark} {sample.id} is "
                f"{sample.gold!r}: these are other questions, or in another order"
            )


def _golds(gold: Any) -> set[str]:
    """The accepted answers, also from the text of a list, in a form that toolkits agree on."""
    if isinstance(gold, str) and gold.lstrip().startswith("["):
        gold = literal_list(gold) or gold
    items = gold if isinstance(gold, list | tuple) else [gold]
    return {unwrap_commands(str(item)).strip().lower() for item in items}
