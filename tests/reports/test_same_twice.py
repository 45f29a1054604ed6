"""A/A: trainings that differ in their seed alone are told apart no oftener than the level says (simulated scores)."""

import numpy as np
import pytest

from caprl_utils.prism import statistics

IMAGES, DRAWS, WORLDS = 40, 100, 134  # three pairs of rows a world: 402 pairs


def world(generator, num_rows, num_seeds, between, of_seed):
    """Rows of one setting: resampled means, columns and pooled spread. between: SD of trainings in points; of_seed: of
    what a seed does to all rows. Images vary by 15 points, an image under one training by 12 more.
    """
    shape = (num_rows, num_seeds, 1)
    scores = 0.6 + generator.normal(0, 0.15, IMAGES) + generator.normal(0, 0.12, (num_rows, num_seeds, IMAGES))
    scores += generator.normal(0, between / 100, shape) + generator.normal(0, of_seed / 100, (1, num_seeds, 1))
    names = [f"{row}-{seed}" for row in range(num_rows) for seed in range(num_seeds)]
    table = scores.reshape(len(names), IMAGES).T
    part = statistics.bootstrap(table, range(IMAGES), names, DRAWS, int(generator.integers(2**31)))
    columns = [{seed: f"{row}-{seed}" for seed in range(num_seeds)} for row in range(num_rows)]
    means = scores.mean(axis=2)
    return part, columns, statistics.pooled([{row: dict(enumerate(means[row])) for row in range(num_rows)}])


def apart(found):
    return not found.low <= 0 <= found.high


@pytest.mark.parametrize(
    ("num_seeds", "between", "of_seed"), [(1, 1.7, 0.0), (2, 1.7, 1.0), (3, 6.0, 3.0), (5, 6.0, 3.0)]
)
def test_rows_that_are_the_same_are_told_apart_in_one_of_twenty_pairs(num_seeds, between, of_seed):
    """Paired by seed. With one training a row the spread is that of other trainings of the kind."""
    generator, different = np.random.default_rng(1), []
    for _ in range(WORLDS):
        part, columns, spread = world(generator, 6, max(2, num_seeds), between, of_seed)
        rows = [{seed: row[seed] for seed in range(num_seeds)} for row in columns]
        different += [apart(part.contrast(rows[n], rows[n + 1], spread)) for n in (0, 2, 4)]
    assert np.mean(different) <= 0.075  # 0.05, and two standard errors of 402 pairs


def test_halves_of_a_rows_trainings_are_told_apart_in_one_of_twenty_pairs():
    """Without a seed in common: what a seed does to all rows counts in full."""
    generator, different = np.random.default_rng(2), []
    for _ in range(WORLDS):
        part, columns, spread = world(generator, 3, 4, 3.0, 2.0)
        halves = [[{seed: row[seed] for seed in half} for half in ([0, 1], [2, 3])] for row in columns]
        different += [apart(part.contrast(*half, spread)) for half in halves]
    assert np.mean(different) <= 0.075


def test_what_differs_is_told_apart_and_over_images_alone_what_does_not_differ():
    generator, found, same = np.random.default_rng(4), [], []
    for _ in range(50):
        part, columns, spread = world(generator, 6, 3, 1.7, 0.0)
        places = [part.models.index(name) for name in columns[0].values()]
        part.means[places] += 0.15
        part.samples[:, places] += 0.15
        found.append(part.contrast(*columns[:2], spread).low > 0)
        part, columns, _ = world(generator, 2, 2, 6.0, 0.0)
        same.append(apart(part.contrast(*columns)))
    assert np.mean(found) > 0.95 and np.mean(same) > 0.3
