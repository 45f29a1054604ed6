"""Time is linear in the rows, and memory grows by the ids alone: a million rows fit in one gigabyte."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from bench_curation import QUESTIONS, measure

BENCHES = Path(__file__).parents[1] / "bench"


@pytest.mark.integration
@pytest.mark.timeout(3600)
def test_time_is_linear_and_a_million_rows_fit_in_a_gigabyte():
    small, large = 2000, 6000  # images; below, what is fixed (imports, buffers) hides what grows
    few, many = measure(small), measure(large)
    assert many["seconds"] / few["seconds"] < 1.5 * large / small
    gb_per_image = (many["peak_gb"] - few["peak_gb"]) / (large - small)  # `make bench` measures the million itself
    assert many["peak_gb"] + gb_per_image * (1_000_000 / QUESTIONS - large) < 1.0


def test_made_up_rows_stay_out_of_the_real_runs():
    env = {name: value for name, value in os.environ.items() if name != "CAPRL_RUNS"}
    command = [sys.executable, str(BENCHES / "bench_curation.py"), "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "CAPRL_RUNS" in done.stderr
