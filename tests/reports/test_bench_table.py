"""The page of benches: targets apart from measured baselines, the machine once, three digits."""

import json

import pytest

from caprl_utils import paths
from caprl_utils.reports import bench_table


def row(name, ours=2.0, baseline=4.0, ratio=2.0, goal=1.0, machine="cpu, 2 cores, load 1.5"):
    return {"name": name, "ours": ours, "baseline": baseline, "ratio": ratio, "goal": goal, "unit": "s", "n": 2000,
            "machine": machine}  # fmt: skip


def test_a_machine_that_all_share_stands_once_above_the_table():
    text = bench_table.bench_markdown([row("a"), row("b", machine="cpu, 2 cores, load 0.3")])
    assert text.count("cpu, 2 cores") == 1 and "Machine: cpu, 2 cores;" in text
    assert "| a | 2.00 | measured 4.00 | lower | 2.00 | 1 | s | 2,000 | 1.5 |" in text and "| 0.3 |" in text


def test_different_machines_stand_in_their_rows():
    text = bench_table.bench_markdown([row("a"), row("b", machine="other, load 2.0")])
    assert "| cpu, 2 cores, load 1.5 |" in text and "| other, load 2.0 |" in text and "Machine: " not in text


def test_what_is_missing_is_a_dash():
    text = bench_table.bench_markdown([row("a", baseline=None, ratio=None, goal=None, machine="m")])
    assert "| a | 2.00 | – | – | – | – | s | 2,000 | – |" in text


@pytest.mark.parametrize(("ratio", "lower"), [(2.0, True), (0.5, False), (None, None)])
def test_which_way_a_unit_runs_is_read_from_the_ratio(ratio, lower):
    assert bench_table.lower_is_better(row("a", ratio=ratio)) is lower


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3972.3, "3,970"),
        (0.36161, "0.362"),
        (118.04, "118"),
        (6.504, "6.50"),
        (1e6, "1,000,000"),
        (0, "0"),
        (None, "–"),
    ],
)
def test_three_digits(value, text):
    assert bench_table.three_digits(value) == text


def test_every_target_is_the_start_of_a_bench_on_record_and_the_rest_was_measured():
    rows = json.loads((paths.REPORTS / "bench" / "bench.json").read_text(encoding="utf-8"))
    for start in bench_table.TARGETS:
        assert any(one["name"].startswith(start) for one in rows), start
    for one in rows:
        # a limit is a round number, a measurement is none
        assert bench_table.is_target(one) == (round(one["baseline"], 2) == one["baseline"]), one["name"]


def test_the_note_tells_which_client_carries_the_goal():
    assert "the usual way" in bench_table.bench_markdown([row("qa_sampled over vLLM, against x")])
    assert "the usual way" not in bench_table.bench_markdown([row("a")])
