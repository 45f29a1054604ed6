"""From answers to the numbers of a run: a row per question and caption, kept as samples.parquet, and their summary.

A sample without a score (its metric needs a judge) is left out of the mean and counted; an answer that could not be
read scores 0, is counted and listed. The rotations of one MMBench question make one row; We-Math scores problem groups.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caprl_utils.answers import Letter
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.paths import shown
from caprl_utils.prism import told
from caprl_utils.prism.answers import Answer, Task
from caprl_utils.prism.benchmarks import averaged, get_benchmark
from caprl_utils.prism.metrics import Score, all_rotations, prediction
from caprl_utils.prism.scoring import Judge, Scoring, score_answers
from caprl_utils.prism.statistics import AVERAGE, Scores, best_of_n, bootstrap_models
from caprl_utils.records import Sample

TIED = "equally likely"
LOW_MASS = 0.5  # ours: below it the reader would rather not have said a letter
COLUMNS = (
    "benchmark", "sample_id", "group", "image_id", "model", "caption_index", "caption", "num_tokens", "finish_reason",
    "question", "options", "gold", "answer", "letter_mass", "parsed", "score", "reason", *told.COLUMNS,
)  # fmt: skip
_ASKED_OFTEN = 8  # ours: from so few answers on the commonest says something
_LISTED = 50  # unparsed answers named in the record; all are in samples.parquet


def score_rows(
    tasks: Sequence[Task], answers: Mapping[str, Answer], scoring: Scoring, judge: Judge | None = None
) -> list[dict[str, Any]]:
    """One row per sample and caption, in the order of the tasks: what samples.parquet holds."""
    said = {task.id: _said(task.sample, answers[task.id], scoring) for task in tasks}
    asked = [(task.sample, text) for task in tasks for text in said[task.id]]
    found = iter(score_answers(asked, scoring, judge))
    scores = {task.id: _shared([next(found) for _ in said[task.id]]) for task in tasks}
    return [
        _row(unit, [answers[task.id] for task in unit], all_rotations([scores[task.id] for task in unit]), scoring)
        for unit in _units(tasks, scoring)
    ]


def _said(sample: Sample, answer: Answer, scoring: Scoring) -> list[str]:
    """What is scored of an answer: its letters, or its text (the authors' scorer takes it whole)."""
    if answer.letters:
        return [Letter(letter) for letter in answer.letters]
    return [prediction(sample, answer.text) if scoring == "standard" else answer.text]


def _shared(tied: Sequence[Score]) -> Score:
    """The verdict on one answer; of k letters exactly as likely each is said with 1/k."""
    if len(tied) == 1:
        return tied[0]
    letters = "/".join(str(score.parsed) for score in tied)
    return Score(_mean([score.value for score in tied]), letters, f"{letters} {TIED}")


def _units(tasks: Sequence[Task], scoring: Scoring) -> Iterable[list[Task]]:
    """Tasks that make one row: the rotations of a circular question, every other one alone."""
    units: dict[Any, list[Task]] = {}
    for task in tasks:
        key, meta = task.id, task.sample.meta
        if "rotation" in meta and _scored_as("circular_accuracy", task, scoring):
            key = (task.sample.benchmark, meta["image_id"], task.caption_index)
        units.setdefault(key, []).append(task)
    return units.values()


def _scored_as(metric: str, task: Task, scoring: Scoring) -> bool:
    return scoring == "standard" and get_benchmark(task.sample.benchmark).metric == metric


def _row(unit: Sequence[Task], answers: Sequence[Answer], verdict: Score, scoring: Scoring) -> dict[str, Any]:
    """The published row of one unit; of several rotations answers and golds are JSON lists."""
    task, sample, several = unit[0], unit[0].sample, len(unit) > 1
    golds = [task.sample.gold for task in unit] if several else sample.gold
    grouped = _scored_as("wemath_four_dimensional", task, scoring)
    return {
        "benchmark": sample.benchmark, "sample_id": sample.id,
        "group": str(sample.meta["ID"]) if grouped else None, "image_id": task.image_id,
        "caption_index": task.caption_index, "caption": task.caption,
        "num_tokens": task.num_tokens, "finish_reason": task.finish_reason,
        "question": sample.question, "options": list(sample.options),
        "gold": golds if isinstance(golds, str) else json.dumps(golds),
        "answer": json.dumps([answer.text for answer in answers]) if several else answers[0].text,
        "letter_mass": min((a.letter_mass for a in answers if a.letter_mass is not None), default=None),
        "parsed": verdict.parsed, "score": verdict.value, "reason": verdict.reason,
        **told.counts(task.caption, sample.meta),
    }  # fmt: skip


def write_samples(path: Path, rows: Sequence[Mapping[str, Any]], model: str) -> None:
    """Write the rows as parquet, atomically; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"caption_index": pa.int64(), "num_tokens": pa.int64(), "options": pa.list_(pa.string())}
    kinds |= {"letter_mass": pa.float64(), "score": pa.float64(), **dict.fromkeys(told.COLUMNS, pa.int64())}
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


def sample_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Scores]:
    """Benchmark -> (image, sample) -> mean over captions; of We-Math of its groups. rows: of one run or several."""
    found = _scores_of(rows).items()
    return {name: {key: sum(s) / len(s) for key, s in samples.items()} for name, samples in found}


def _scores_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[str, str], list[float]]]:
    """Benchmark -> (image, sample) -> a score for each caption; groups stand for their image and sample."""
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    groups: dict[tuple[Any, ...], dict[str, bool]] = {}
    for row in rows:
        if row["score"] is not None and row.get("group") is None:
            of_benchmark = found.setdefault(row["benchmark"], {})
            of_benchmark.setdefault((row["image_id"], row["sample_id"]), []).append(row["score"])
        elif row["score"] is not None:
            one = row["benchmark"], row["group"], row.get("model"), row["caption_index"]
            groups.setdefault(one, {})[row["sample_id"]] = row["score"] == 1
    for (benchmark, group, *_), right in groups.items():
        if (score := group_score(right)) is not None:
            found.setdefault(benchmark, {}).setdefault((group, group), []).append(score)
    return found


def group_score(right: Mapping[str, bool]) -> float | None:
    """We-Math's four-dimensional score of one problem group, strict (its official code): 1 for complete mastery, 0.5
    where every step is right and the multi-step question wrong, else 0; None for a group that is not whole (the
    official code counts those as mastered). right: by sample id ("...2steps_1", "...3steps_multi").
    """
    multi = [hit for name, hit in right.items() if name.endswith("steps_multi")]
    steps = [hit for name, hit in right.items() if not name.endswith("steps_multi")]
    number = re.search(r"(\d+)steps_\w+$", next(iter(right)))
    if len(multi) != 1 or number is None or len(steps) != int(number[1]):
        return None
    return (1.0 if multi[0] else 0.5) if all(steps) else 0.0


def summarise(rows: Sequence[Mapping[str, Any]], draws: int, seed: int) -> dict[str, Any]:
    """Values, counts and intervals of a record: per benchmark, and the average of those of `benchmarks.averaged`, each
    counted the same.
    """
    names = dict.fromkeys(row["benchmark"] for row in rows)
    values = {name: _values([row for row in rows if row["benchmark"] == name]) for name in names}
    listed = [row for row in rows if row["parsed"] is None][:_LISTED]
    keys = ("benchmark", "sample_id", "caption_index", "answer", "reason")
    average, tokens = (_mean([values[name][key] for name in averaged(names)]) for key in ("mean", "caption_tokens"))
    return {
        "values": {"benchmarks": values, "average": average, "caption_tokens": tokens, "said": _said_in(rows)},
        "n": {name: found["num_samples"] for name, found in values.items()},
        "unparsed": {name: found["unparsed"] for name, found in values.items()},
        "intervals": _intervals(rows, draws, seed),
        "unparsed_rows": [{key: row[key] for key in keys} for row in listed],
    }


def _intervals(rows: Sequence[Mapping[str, Any]], draws: int, seed: int) -> dict[str, list[float]]:
    """Benchmark -> [low, high]; the average's only where every benchmark has scores."""
    scores = sample_scores(rows)
    parts = bootstrap_models({"model": scores}, draws, seed) if scores else {}
    if len(scores) < len({row["benchmark"] for row in rows}):
        parts.pop(AVERAGE, None)
    found = {name: part.interval("model") for name, part in parts.items()}
    return {name: [interval.low, interval.high] for name, interval in found.items()}


def _said_in(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Every measure of what captions say: means over images, then over benchmarks; None where they cannot be taken."""
    found = {name: told.by_image(rows, name) for name in told.MEASURES}
    means = {name: [_mean([*parts[key].values()]) for key in averaged(parts)] for name, parts in found.items()}
    return {name: _mean(parts) for name, parts in means.items()}


def _values(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one benchmark. `mean` is its score; what is counted are questions, also where it is scored by groups."""
    per_sample = next(iter(_scores_of(rows).values()), {}).values()
    captions = {(row["image_id"], row["caption_index"]): row for row in rows}.values()
    fewest = min((len(scores) for scores in per_sample), default=0)
    masses = [row["letter_mass"] for row in rows if row["letter_mass"] is not None]
    return {
        "mean": _mean([sum(s) / len(s) for s in per_sample]),
        "num_samples": len({row["sample_id"] for row in rows}),
        "num_images": len({row["image_id"] for row in rows}),
        "num_rows": len(rows),
        "unscored": sum(row["score"] is None for row in rows),
        "unparsed": sum(row["parsed"] is None for row in rows),
        "tied": sum(TIED in (row["reason"] or "") for row in rows),
        "caption_tokens": _mean([row["num_tokens"] for row in captions]),
        "cut_captions": sum(row["finish_reason"] == "length" for row in captions),
        "low_letter_mass": sum(mass < LOW_MASS for mass in masses) if masses else None,
        "best_of": {str(k): _mean([best_of_n(s, k) for s in per_sample]) for k in (2, 4, 8) if k <= fewest},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean; None when any value is missing, because a mean over the rest would be of something else."""
    return None if not values or any(v is None for v in values) else float(np.mean(values))


def most_frequent(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a guesser scores that looks at nothing: it says the commonest answer that other images have to such a
    question, of several as common the first in the alphabet (ours: a floor). Such a question: the same text where it
    is asked `_ASKED_OFTEN` times, else the same words of those that a tenth of the benchmark's questions share.
    """
    found = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        asked = [row for row in rows if row["benchmark"] == name]
        kinds = _kinds([row["question"] for row in asked])
        golds = [gold_option(row["gold"], row["options"]) or row["gold"] for row in asked]
        common, own = defaultdict(Counter), defaultdict(Counter)
        for row, gold in zip(asked, golds, strict=True):
            common[kinds[row["question"]]][gold] += 1
            own[kinds[row["question"]], row["image_id"]][gold] += 1
        for row, gold in zip(asked, golds, strict=True):
            kind = kinds[row["question"]]
            others = common[kind] - own[kind, row["image_id"]]
            guess = max(sorted(row["options"] or others), key=others.__getitem__, default=None)
            found.append({**row, "score": None if row["score"] is None else float(guess == gold)})
    return found


def _kinds(questions: Sequence[str]) -> dict[str, str]:
    """Question -> its kind."""
    texts, words = Counter(questions), Counter(word for text in questions for word in {*text.split()})
    shared = {word for word, many in words.items() if many >= len(questions) / 10}
    often = {text for text, many in texts.items() if many >= _ASKED_OFTEN}
    return {text: text if text in often else " ".join(w for w in text.split() if w in shared) for text in texts}


def gold_option(gold: str, options: Sequence[str]) -> str | None:
    """The text of the option that a gold letter names; None where the gold is no letter of them."""
    place = ord(gold) - ord("A") if len(gold) == 1 else -1
    return options[place] if 0 <= place < len(options) else None
