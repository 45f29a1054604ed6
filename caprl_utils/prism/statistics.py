"""Statistics for the tables: the image is the unit, models are compared on the same images.

Paired cluster bootstrap over images, percentile interval: all questions of an image are drawn together, one resample of
a benchmark's images serves all models. Benchmarks are resampled independently; their average counts each the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import comb, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from caprl_utils.errors import UserError
from caprl_utils.prism.loading import too_many

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95
POWER = 0.8
AVERAGE = "average"
_BLOCK_VALUES = 2_000_000  # weights held at once: 16 MB as float64

Scores = Mapping[tuple[str, str], float]  # (image id, sample id) -> score of the sample


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its percentile interval at `LEVEL`, in the unit of the scores (0 to 1), over so many images.
    p_value: two-sided bootstrap p of "no difference", only for differences.
    """

    value: float
    low: float
    high: float
    num_clusters: int
    p_value: float | None = None


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Resampled means: `means` (models,), `samples` (draws, models), in the order of `models`; of so many images and
    samples (of an average their sums).
    """

    models: tuple[str, ...]
    means: np.ndarray
    samples: np.ndarray
    num_clusters: int
    num_rows: int

    def interval(self, model: str) -> Interval:
        """The model's mean with its interval."""
        place = self.models.index(model)
        return self._interval(self.means[place], self.samples[:, place])

    def difference(self, model: str, baseline: str) -> Interval:
        """model - baseline, paired by image. p: twice the smaller tail share at zero, counting the observed sample as
        one more draw; at most 1.
        """
        a, b = self.models.index(model), self.models.index(baseline)
        samples = self.samples[:, a] - self.samples[:, b]
        tail = min(np.sum(samples <= 0), np.sum(samples >= 0))
        p_value = float(min(1.0, 2 * (tail + 1) / (len(samples) + 1)))
        return self._interval(self.means[a] - self.means[b], samples, p_value)

    def _interval(self, value: float, samples: np.ndarray, p_value: float | None = None) -> Interval:
        low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(value), float(low), float(high), self.num_clusters, p_value)


def bootstrap(scores: Any, clusters: Sequence[Any], models: Sequence[str], draws: int, seed: int) -> Bootstrap:
    """Resample the images of one benchmark; images with more questions count more, in the resamples too. scores: (rows,
    models). clusters: image id of each row. Raises ValueError for missing scores: leave such rows out for all models,
    or the pairing is gone.
    """
    table = np.asarray(scores, dtype=np.float64)
    if np.isnan(table).any():
        raise ValueError("rows lack a score: leave them out for all models")
    _, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    num_clusters = int(codes.max()) + 1
    sums = np.zeros((num_clusters, len(models) + 1))  # per image: score sums, number of rows
    np.add.at(sums, codes, np.column_stack([table, np.ones(len(table))]))
    blocks = _weights(num_clusters, draws, np.random.default_rng(seed))
    samples = np.concatenate([weights @ sums for weights in blocks])
    means = samples[:, :-1] / samples[:, -1:]
    return Bootstrap(tuple(models), table.mean(axis=0), means, num_clusters, len(table))


