"""Statistics for the tables: the image is the unit, models are compared on the same images.

* Intervals: paired cluster bootstrap over images, percentile interval. One resample of the images of a
  benchmark serves all models, so that differences keep their pairing; benchmarks are resampled
  independently and a macro average counts each benchmark the same.
* Many comparisons: Holm's correction.
* Power: the smallest difference that n images can show.
* Variance parts: items, caption draws, reader draws, training seeds.
* Best of n: the unbiased form when more captions were drawn than n.

Scores enter as arrays of shape (rows, models), clusters as one image id per row. A row in which a model
has no score (NaN) is refused: leave the row out for all models, or the pairing is gone.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from typing import Any

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
_BLOCK_VALUES = 2_000_000  # weights held at once: 16 MB as float64


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its percentile interval.

    value, low, high: in the unit of the scores (0 to 1).
    num_clusters: images; num_rows: samples (for an average over benchmarks their sums).
    p_value: two-sided bootstrap p of "no difference", only for differences.
    """

    value: float
    low: float
    high: float
    level: float
    num_clusters: int
    num_rows: int
    draws: int
    p_value: float | None = None

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Resampled means: `means` (models,), `samples` (draws, models), in the order of `models`."""

    models: tuple[str, ...]
    means: np.ndarray
    samples: np.ndarray
    num_clusters: int
    num_rows: int

    def interval(self, model: str, level: float = LEVEL) -> Interval:
        """The model's mean with its interval."""
        place = self._place(model)
        return self._interval(self.means[place], self.samples[:, place], level, None)

    def difference(self, model: str, baseline: str, level: float = LEVEL) -> Interval:
        """model - baseline, paired by image, with the bootstrap p-value."""
        a, b = self._place(model), self._place(baseline)
        value = self.means[a] - self.means[b]
        samples = self.samples[:, a] - self.samples[:, b]
        return self._interval(value, samples, level, _p_value(samples))

    def _place(self, model: str) -> int:
        if model not in self.models:
            raise ValueError(f"no model {model!r} among {', '.join(self.models)}")
        return self.models.index(model)

    def _interval(self, value: float, samples: np.ndarray, level: float, p_value: float | None) -> Interval:
        low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
        ends = (float(value), float(low), float(high))
        return Interval(*ends, level, self.num_clusters, self.num_rows, len(samples), p_value)


