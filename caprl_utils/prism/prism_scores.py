"""Stage 3 of Prism: score every answer, publish the rows, and sum them up.

The score of a sample is the mean over its captions; best-of-n is another quantity (it needs the right
answer to choose) and stands apart under its own name. A sample without a score (its metric needs a judge)
is left out of the mean and counted; an answer that could not be read scores 0, is counted and listed.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.paths import shown
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.prism_answers import Answer, ReaderMode, Task
from caprl_utils.prism.prism_compare import AVERAGE, bootstrap_models, sample_scores
from caprl_utils.prism.scoring import Judge, Mode, Row, Score, score_batch
from caprl_utils.prism.statistics import best_of_n

LOW_MASS = 0.5  # ours: below it the reader would rather not have said a letter
COLUMNS = (
    "benchmark", "sample_id", "image_id", "model", "caption_index", "caption", "num_tokens", "finish_reason",
    "question", "options", "gold", "answer", "letter_mass", "parsed", "score", "reason",
)  # fmt: skip
_LISTED = 50  # unparsed answers named in the record; all are in samples.parquet


def check_modes(scoring: Mode, mode: ReaderMode) -> None:
    """Raise UserError for a scorer that cannot read what the reader writes."""
    if scoring == "caprl" and mode != "sampled":
        raise UserError(
            f"scoring 'caprl' reads <answer> tags, which reader mode {mode!r} never writes: use 'sampled'"
        )


def score_rows(
    tasks: Sequence[Task],
    answers: Mapping[str, Answer],
    facts: Mapping[str, Mapping[str, Any]],
    scoring: Mode,
    judge: Judge | None = None,
) -> list[dict[str, Any]]:
    """One row per sample and caption, in the order of the tasks: what samples.parquet holds.

    The rotations of one MMBench question make one row: it is right if all of them are.
    """
    units = _units(tasks) if scoring == "standard" else [[task] for task in tasks]
    verdicts = score_batch([_to_score(unit, answers) for unit in units], scoring, judge=judge)
    return [_row(unit, answers, facts, verdict) for unit, verdict in zip(units, verdicts, strict=True)]


def _units(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks that are scored together: the rotations of a circular question, every other one alone."""
    units: dict[Any, list[Task]] = {}
    for task in tasks:
        sample = task.sample
        circular = "rotation" in sample.meta and get_benchmark(sample.benchmark).metric == "circular_accuracy"
        key = (sample.benchmark, sample.meta["image_id"], task.caption_index) if circular else task.id
        units.setdefault(key, []).append(task)
    return list(units.values())


def _row(
    unit: Sequence[Task],
    answers: Mapping[str, Answer],
    facts: Mapping[str, Mapping[str, Any]],
    verdict: Score,
) -> dict[str, Any]:
    """The published row of one unit; of several rotations answers and golds are JSON lists."""
    task, sample, several = unit[0], unit[0].sample, len(unit) > 1
    about, found = facts[task.id], [answers[task.id] for task in unit]
    masses = [answer.letter_mass for answer in found if answer.letter_mass is not None]
    golds = [task.sample.gold for task in unit] if several else sample.gold
    return {
        "benchmark": sample.benchmark, "sample_id": sample.id, "image_id": about["image_id"],
        "caption_index": task.caption_index, "caption": about["caption"],
        "num_tokens": about["num_tokens"], "finish_reason": about["finish_reason"],
        "question": sample.question, "options": list(sample.options),
        "gold": golds if isinstance(golds, str) else json.dumps(golds),
        "answer": json.dumps([answer.text for answer in found]) if several else found[0].text,
        "letter_mass": min(masses) if masses else None,
        "parsed": verdict.parsed, "score": verdict.value,
        "reason": "two letters equally likely" if not several and found[0].text is None else verdict.reason,
    }  # fmt: skip


