"""Statistics against hand calculations and scipy."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from caprl_utils.errors import UserError
from caprl_utils.prism import statistics
from caprl_utils.prism.statistics import best_of_n, bootstrap_models, holm


def bootstrap(scores, clusters, models, draws=5, seed=0):
    return statistics.bootstrap(np.reshape(scores, (-1, len(models))), clusters, models, draws, seed)


def test_the_interval_is_scipys_and_rows_of_an_image_move_together():
    found = bootstrap([[1.0], [0.0], [1.0], [1.0]], ["a", "a", "b", "c"], ["m"], 500).interval("m")
    assert found.value == 0.75 and found.low <= 0.75 <= found.high and found.num_clusters == 3
    values = np.random.default_rng(1).random(200)
    ours = bootstrap(values, np.arange(200), ["m"], 4000).interval("m")
    how = {"method": "percentile", "n_resamples": 2000, "rng": np.random.default_rng(2)}
    theirs = stats.bootstrap((values,), np.mean, **how).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    copied = bootstrap(np.repeat(values, 10), np.repeat(np.arange(200), 10), ["m"], 4000).interval("m")
    assert (copied.low, copied.high) == pytest.approx((ours.low, ours.high), abs=0.006)  # ten copies narrow nothing
    one, two, other = (bootstrap(values, range(200), ["m"], 50, seed).samples for seed in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_differences_are_paired_and_without_one_p_is_not_small_too_often():
    base = np.random.default_rng(4).random(300)
    found = bootstrap(np.column_stack([base, base + 0.1]), np.arange(300), ["a", "b"], 1000)
    difference = found.difference("b", "a")
    assert (difference.low, difference.high) == pytest.approx((0.1, 0.1))
    assert difference.p_value == pytest.approx(2 / 1001)
    assert found.difference("a", "a").p_value == 1.0
    generator = np.random.default_rng(5)
    tables = [generator.normal(size=(80, 2)) for _ in range(60)]
    parts = [bootstrap(table, range(80), ["a", "b"], 400, seed) for seed, table in enumerate(tables)]
    low = sum(part.difference("a", "b").p_value < 0.05 for part in parts)
    assert low <= 10  # 3 expected; 10 is beyond the 99.9 % point


def test_models_of_the_same_samples_are_compared_and_averages_count_benchmarks_the_same():
    base = {"b": {(f"i{n}", f"s{n}-{q}"): float(n % 2) for n in range(20) for q in range(2)}}
    parts = bootstrap_models({"base": base, "better": {"b": dict.fromkeys(base["b"], 1.0)}, "same": base}, 2000, 0)
    gap = parts["b"].difference("better", "base")
    assert gap.value == pytest.approx(0.5) and gap.low > 0.2 and gap.num_clusters == 20
    assert parts["average"].difference("better", "base").value == pytest.approx(0.5)
    assert parts["b"].difference("same", "base").low == 0.0
    big, small = ({(f"i{n}", "s"): value for n in range(count)} for count, value in ((90, 1.0), (10, 0.0)))
    average = bootstrap_models({"a": {"big": big, "small": small}}, 100, 0)["average"]
    assert average.means.tolist() == [0.5] and (average.num_clusters, average.num_rows) == (100, 100)
    with pytest.raises(UserError, match="a and b were not scored on the same samples"):
        bootstrap_models({"a": {"b": {("i", "s"): 1.0}}, "b": {"b": {("i", "other"): 1.0}}}, 100, 0)


def test_holm_variance_and_the_pooled_spread_by_hand():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({}) == {} and holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    items, captions = statistics.variance_components([[0.0, 1.0], [1.0, 1.0]])
    assert (items, captions) == pytest.approx((0.0, 0.25))  # 0.125 between items, all of it from captions
    items, captions = statistics.variance_components(np.random.default_rng(8).random((20, 1)))
    assert captions is None and items > 0
    # two rows, two seeds: within rows 2 and 8 of squares; the seeds' own part leaves half a square of 1 each
    rows = {"a": {0: 0.0, 1: 2.0}, "b": {0: 5.0, 1: 9.0}, "c": {0: 7.0}}
    assert statistics.pooled([rows]) == pytest.approx(((2 + 8) / 2, 2, 1.0, 1))
    assert statistics.pooled([rows, rows]) == pytest.approx((5.0, 4, 1.0, 2))  # blocks add up
    assert statistics.pooled([{"a": {0: 0.0, 1: 2.0}}]) == pytest.approx((2.0, 1, 2.0, 1))
    assert statistics.pooled([{"a": {0: 1.0}}, {}]) is None


def test_the_t_interval_agrees_with_scipy_and_ends_at_the_null_where_p_is_005():
    values = np.array([0.1, 0.3, 0.2, 0.5, 0.4])
    found, theirs = statistics.t_interval(values.mean(), 0.0, values.var(ddof=1) / 5, 4), stats.ttest_1samp(values, 0.0)
    assert found == pytest.approx((*theirs.confidence_interval(0.95), theirs.pvalue))
    low, high, _ = statistics.t_interval(0.2, 0.01, 0.02, 3)
    assert statistics.t_interval(0.2, 0.01, 0.02, 3, null=low, side=1)[2] == pytest.approx(0.05)
    assert statistics.t_interval(0.2, 0.01, 0.02, 3, null=high, side=-1)[2] == pytest.approx(0.05)
    assert all(statistics.t_interval(0.2, 0.01, 0.02, 3, null=low, side=side)[2] <= 1 for side in (0, 1, -1))
    assert statistics.t_interval(0.0, 0.0, 0.0, 3)[2] == 1.0


def rows_of(trainings):
    """Columns of rows, with each image's score of each training: (rows, seeds, images)."""
    rows, seeds, images = trainings.shape
    part = bootstrap(trainings.reshape(rows * seeds, images).T, range(images), [*map(str, range(rows * seeds))], 300)
    columns = [{s: str(r * seeds + s) for s in range(seeds)} for r in range(rows)]
    return part, columns, statistics.pooled([{r: dict(enumerate(trainings[r].mean(axis=1))) for r in range(rows)}])