def bootstrap(
    scores: Any,
    clusters: Sequence[Any],
    models: Sequence[str],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Bootstrap:
    """Resample the images of one benchmark.

    A mean is the sum over rows by the number of rows, so images with more questions count more, in the
    resamples too.

    Args:
        scores: (rows, models), one column per model in the order of `models`.
        clusters: image id of each row.
        draws: resamples.
        seed: seeds the generator; the same call gives the same numbers.

    Raises:
        ValueError: no rows, shapes that do not fit, or missing scores.
    """
    table = np.asarray(scores, dtype=np.float64)
    table = table.reshape(-1, 1) if table.ndim == 1 else table
    if table.ndim != 2 or table.shape != (len(clusters), len(models)) or not len(clusters):
        raise ValueError(
            f"scores of shape {table.shape} do not fit {len(clusters)} rows and {len(models)} models"
        )
    if np.isnan(table).any():
        rows = np.unique(np.nonzero(np.isnan(table))[0])
        raise ValueError(f"{len(rows)} rows lack a score (first: {rows[0]}): leave them out for all models")
    _, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    num_clusters = int(codes.max()) + 1
    sums = np.zeros((num_clusters, table.shape[1] + 1))  # per image: score sums, number of rows
    np.add.at(sums, codes, np.column_stack([table, np.ones(len(table))]))
    samples = np.concatenate([
        weights @ sums for weights in _weights(num_clusters, draws, np.random.default_rng(seed))
    ])  # fmt: skip
    return Bootstrap(
        tuple(models), table.mean(axis=0), samples[:, :-1] / samples[:, -1:], num_clusters, len(table)
    )


def _weights(num_clusters: int, draws: int, generator: np.random.Generator) -> Any:
    """How often each image is drawn, (block of draws, images): drawing n of n with replacement."""
    block = max(1, _BLOCK_VALUES // num_clusters)
    narrow = np.uint16 if num_clusters <= 2**16 else np.uint32  # half the random bits, half the memory
    for start in range(0, draws, block):
        size = min(block, draws - start)
        weights = np.empty((size, num_clusters))
        picks = generator.integers(num_clusters, size=weights.shape, dtype=narrow)
        for row, pick in zip(weights, picks, strict=True):
            row[:] = np.bincount(pick, minlength=num_clusters)
        yield weights


def macro_average(parts: Mapping[str, Bootstrap]) -> Bootstrap:
    """The mean over benchmarks, each counting the same, from their independent resamples.

    Raises ValueError if the parts differ in models or draws.
    """
    found = list(parts.values())
    if not found:
        raise ValueError("no benchmarks to average")
    for name, part in parts.items():
        if part.models != found[0].models or part.samples.shape != found[0].samples.shape:
            raise ValueError(f"benchmark {name!r} has other models or another number of draws than the first")
    return Bootstrap(
        found[0].models,
        np.mean([part.means for part in found], axis=0),
        np.mean([part.samples for part in found], axis=0),
        sum(part.num_clusters for part in found),
        sum(part.num_rows for part in found),
    )


def bootstrap_benchmarks(
    tables: Mapping[str, tuple[Any, Sequence[Any]]],
    models: Sequence[str],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Bootstrap]:
    """`bootstrap` for each benchmark, with a seed of its own derived from `seed` and its name.

    Args:
        tables: benchmark -> (scores of shape (rows, models), image ids).
    """
    return {
        name: bootstrap(scores, clusters, models, draws=draws, seed=seed ^ zlib.crc32(name.encode()))
        for name, (scores, clusters) in tables.items()
    }


def _p_value(samples: np.ndarray) -> float:
    """Twice the smaller tail share at zero, counting the observed sample as one more draw; at most 1."""
    below, above = np.sum(samples <= 0), np.sum(samples >= 0)
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(samples) + 1)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values, by the same names.

    Compare each with the level: the share of families with any false finding stays below it, however
    the tests depend on each other (Holm 1979).
    """
    adjusted: dict[str, float] = {}
    floor = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p_values}


def minimum_detectable_difference(
    differences: Sequence[float], *, level: float = LEVEL, power: float = 0.8, num_clusters: int | None = None
) -> float:
    """Smallest true difference that a two-sided paired test finds with `power`.

    (z(level) + z(power)) * sd / sqrt(n), the normal approximation.

    Args:
        differences: one mean difference per image, from which the standard deviation is taken.
        num_clusters: images of the planned comparison; by default as many as given.

    Raises:
        ValueError: fewer than two images.
    """
    from scipy.stats import norm

    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        raise ValueError("a spread needs at least two images")
    factor = norm.ppf((1 + level) / 2) + norm.ppf(power)
    return float(factor * values.std(ddof=1) / sqrt(num_clusters or len(values)))


def cluster_means(scores: Sequence[float], clusters: Sequence[Any]) -> dict[Any, float]:
    """Mean score of each image."""
    groups: dict[Any, list[float]] = {}
    for score, cluster in zip(scores, clusters, strict=True):
        groups.setdefault(cluster, []).append(score)
    return {cluster: sum(values) / len(values) for cluster, values in groups.items()}


@dataclass(frozen=True, slots=True)
class VarianceParts:
    """Variance of one score by its source, and the standard error of the mean that follows.

    A part is None where the data cannot show it: one draw says nothing about draws, one training seed
    nothing about seeds. Estimates that come out negative are given as 0.
    """

    items: float | None
    captions: float | None
    reader: float | None
    seeds: float | None
    standard_error: float | None
    shape: tuple[int, int, int, int]


def variance_components(scores: Any) -> VarianceParts:
    """Variance by items, training seeds, caption draws and reader draws of a balanced design.

    Nested analysis of variance: reader draws within captions, captions within (item, seed); items and
    training seeds are crossed, their interaction counts into captions (one cannot be told from the
    other without drawing the captions of a seed twice). Method of moments on the mean squares.

    Args:
        scores: (items, seeds, captions, reader draws), any of the last three may be 1.

    Raises:
        ValueError: not four axes, no items, or missing values.
    """
    table = np.asarray(scores, dtype=float)
    if table.ndim != 4 or 0 in table.shape or np.isnan(table).any():
        raise ValueError(f"scores of shape {table.shape}: give all of (items, seeds, captions, reader draws)")
    num_items, num_seeds, num_captions, num_draws = table.shape
    caption_means = table.mean(axis=3)
    cell_means = caption_means.mean(axis=2)  # (items, seeds)
    item_means, seed_means, mean = cell_means.mean(axis=1), cell_means.mean(axis=0), cell_means.mean()
    reader = float(table.var(axis=3, ddof=1).mean()) if num_draws > 1 else None
    within = float(caption_means.var(axis=2, ddof=1).mean()) if num_captions > 1 else None
    captions = None if within is None else max(0.0, within - (reader or 0.0) / num_draws)
    residual: float | None = None if within is None else within / num_captions
    if num_seeds > 1 and num_items > 1:
        left = cell_means - item_means[:, None] - seed_means[None, :] + mean
        residual = float((left**2).sum() / ((num_items - 1) * (num_seeds - 1)))
    items = seeds = None
    if num_items > 1:
        items = max(0.0, float(item_means.var(ddof=1)) - (residual or 0.0) / num_seeds)
    if num_seeds > 1:
        seeds = max(0.0, float(seed_means.var(ddof=1)) - (residual or 0.0) / num_items)
    error = _standard_error(item_means, seeds, num_items, num_seeds)
    return VarianceParts(items, captions, reader, seeds, error, table.shape)


def _standard_error(
    item_means: np.ndarray, seeds: float | None, num_items: int, num_seeds: int
) -> float | None:
    """Of the overall mean: between items (which holds caption and reader noise) plus between seeds."""
    if num_items < 2:
        return None
    return sqrt(float(item_means.var(ddof=1)) / num_items + (seeds or 0.0) / num_seeds)


def best_of_n(scores: Sequence[float], n: int) -> float:
    """Expected best score of n draws without replacement from the draws at hand; unbiased.

    sum over the sorted scores of score(i) * C(i - 1, n - 1) / C(m, n); for scores of 0 and 1 the pass@k
    form 1 - C(m - c, n) / C(m, n) (arXiv 2107.03374, equation 1). It is an oracle: it needs the right
    answer to choose. n = 1 is the mean.

    Raises:
        ValueError: n outside 1 to the number of draws.
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"best of {n} needs at least {n} draws, there are {len(scores)}")
    ranked = sorted(scores)
    return sum(value * comb(rank, n - 1) for rank, value in enumerate(ranked)) / comb(len(ranked), n)
