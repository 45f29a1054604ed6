"""Prism scores of several models side by side: intervals and paired differences (see `statistics`).

The image is the unit: all its questions are drawn together. The average counts every benchmark the same,
as the paper's does.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.prism.statistics import Bootstrap, bootstrap_benchmarks, macro_average

Scores = Mapping[tuple[str, str], float]  # (image id, sample id) -> score of the sample
AVERAGE = "average"
LENGTH_TOLERANCE = 0.1  # ours: captions within a tenth count as equally long


def sample_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Scores]:
    """Per benchmark the mean over captions of every sample; samples without a score are left out.

    rows: of samples.parquet; of several runs (training seeds) together, a sample's score is the mean over
    all.
    """
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        if row["score"] is not None:
            scores = found.setdefault(row["benchmark"], {})
            scores.setdefault((row["image_id"], row["sample_id"]), []).append(row["score"])
    return {
        name: {key: sum(values) / len(values) for key, values in scores.items()}
        for name, scores in found.items()
    }


def bootstrap_models(
    models: Mapping[str, Mapping[str, Scores]], draws: int, seed: int
) -> dict[str, Bootstrap]:
    """Resampled means of all models per benchmark, and under `AVERAGE` of their average.

    models: label -> benchmark -> scores. Raises UserError when two models were not scored on the same
    samples.
    """
    labels = list(models)
    first = models[labels[0]]
    tables = {}
    for benchmark, scores in first.items():
        for label in labels[1:]:
            _check_same(labels[0], scores, label, models[label].get(benchmark, {}), benchmark)
        keys = sorted(scores)
        columns = [[models[label][benchmark][key] for label in labels] for key in keys]
        tables[benchmark] = (columns, [image for image, _ in keys])
    parts = bootstrap_benchmarks(tables, labels, draws=draws, seed=seed)
    return {**parts, AVERAGE: macro_average(parts)}


def _check_same(first: str, ours: Scores, other: str, theirs: Scores, benchmark: str) -> None:
    odd = sorted(ours.keys() ^ theirs.keys())
    if odd:
        raise UserError(
            f"{benchmark}: {first} and {other} were not scored on the same samples ({len(odd)} differ, first "
            f"{'/'.join(odd[0])}); evaluate both again with one profile and seed"
        )


@dataclass(frozen=True)
class Matched:
    """Two captioners on pairs of captions of one image and the same length.

    parts: benchmark (and `AVERAGE`, if every benchmark has pairs) -> resampled means of "ours" and
    "theirs". pairs: caption pairs per benchmark. share: of all that could be.
    """

    parts: Mapping[str, Bootstrap]
    pairs: Mapping[str, int]
    share: float


def length_matched(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], draws: int, seed: int
) -> Matched:
    """Compare only captions of equal length: is the gain more than length? (ours)

    Captions of one image are paired, nearest lengths first, each used once, when their tokens differ by
    at most `LENGTH_TOLERANCE` of the longer. What finds no partner is left out, so this is a comparison
    of the lengths that both captioners write, not of all captions. rows: of samples.parquet.
    """
    left, right = _by_sample(ours), _by_sample(theirs)
    tables: dict[str, tuple[list[tuple[float, float]], list[str]]] = {}
    possible = 0
    for key in left.keys() & right.keys():
        benchmark, image, _ = key
        possible += min(len(left[key]), len(right[key]))
        for pair in _equal_length(left[key], right[key]):
            scores, images = tables.setdefault(benchmark, ([], []))
            scores.append(pair)
            images.append(image)
    ordered = {name: _sorted_table(*tables[name]) for name in sorted(tables)}
    parts = bootstrap_benchmarks(ordered, ["ours", "theirs"], draws=draws, seed=seed)
    if parts and len(parts) == len({row["benchmark"] for row in ours}):
        parts[AVERAGE] = macro_average({name: parts[name] for name in ordered})
    pairs = {name: len(scores) for name, (scores, _) in ordered.items()}
    return Matched(parts, pairs, sum(pairs.values()) / possible if possible else 0.0)


def _by_sample(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[tuple[int, float]]]:
    """(benchmark, image, sample) -> (tokens, score) of its captions; rows without either are left out."""
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row["num_tokens"] is not None and row["score"] is not None:
            key = (row["benchmark"], row["image_id"], row["sample_id"])
            found.setdefault(key, []).append((row["num_tokens"], row["score"]))
    return found


def _equal_length(
    left: Sequence[tuple[int, float]], right: Sequence[tuple[int, float]]
) -> list[tuple[float, float]]:
    """Score pairs of captions of equal length, nearest first, each caption once."""
    gaps = sorted(
        (abs(a - b), i, j)
        for i, (a, _) in enumerate(left)
        for j, (b, _) in enumerate(right)
        if abs(a - b) <= LENGTH_TOLERANCE * max(a, b)
    )
    used_left: set[int] = set()
    used_right: set[int] = set()
    pairs = []
    for _, i, j in gaps:
        if i not in used_left and j not in used_right:
            used_left.add(i)
            used_right.add(j)
            pairs.append((left[i][1], right[j][1]))
    return pairs


def _sorted_table(
    scores: list[tuple[float, float]], images: list[str]
) -> tuple[list[tuple[float, float]], list[str]]:
    """Rows in an order of their own, so that the result does not hang on the order of a set."""
    order = sorted(range(len(scores)), key=lambda i: (images[i], scores[i]))
    return [scores[i] for i in order], [images[i] for i in order]


def where_lost(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Shares of answers: right; wrong though the caption holds the right answer; wrong, and it does not
    (ours).

    The right answer is looked up as words in the caption, so a value told of another thing counts as
    held.
    """
    counts = {"right": 0, "wrong, but told": 0, "wrong, not told": 0}
    scored = [row for row in rows if row["score"] is not None]
    for row in scored:
        if row["score"] == 1:
            counts["right"] += 1
        else:
            counts["wrong, but told" if _told(row) else "wrong, not told"] += 1
    return {name: count / len(scored) for name, count in counts.items()} if scored else {}


def _told(row: Mapping[str, Any]) -> bool:
    place = ord(row["gold"][0]) - ord("A") if len(row["gold"]) == 1 else -1
    wanted = row["options"][place] if 0 <= place < len(row["options"]) else row["gold"]
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", row["caption"] or "", re.IGNORECASE) is not None
