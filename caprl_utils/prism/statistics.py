"""Statistics for the tables: images and trainings are drawn, models are compared on the same images and seeds.

Paired cluster bootstrap over images: all questions of an image are drawn together, one resample of a benchmark's images
serves all models. Benchmarks are resampled independently; their average counts each the same. What trainings with
another seed add is a variance beside it (`Bootstrap.contrast`), of the comparison itself or pooled (`Spread`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import comb, inf, sqrt
from typing import Any, NamedTuple

import numpy as np

from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import averaged
from caprl_utils.prism.loading import too_many

LEVEL = 0.95
AVERAGE = "average"
OWN_SPREAD = 5  # trainings from which on a comparison has a spread of its own
_BLOCK_VALUES = 2_000_000  # weights held at once: 16 MB as float64

Scores = Mapping[tuple[str, str], float]  # (image id, sample id) -> score of the sample
Columns = Mapping[int | None, str]  # seed -> model of a row; {None: model} was not trained


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its interval at `LEVEL`, in the unit of the scores (0 to 1), over so many images.
    p_value: two-sided p of "no difference" (or of another null). trainings: behind it on the side that has fewer, pairs
    where both sides are trained; None where nothing was trained.
    """

    value: float
    low: float
    high: float
    num_clusters: int
    p_value: float | None = None
    trainings: int | None = None


class Spread(NamedTuple):
    """How much trainings differ that differ in their seed alone, pooled over rows: variance of a training's value, and
    half that of a difference paired by seed, in which what a seed does to all rows is gone; degrees of freedom of each.
    """

    single: float
    single_df: int
    paired: float
    paired_df: int


def pooled(blocks: Iterable[Mapping[Any, Mapping[int, float]]]) -> Spread | None:
    """The spread over rows (seed -> value of each) in blocks that share what a seed decides; None where no row has two
    trainings. single: the mean square in each block beside its rows; paired: beside its rows and its seeds (two-way
    layout, least squares).
    """
    tables = [[(row, seed, v) for row, found in rows.items() for seed, v in found.items()] for rows in blocks]
    parts = []
    for factors in ((0,), (0, 1)):
        squares, df = 0.0, 0
        for cells in filter(None, tables):
            levels = [(factor, level) for factor in factors for level in dict.fromkeys(cell[factor] for cell in cells)]
            design = np.array([[cell[factor] == level for factor, level in levels] for cell in cells], dtype=float)
            values = np.array([cell[-1] for cell in cells])
            fit, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
            squares += float(np.sum((values - design @ fit) ** 2))
            df += len(values) - int(rank)
        parts.append((squares / df if df else 0.0, df))
    single, paired = parts
    return Spread(*single, *(paired if paired[1] else single)) if single[1] else None


