"""Stage 3 of Prism, from answers to the numbers of a run: scores, a row per question and caption, and their summary.

Two ways to score are never mixed: `standard` is each benchmark's own metric, as the common toolkits compute it, and
`caprl` the verdict of the authors' Prism scorer (both in `metrics`). A metric that needs a judge gives no score without
one; which model judges moves the score by points, so record and key name it. A sample without a score is left out of
the mean and counted; an answer that could not be read scores 0 and is counted. The rotations of one MMBench question
make one row; We-Math scores problem groups.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from caprl_utils import prompts
from caprl_utils.answers import MARKS, Letter, after_reasoning, final_answer, without_full_stop
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.hashing import text_hash
from caprl_utils.models.base import Backend, Request, Sampling
from caprl_utils.paths import shown
from caprl_utils.prism import told
from caprl_utils.prism.benchmarks import averaged, get_benchmark
from caprl_utils.prism.metrics import METRICS, Score, all_rotations, by_authors, mathvista_match, prediction
from caprl_utils.prism.statistics import AVERAGE, Scores, best_of_n, bootstrap_models
from caprl_utils.records import Sample
from caprl_utils.runs import RowStore

Scoring = Literal["standard", "caprl"]
Asked = Sequence[tuple[Sample, str]]  # a question, and what the reader said
Row = Mapping[str, Any]  # of COLUMNS
COLUMNS = (
    "benchmark", "sample_id", "group", "image_id", "model", "caption_index", "caption", "num_tokens", "finish_reason",
    "question", "options", "gold", "answer", "letter_mass", "parsed", "score", "reason", *told.COLUMNS,
)  # fmt: skip
_ASKED_OFTEN = 8  # ours: from so few answers on the commonest says something


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
    letter_mass: float | None = None


def score_rows(
    tasks: Sequence[Task], answers: Mapping[str, Answer], scoring: Scoring, judge: Judge | None = None
) -> list[dict[str, Any]]:
    """One row per sample and caption, in the order of the tasks: what samples.parquet holds. The authors' scorer takes
    an answer whole; of k letters exactly as likely each is said with 1/k.
    """
    said: dict[str, list[str]] = {}
    for task in tasks:
        answer = answers[task.id]
        letters = [Letter(letter) for letter in answer.letters]
        said[task.id] = letters or [prediction(task.sample, answer.text) if scoring == "standard" else answer.text]
    found = iter(score_answers([(t.sample, text) for t in tasks for text in said[t.id]], scoring, judge))
    scores: dict[str, Score] = {}
    units: dict[Any, list[Task]] = {}  # tasks that make one row
    for task in tasks:
        first, *others = (next(found) for _ in said[task.id])
        if others:
            letters = "/".join(str(score.parsed) for score in (first, *others))
            first = Score(_mean([score.value for score in (first, *others)]), letters, f"{letters} equally likely")
        scores[task.id] = first
        sample, key = task.sample, task.id
        circular = scoring == "standard" and get_benchmark(sample.benchmark).metric == "circular_accuracy"
        if circular and "rotation" in sample.meta:
            key = (sample.benchmark, sample.meta["image_id"], task.caption_index)
        units.setdefault(key, []).append(task)
    return [
        _row(unit, [answers[t.id] for t in unit], all_rotations([scores[t.id] for t in unit]), scoring)
        for unit in units.values()
    ]


def _row(unit: Sequence[Task], answers: Sequence[Answer], verdict: Score, scoring: Scoring) -> dict[str, Any]:
    """The published row of one unit; of several rotations answers and golds are JSON lists."""
    task, sample, several = unit[0], unit[0].sample, len(unit) > 1
    golds = [task.sample.gold for task in unit] if several else sample.gold
    grouped = scoring == "standard" and get_benchmark(sample.benchmark).metric == "wemath_four_dimensional"
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


def write_samples(path: Path, rows: Sequence[Row], model: str) -> None:
    """Write the rows as parquet, atomically; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"caption_index": pa.int64(), "num_tokens": pa.int64(), "options": pa.list_(pa.string())}
    kinds |= {"letter_mass": pa.float64(), "score": pa.float64(), **dict.fromkeys(told.COLUMNS, pa.int64())}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{**row, "model": model} for row in rows], schema), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished Prism run."""
    import pyarrow.parquet as pq

    file = folder / "samples.parquet"
    if not file.is_file():
        raise UserError(f"no {shown(file)}: that evaluation has not been made or not been finished")
    return pq.read_table(file).to_pylist()


def sample_scores(rows: Sequence[Row]) -> dict[str, Scores]:
    """Benchmark -> (image, sample) -> mean over captions; of We-Math of its groups. rows: of one run or several."""
    found = _scores_of(rows).items()
    return {name: {key: sum(s) / len(s) for key, s in samples.items()} for name, samples in found}


def _scores_of(rows: Sequence[Row]) -> dict[str, dict[tuple[str, str], list[float]]]:
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


def summarise(rows: Sequence[Row], draws: int, seed: int) -> dict[str, Any]:
    """Values, counts and intervals of a record: per benchmark, and the average of those of `benchmarks.averaged`, each
    counted the same; what cannot be taken is None, and the average's interval comes only where all have scores.
    """
    names, scores = dict.fromkeys(row["benchmark"] for row in rows), sample_scores(rows)
    values = {name: _values([row for row in rows if row["benchmark"] == name]) for name in names}
    average, tokens = (_mean([values[name][key] for name in averaged(names)]) for key in ("mean", "caption_tokens"))
    said = {}  # every measure of what captions say: means over images, then over benchmarks
    for measure in told.MEASURES:
        parts = told.by_image(rows, measure)
        said[measure] = _mean([_mean([*parts[name].values()]) for name in averaged(parts)])
    drawn = bootstrap_models({"model": scores}, draws, seed) if scores else {}
    if len(scores) < len(names):
        drawn.pop(AVERAGE, None)
    intervals = {name: part.interval("model") for name, part in drawn.items()}
    return {
        "values": {"benchmarks": values, "average": average, "caption_tokens": tokens, "said": said},
        "n": {name: found["num_samples"] for name, found in values.items()},
        "unparsed": {name: found["unparsed"] for name, found in values.items()},
        "intervals": {name: [interval.low, interval.high] for name, interval in intervals.items()},
    }


def _values(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one benchmark. `mean` is its score; what is counted are questions, also where it is scored by groups."""
    per_sample = next(iter(_scores_of(rows).values()), {}).values()
    captions = {(row["image_id"], row["caption_index"]): row for row in rows}.values()
    fewest = min((len(scores) for scores in per_sample), default=0)
    return {
        "mean": _mean([sum(s) / len(s) for s in per_sample]), "num_samples": len({row["sample_id"] for row in rows}),
        "num_images": len({row["image_id"] for row in rows}), "num_rows": len(rows),
        "unscored": sum(row["score"] is None for row in rows), "unparsed": sum(row["parsed"] is None for row in rows),
        "caption_tokens": _mean([row["num_tokens"] for row in captions]),
        "best_of": {str(k): _mean([best_of_n(s, k) for s in per_sample]) for k in (2, 4, 8) if k <= fewest},
    }  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean; None when any value is missing, because a mean over the rest would be of something else."""
    return None if not values or any(v is None for v in values) else float(np.mean(values))


def most_frequent(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as a guesser scores that looks at nothing: it says the commonest answer that other images have to such a
    question, of several as common the first in the alphabet (ours: a floor). Such a question: the same text where it
    is asked `_ASKED_OFTEN` times, else the same words of those that a tenth of the benchmark's questions share.
    """
    found = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        asked = [row for row in rows if row["benchmark"] == name]
        texts = Counter(row["question"] for row in asked)
        words = Counter(word for row in asked for word in {*row["question"].split()})
        shared = {word for word, many in words.items() if many >= len(asked) / 10}
        same = {text: " ".join(word for word in text.split() if word in shared) for text in texts}
        kinds = {text: text if many >= _ASKED_OFTEN else same[text] for text, many in texts.items()}
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


