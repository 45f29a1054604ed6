"""Time is linear in the rows, and memory grows by the ids alone: a million rows fit in one gigabyte."""

import pytest

from caprl_utils.curation.bench import QUESTIONS, measure


@pytest.mark.integration
@pytest.mark.timeout(3600)
def test_time_is_linear_and_a_million_rows_fit_in_a_gigabyte():
    small, large = 400, 2000
    few, many = measure(small), measure(large)
    assert many["seconds"] / few["seconds"] < 1.5 * large / small
    gb_per_image = (
        max(0.0, many["peak_gb"] - few["before_gb"]) / large
    )  # `make bench` measures the million itself
    assert few["before_gb"] + gb_per_image * 1_000_000 / QUESTIONS < 1.0