def t_interval(
    value: float, within: float, between: float, df: float, null: float = 0.0, side: int = 0
) -> tuple[float, float, float]:
    """(low, high, p) from a variance that is known well (over images, steps) and one with `df` degrees of freedom (over
    trainings), by Student's t with those of their sum after Satterthwaite (1946). side: 1 or -1 asks for p of "above"
    or "below the null" alone, doubled: under 0.05 where the interval ends beyond the null.
    """
    from scipy.stats import t

    error = sqrt(within + between)
    df = df * (within + between) ** 2 / between**2 if between else inf
    half = float(t.ppf((1 + LEVEL) / 2, df)) * error
    distance = (value - null) / max(error, 1e-12)
    tail = float(t.sf(side * distance if side else abs(distance), df))
    return value - half, value + half, min(1.0, 2 * tail)


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Resampled `means` (models,) and `samples` (draws, models), over so many images and rows (an average: sums)."""

    models: tuple[str, ...]
    means: np.ndarray
    samples: np.ndarray
    num_clusters: int
    num_rows: int

    def interval(self, model: str) -> Interval:
        """The model's mean with its percentile interval over images."""
        return self.contrast({None: model})

    def difference(self, model: str, baseline: str) -> Interval:
        """model - baseline, paired by image, over images alone."""
        return self.contrast({None: model}, {None: baseline})

    def contrast(
        self, ours: Columns, theirs: Columns | None = None, spread: Spread | None = None, null: float = 0.0,
        side: int = 0,
    ) -> Interval:  # fmt: skip
        """Mean of a row's models, minus that of theirs: paired by image, and by seed where both have one. Of trained
        models over images and seeds (`t_interval`): the variance between trainings is the comparison's own from
        `OWN_SPREAD` pairs on, else pooled; without either, and where nothing was trained, over images alone.
        """
        sides = [ours] if theirs is None else [ours, theirs]
        trained = [columns for columns in sides if None not in columns]
        common = sorted(set.intersection(*map(set, trained))) if trained else []
        chosen = [[c[seed] for seed in common] if common and None not in c else [*c.values()] for c in sides]
        places = [[self.models.index(model) for model in models] for models in chosen]
        means, draws = ([table[..., place] for place in places] for table in (self.means, self.samples))
        if theirs is None:
            means, draws = [*means, np.zeros(1)], [*draws, np.zeros((1, 1))]
        value, samples = float(means[0].mean() - means[1].mean()), draws[0].mean(axis=1) - draws[1].mean(axis=1)
        counts = [len(place) for columns, place in zip(sides, places, strict=True) if None not in columns]
        paired, between = means[0] - means[1] if common else None, None  # variance that trainings bring, its df
        if paired is not None and len(paired) >= OWN_SPREAD:
            between = float(np.var(paired, ddof=1)) / len(paired), len(paired) - 1
        elif spread and paired is not None and len(counts) == 2:
            between = 2 * spread.paired / len(paired), spread.paired_df
        elif spread and trained:
            between = spread.single * sum(1 / count for count in counts), spread.single_df
        if between:
            low, high, p_value = t_interval(value, float(np.var(samples)), *between, null, side)
        else:  # p: twice the share of draws beyond the null, counting the observed sample as one more draw
            low, high = map(float, np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
            tails = {1: np.sum(samples <= null), -1: np.sum(samples >= null)}
            tail = tails[side] if side else min(tails.values())
            p_value = float(min(1.0, 2 * (tail + 1) / (len(samples) + 1)))
        p_value = None if theirs is None else p_value
        return Interval(value, low, high, self.num_clusters, p_value, min(counts, default=None))


def bootstrap(scores: Any, clusters: Sequence[Any], models: Sequence[str], draws: int, seed: int) -> Bootstrap:
    """Resample the images of one benchmark; images with more questions count more, in the resamples too. scores: (rows,
    models), none missing. clusters: image id of each row.
    """
    table = np.asarray(scores, dtype=np.float64)
    _, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    num_clusters = int(codes.max()) + 1
    sums = np.zeros((num_clusters, len(models) + 1))  # per image: score sums, number of rows
    np.add.at(sums, codes, np.column_stack([table, np.ones(len(table))]))
    generator, blocks = np.random.default_rng(seed), []
    block = max(1, _BLOCK_VALUES // num_clusters)
    narrow = np.uint16 if num_clusters <= 2**16 else np.uint32  # half the random bits, half the memory
    for start in range(0, draws, block):  # how often each image is drawn: n of n with replacement
        size = (min(block, draws - start), num_clusters)
        picks = generator.integers(num_clusters, size=size, dtype=narrow)
        weights = np.stack([np.bincount(pick, minlength=num_clusters) for pick in picks]).astype(np.float64)
        blocks.append(weights @ sums)
    samples = np.concatenate(blocks)
    means = samples[:, :-1] / samples[:, -1:]
    return Bootstrap(tuple(models), table.mean(axis=0), means, num_clusters, len(table))


def macro_average(parts: Mapping[str, Bootstrap]) -> Bootstrap:
    """The mean over benchmarks of the same models, each counting the same, from their independent resamples."""
    found = list(parts.values())
    means, samples = (np.mean([getattr(part, name) for part in found], axis=0) for name in ("means", "samples"))
    counts = (sum(getattr(part, name) for part in found) for name in ("num_clusters", "num_rows"))
    return Bootstrap(found[0].models, means, samples, *counts)


def bootstrap_models(models: Mapping[str, Mapping[str, Scores]], draws: int, seed: int) -> dict[str, Bootstrap]:
    """Resampled means of all models (label -> benchmark -> scores) per benchmark, and under `AVERAGE` of their average
    (without held-out splits), over the samples that all have; each benchmark with a seed of its own, derived from its
    name. Raises UserError when two models were not scored on the same samples, but for a few that were left out.
    """
    labels, parts = list(models), {}
    for benchmark, scores in models[labels[0]].items():
        keys = sorted(set.intersection(*({*models[label].get(benchmark, {})} for label in labels)))
        for label in labels[1:]:
            odd = sorted(scores.keys() ^ models[label].get(benchmark, {}).keys())
            if too_many(len(odd), len(scores)) or not keys:
                raise UserError(
                    f"{benchmark}: {labels[0]} and {label} were not scored on the same samples ({len(odd)} differ, "
                    f"first {'/'.join(odd[0])}); evaluate both again with one profile and seed"
                )
        table = [[models[label][benchmark][key] for label in labels] for key in keys]
        own_seed = seed ^ zlib.crc32(benchmark.encode())
        parts[benchmark] = bootstrap(table, [image for image, _ in keys], labels, draws, own_seed)
    return {**parts, AVERAGE: macro_average({name: parts[name] for name in averaged(parts)})}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values, by the same names: valid however the tests depend on each other (1979)."""
    ranked = sorted(p_values, key=p_values.__getitem__)
    steps = [min(1.0, (len(ranked) - rank) * p_values[name]) for rank, name in enumerate(ranked)]
    adjusted = dict(zip(ranked, accumulate(steps, max), strict=True))
    return {name: adjusted[name] for name in p_values}


def variance_components(scores: Any) -> tuple[float, float | None]:
    """Variance of one score between items and between the captions of one, by the method of moments; 0 for an estimate
    that comes out negative, None where there is one caption. scores: (items, captions).
    """
    table = np.asarray(scores, dtype=float)
    captions = float(table.var(axis=1, ddof=1).mean()) if table.shape[1] > 1 else None
    items = float(table.mean(axis=1).var(ddof=1)) - (captions or 0.0) / table.shape[1]
    return max(0.0, items), captions


def best_of_n(scores: Sequence[float], n: int) -> float:
    """Expected best score of n draws without replacement from the draws at hand; unbiased (n: at most their number).
    For scores of 0 and 1 it is pass@k (arXiv 2107.03374, equation 1). An oracle: it needs the right answer to choose.
    """
    ranked = sorted(scores)
    return sum(value * comb(rank, n - 1) for rank, value in enumerate(ranked)) / comb(len(ranked), n)