def gold_option(gold: str, options: Sequence[str]) -> str | None:
    """The text of the option that a gold letter names; None where the gold is no letter of them."""
    place = ord(gold) - ord("A") if len(gold) == 1 else -1
    return options[place] if 0 <= place < len(options) else None


# --- one answer at a time ---


def score_answers(answers: Asked, scoring: Scoring, judge: Judge | None = None) -> list[Score]:
    """Scores in the order of the answers; no value where a judge lacks. Raises UserError for what it does not know."""
    facts = [get_benchmark(sample.benchmark) for sample, _ in answers]
    if scoring == "caprl":
        if unknown := [one.key for one in facts if one.caprl is None]:
            raise UserError(f"benchmark {unknown[0]!r} is unknown to the authors' scorer: use scoring 'standard'")
        pairs = zip(answers, facts, strict=True)
        return [by_authors(text, sample.gold, one.caprl.branch) for (sample, text), one in pairs]
    scores = [METRICS[one.metric](*answer) for answer, one in zip(answers, facts, strict=True)]
    for metric, way in JUDGED.items() if judge else ():
        left = [i for i, one in enumerate(scores) if facts[i].metric == metric and one.value is None]
        for place, said in zip(left, _ask(judge, [answers[i] for i in left], *way), strict=True):
            scores[place] = said
    extracted = [place for place, said in enumerate(scores) if isinstance(said, str)]  # still to be compared
    pairs = [(answers[place][0], scores[place]) for place in extracted]
    for place, verdict in zip(extracted, _ask(judge, pairs, *JUDGED["llm_judge"]) if pairs else (), strict=True):
        scores[place] = verdict
    return scores


# The metrics that need a judge. The wording is ours, the contracts are the benchmarks': MM-Vet a grade from 0.0 to 1.0
# in tenths, MathVerse an extraction and then a comparison, CharXiv a verdict by the type of the answer, MathVista an
# extraction only. So scores compare with other runs of this project and judge, not with GPT-4 figures. Of a reply the
# last line in the form that was asked for counts, behind any reasoning, whatever marks or quotes stand around it;
# without one: no score.

MAX_TOKENS = 2048  # ours: a reply is one line, with room for reasoning before it