def _to_score(unit: Sequence[Task], answers: Mapping[str, Answer]) -> Row:
    sample = unit[0].sample
    meta = {**sample.meta, "options": list(sample.options), "question": sample.question}
    texts = [answers[task.id].text or "" for task in unit]
    if len(unit) == 1:
        return Row(sample.benchmark, texts[0], sample.gold, meta)
    meta |= {"group": "circular", "rotations": [list(task.sample.options) for task in unit]}
    return Row(sample.benchmark, texts, [task.sample.gold for task in unit], meta)


def write_samples(path: Path, rows: Sequence[Mapping[str, Any]], model: str) -> None:
    """Write the rows as parquet, atomically; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"caption_index": pa.int64(), "num_tokens": pa.int64(), "options": pa.list_(pa.string())}
    kinds |= {"letter_mass": pa.float64(), "score": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    table = pa.Table.from_pylist([{**row, "model": model} for row in rows], schema=schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished Prism run."""
    import pyarrow.parquet as pq

    file = folder / "samples.parquet"
    if not file.is_file():
        raise UserError(f"no {shown(file)}: that evaluation has not been made or not been finished")
    return pq.read_table(file).to_pylist()


def summarise(rows: Sequence[Mapping[str, Any]], draws: int, seed: int) -> dict[str, Any]:
    """Values, counts and intervals of a record: per benchmark, and their average (each benchmark counts
    the same).
    """
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    values = {name: _values([row for row in rows if row["benchmark"] == name]) for name in benchmarks}
    return {
        "values": {
            "benchmarks": values,
            "average": _mean([values[name]["mean"] for name in benchmarks]),
            "caption_tokens": _mean([values[name]["caption_tokens"] for name in benchmarks]),
        },
        "n": {name: values[name]["num_samples"] for name in benchmarks},
        "unparsed": {name: values[name]["unparsed"] for name in benchmarks},
        "intervals": _intervals(rows, draws, seed),
        "unparsed_rows": _unparsed_rows(rows),
    }


def _intervals(rows: Sequence[Mapping[str, Any]], draws: int, seed: int) -> dict[str, list[float]]:
    """Benchmark -> [low, high]; the average's only where every benchmark has scores."""
    scores = sample_scores(rows)
    if not scores:
        return {}
    parts = bootstrap_models({"model": scores}, draws, seed)
    if len(scores) < len({row["benchmark"] for row in rows}):
        del parts[AVERAGE]
    found = {name: part.interval("model") for name, part in parts.items()}
    return {name: [interval.low, interval.high] for name, interval in found.items()}


def _values(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    per_sample: dict[str, list[float]] = {}
    for row in rows:
        if row["score"] is not None:
            per_sample.setdefault(row["sample_id"], []).append(row["score"])
    captions = {(row["image_id"], row["caption_index"]): row for row in rows}.values()
    fewest = min((len(scores) for scores in per_sample.values()), default=0)
    masses = [row["letter_mass"] for row in rows if row["letter_mass"] is not None]
    return {
        "mean": _mean([sum(s) / len(s) for s in per_sample.values()]),
        "num_samples": len({row["sample_id"] for row in rows}),
        "num_images": len({row["image_id"] for row in rows}),
        "num_rows": len(rows),
        "unscored": sum(row["score"] is None for row in rows),
        "unparsed": sum(row["parsed"] is None for row in rows),
        "caption_tokens": _mean([row["num_tokens"] for row in captions]),
        "cut_captions": sum(row["finish_reason"] == "length" for row in captions),
        "low_letter_mass": sum(mass < LOW_MASS for mass in masses) if masses else None,
        "best_of": {
            str(k): _mean([best_of_n(s, k) for s in per_sample.values()])
            for k in (1, 2, 4, 8)
            if 1 < k <= fewest
        },
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean; None when any value is missing, because a mean over the rest would be of something else."""
    return None if not values or any(v is None for v in values) else float(np.mean(values))


def _unparsed_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    unread = [row for row in rows if row["parsed"] is None]
    keys = ("benchmark", "sample_id", "caption_index", "answer", "reason")
    return [{key: row[key] for key in keys} for row in unread[:_LISTED]]