def test_contrasts_pair_by_seed_and_by_image():
    generator = np.random.default_rng(9)
    trainings = generator.normal(size=(3, 3, 40))
    part, (a, b, c), spread = rows_of(trainings)
    found, differences = part.contrast(a, b, spread), trainings[0] - trainings[1]
    assert found.value == pytest.approx(differences.mean()) and found.trainings == 3
    within = differences.mean(axis=0).var() / 40
    expected = statistics.t_interval(found.value, within, 2 * spread.paired / 3, spread.paired_df)
    assert (found.low, found.high, found.p_value) == pytest.approx(expected, abs=0.05)
    alone = {7: a[0]}  # no seed in common with b: both means, not paired by seed
    value = trainings[0, 0].mean() - trainings[1].mean()
    assert part.contrast(alone, b, spread).value == pytest.approx(value)
    only = part.contrast({0: a[0]}, b, spread)  # one seed in common: that alone is compared
    assert only.value == pytest.approx(differences[0].mean()) and only.trainings == 1
    base = part.contrast(a, {None: c[0]}, spread)  # not trained: the same at every seed
    assert base.value == pytest.approx(trainings[0].mean() - trainings[2, 0].mean()) and base.trainings == 3
    assert part.contrast({None: a[0]}, {None: b[0]}, spread).trainings is None
    assert part.contrast(a, b, None).low == part.contrast(a, b).low  # without a spread over images alone
    many, (a, b), spread = rows_of(generator.normal(size=(2, 5, 40)))
    assert many.contrast(a, b, spread) == many.contrast(a, b)  # from five on the comparison's own


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_best_of_n_is_the_mean_over_all_subsets(scores):
    assert best_of_n([1, 0, 0, 1, 0], 2) == pytest.approx(1 - 3 / 10)  # pass@k
    for n in range(1, len(scores) + 1):
        subsets = [max(subset) for subset in combinations(scores, n)]
        assert best_of_n(scores, n) == pytest.approx(sum(subsets) / len(subsets))