@dataclass(frozen=True)
class Judge:
    """A model that grades or extracts, greedily; a stopped evaluation asks only for the replies that it lacks."""

    backend: Backend
    store: RowStore

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """A reply to each prompt. Raises UserError when the judge failed; what it replied stays on disk."""
        asked = {key: text for text in texts if (key := text_hash(text)) not in self.store}
        requests = [Request(key, text) for key, text in asked.items()]
        for completion in self.backend.generate(requests, Sampling(MAX_TOKENS)) if requests else ():
            if completion.text is not None:
                self.store.append({"id": completion.id, "reply": completion.text})
        if failed := sum(key not in self.store for key in asked):
            raise UserError(
                f"the judge {self.backend.name} failed on {failed} of {len(asked)} prompts. Its replies so far are "
                f"kept in {shown(self.store.path)}; mend the cause and run again, only the missing ones are asked."
            )
        replies = {row["id"]: row["reply"] for row in self.store.read()}
        return [replies[text_hash(text)] for text in texts]


_GRADE = (  # no percentage, no range, and if it is out of something, then out of 1
    r"(?i)\bgrade[^\w.-]{1,6}(?:(?:is|boxed)[^\w.-]+)?([0-9.]*[0-9])"
    r"(?![0-9.,]*[0-9%]|\s*(?:[-\u2013]|to|or)\s*[0-9.]|\s*(?:/|out\s+of)\s*(?!1(?:\.0)?(?![0-9.])))"
)
_VERDICT = r"(?i)\bverdict\W{1,6}(?:(?:is|boxed)\W+)?(yes|no)\b"
_EXTRACTED = rf"(?im)\bextracted[{MARKS}]*:\s*(.+)$"
_ECHO = re.compile(  # the instruction told again, or half of it
    r"(?im)^.*reply with one line.*$|[\"\u201c]?verdict: yes[\"\u201d]? or [\"\u201c]?verdict: no\b[\"\u201d]?"
    r"|verdict: yes ?/ ?no\b|[\"\u201c]extracted: (?:x|none)[\"\u201d]|extracted: x\b"
)


def _ask(
    judge: Judge, asked: Asked, template: str, pattern: str, made: Callable[[str, Sample, str, str], str | Score]
) -> list[Any]:  # fmt: skip
    """What `made` makes of the judge's name, sample, final answer and what the pattern captures last in the judge's
    reply, behind its reasoning; a score without value where it finds nothing.
    """
    asked, name, texts, found = [(sample, final_answer(text)) for sample, text in asked], judge.backend.name, [], []
    for sample, answer in asked:
        kind = sample.meta.get("answer_type")
        rule = prompts.CHARXIV_RULES.get(kind, "") if sample.benchmark == "charxiv" else prompts.MATH_RULE
        beside = {"hint": prompts.TYPE_HINTS.get(kind, ""), "rule": rule}
        texts.append(template.format(question=sample.question, gold=sample.gold, answer=answer, **beside))
    for (sample, answer), reply in zip(asked, judge(texts), strict=True):
        said = re.findall(pattern, _ECHO.sub("", after_reasoning(reply)))
        why = f"judge {name} replied {reply.strip()[:60]!r}, which is no verdict"
        found.append(made(name, sample, answer, said[-1].strip(MARKS)) if said else Score(None, answer, why))
    return found


def _grade(judge: str, sample: Sample, answer: str, said: str) -> Score:
    value = float(said) if said.count(".") < 2 else math.nan
    if 0.0 <= value <= 1.0 and round(10 * value, 6) % 1 == 0:
        return Score(value, answer)
    return Score(None, answer, f"judge {judge} graded {said}, which is no verdict: 0.0 to 1.0 in tenths")


def _verdict(judge: str, sample: Sample, answer: str, said: str) -> Score:
    return Score(float(said.lower() == "yes"), answer, f"judged by {judge}")


def _extracted(judge: str, sample: Sample, answer: str, said: str) -> str | Score:
    """The score of the answer that the judge found in the text; the answer itself where it is to be compared."""
    said = without_full_stop(final_answer(re.sub(r'"\s*\}$', "", said))).strip(MARKS)
    said = "" if said.lower() == "none" else said
    if get_benchmark(sample.benchmark).metric == "mathverse_judge":
        if not said:
            return Score(0.0, None, f"{judge} found no answer in the response")
        return Score(1.0, said, "equal text after extraction") if said == str(sample.gold).strip() else said
    if sample.meta.get("answer_type") in ("integer", "float"):
        said = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|^[$\u20ac\u00a3\u00a5]\s*", "", said)
    score = mathvista_match(sample, said, extracted=True)
    return replace(score, reason=score.reason or f"extracted by {judge}")


JUDGED = {  # metric -> template, pattern, what is made of the reply
    "llm_judge_graded": (prompts.GRADE, _GRADE, _grade),
    "llm_judge": (prompts.COMPARE, _VERDICT, _verdict),
    "mathverse_judge": (prompts.EXTRACT, _EXTRACTED, _extracted),
    "llm_extract_then_typed_match": (prompts.EXTRACT, _EXTRACTED, _extracted),
}
