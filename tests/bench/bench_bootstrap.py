"""Seconds of the bootstrap behind all intervals and differences of a table."""

from time import perf_counter
from typing import Any

import harness
import numpy as np

from caprl_utils.prism.benchmarks import benchmarks_of_table
from caprl_utils.prism.statistics import bootstrap, macro_average

GOAL_SEC = 5.0
DRAWS = 10_000
MODELS = [f"model {number}" for number in range(6)]


def rows() -> list[dict[str, Any]]:
    """All intervals and differences of the paper's benchmarks (their real sizes) and six models."""
    generator, tables = np.random.default_rng(0), {}
    for facts in benchmarks_of_table(3):
        count = facts.size.get("rows") or facts.size.get("about") or 1000
        count = min(count, 2_000) if facts.key == "seed2k" else count
        hits = generator.binomial(4, 0.5, size=(count, len(MODELS)))  # of four captions
        tables[facts.key] = (hits / 4, np.arange(count))
    start = perf_counter()
    parts = {key: bootstrap(hits, images, MODELS, DRAWS, seed=0) for key, (hits, images) in tables.items()}
    for table in (*parts.values(), macro_average(parts)):
        for model in MODELS:
            table.interval(model)
            table.difference(model, MODELS[0])
    seconds, name = perf_counter() - start, f"bootstrap, {len(tables)} benchmarks x {len(MODELS)} models"
    return [harness.row(name, seconds, GOAL_SEC, 1.0, "s", DRAWS, lower=True, target=True)]