def _weights(num_clusters: int, draws: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each image is drawn, (block of draws, images): drawing n of n with replacement."""
    block = max(1, _BLOCK_VALUES // num_clusters)
    narrow = np.uint16 if num_clusters <= 2**16 else np.uint32  # half the random bits, half the memory
    for start in range(0, draws, block):
        size = (min(block, draws - start), num_clusters)
        picks = generator.integers(num_clusters, size=size, dtype=narrow)
        yield np.stack([np.bincount(pick, minlength=num_clusters) for pick in picks]).astype(np.float64)


def macro_average(parts: Mapping[str, Bootstrap]) -> Bootstrap:
    """The mean over benchmarks of the same models, each counting the same, from their independent resamples."""
    found = list(parts.values())
    means, samples = (np.mean([getattr(part, name) for part in found], axis=0) for name in ("means", "samples"))
    counts = (sum(getattr(part, name) for part in found) for name in ("num_clusters", "num_rows"))
    return Bootstrap(found[0].models, means, samples, *counts)


def bootstrap_benchmarks(
    tables: Mapping[str, tuple[Any, Sequence[Any]]], models: Sequence[str], draws: int, seed: int
) -> dict[str, Bootstrap]:
    """`bootstrap` for each benchmark (scores of shape (rows, models), image ids), with a seed of its own derived from
    `seed` and its name.
    """
    return {
        name: bootstrap(scores, clusters, models, draws, seed ^ zlib.crc32(name.encode()))
        for name, (scores, clusters) in tables.items()
    }


def bootstrap_models(models: Mapping[str, Mapping[str, Scores]], draws: int, seed: int) -> dict[str, Bootstrap]:
    """Resampled means of all models (label -> benchmark -> scores) per benchmark, and under `AVERAGE` of their average,
    over the samples that all have. Raises UserError when two models were not scored on the same samples, but for a few
    that were left out.
    """
    labels = list(models)
    tables = {}
    for benchmark, scores in models[labels[0]].items():
        keys = sorted(set.intersection(*({*models[label].get(benchmark, {})} for label in labels)))
        for label in labels[1:]:
            odd = sorted(scores.keys() ^ models[label].get(benchmark, {}).keys())
            if too_many(len(odd), len(scores)) or not keys:
                raise UserError(
                    f"{benchmark}: {labels[0]} and {label} were not scored on the same samples ({len(odd)} differ, "
                    f"first {'/'.join(odd[0])}); evaluate both again with one profile and seed"
                )
        columns = [[models[label][benchmark][key] for label in labels] for key in keys]
        tables[benchmark] = columns, [image for image, _ in keys]
    parts = bootstrap_benchmarks(tables, labels, draws, seed)
    return {**parts, AVERAGE: macro_average(parts)}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values, by the same names: valid however the tests depend on each other (1979)."""
    ranked = sorted(p_values, key=p_values.__getitem__)
    steps = [min(1.0, (len(ranked) - rank) * p_values[name]) for rank, name in enumerate(ranked)]
    adjusted = dict(zip(ranked, accumulate(steps, max), strict=True))
    return {name: adjusted[name] for name in p_values}


def differences_frame(parts: Mapping[str, Bootstrap], model: str, baseline: str) -> pd.DataFrame:
    """A row per benchmark: model - baseline in points, with interval and p."""
    import pandas as pd

    gaps = {name: part.difference(model, baseline) for name, part in parts.items()}
    rows = [(100 * gap.value, 100 * gap.low, 100 * gap.high, gap.p_value) for gap in gaps.values()]
    return pd.DataFrame(rows, index=list(gaps), columns=["difference", "low", "high", "p"])


def minimum_detectable_difference(gaps: Scores) -> float:
    """The smallest true difference that a paired comparison of these images finds with power `POWER`, by the normal
    approximation (z(level) + z(power)) * sd / sqrt(n). gaps: differences of samples, of at least two images.
    """
    from scipy.stats import norm

    by_image: dict[str, list[float]] = {}
    for (image, _), gap in gaps.items():
        by_image.setdefault(image, []).append(gap)
    means = [sum(found) / len(found) for found in by_image.values()]
    factor = norm.ppf((1 + LEVEL) / 2) + norm.ppf(POWER)
    return float(factor * np.std(means, ddof=1) / sqrt(len(means)))


class VarianceParts(NamedTuple):
    """Variance of one score by its source; None where the data cannot show it (one draw, one training seed), 0 for an
    estimate that comes out negative.
    """

    items: float | None
    captions: float | None
    seeds: float | None


def variance_components(scores: Any) -> VarianceParts:
    """Variance by items, training seeds and caption draws of a balanced design, by the method of moments. Captions are
    nested in (item, seed); items and seeds are crossed, their interaction counts into captions. scores: (items, seeds,
    captions), any of the last two may be 1.
    """
    table = np.asarray(scores, dtype=float)
    num_items, num_seeds, num_captions = table.shape
    cell_means = table.mean(axis=2)  # (items, seeds)
    item_means, seed_means = cell_means.mean(axis=1), cell_means.mean(axis=0)
    captions = float(table.var(axis=2, ddof=1).mean()) if num_captions > 1 else None
    residual = (captions or 0.0) / num_captions
    if num_seeds > 1 and num_items > 1:
        left = cell_means - item_means[:, None] - seed_means[None, :] + cell_means.mean()
        residual = float((left**2).sum() / ((num_items - 1) * (num_seeds - 1)))

    def between(means: np.ndarray, others: int) -> float | None:
        return max(0.0, float(means.var(ddof=1)) - residual / others) if len(means) > 1 else None

    return VarianceParts(between(item_means, num_seeds), captions, between(seed_means, num_items))


def best_of_n(scores: Sequence[float], n: int) -> float:
    """Expected best score of n draws without replacement from the draws at hand; unbiased (n: at most their number).
    For scores of 0 and 1 it is pass@k (arXiv 2107.03374, equation 1). An oracle: it needs the right answer to choose.
    """
    ranked = sorted(scores)
    return sum(value * comb(rank, n - 1) for rank, value in enumerate(ranked)) / comb(len(ranked), n)
