"""Prism scores of several models side by side: intervals and paired differences (see `statistics`).

The image is the unit: all its questions are drawn together. The average counts every benchmark the same,
as the paper's does.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.evaluation.statistics import Bootstrap, bootstrap_benchmarks, macro_average

Scores = Mapping[tuple[str, str], float]  # (image id, sample id) -> score of the sample
AVERAGE = "average"


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
