"""The harness of the benches, and the one page of results."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from caprl_utils import paths
from caprl_utils.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))  # the benches import each other as programs do
import harness


@pytest.fixture(autouse=True)
def reports(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)


def row(name="x", ours=2.0, baseline=1.0, goal=1.5, **more):
    return harness.row(name, ours, baseline, goal, "x/s", 2000, **more)


def test_each_way_has_its_turn_in_each_round_with_work_of_its_own():
    seen = []
    ways = {name: lambda work, name=name: seen.append((name, work)) or float(len(seen)) for name in "ab"}
    found = harness.side_by_side(ways, lambda turn, number: (turn, number), rounds=2)
    assert seen == [("a", (0, 0)), ("b", (0, 1)), ("a", (1, 2)), ("b", (1, 3))]
    assert found == {"a": [1.0, 3.0], "b": [2.0, 4.0]}


def test_the_median_of_the_rounds_counts_and_the_ratio_says_how_much_better():
    several = row(ours=[1.0, 9.0, 3.0], baseline=[2.0, 2.0, 9.0])
    assert (several["ours"], several["baseline"], several["ratio"]) == (3.0, 2.0, 1.5)
    assert several["all"]["ours"] == [1.0, 9.0, 3.0]
    assert row(ours=2.0, baseline=8.0, lower=True)["ratio"] == 4.0
    assert row(ours=0.0, lower=True)["ratio"] is None


def test_rows_are_merged_by_name_on_one_page_that_says_what_was_met():
    harness.record([row("b"), row("a", goal=None), row("slow", 1.0)])
    harness.record([row("a", 3972.3, 1.0, lower=True, target=True, goal=None)])
    file = paths.REPORTS / "bench" / "bench.json"
    rows = json.loads(file.read_text())
    assert [(r["name"], r["ours"]) for r in rows] == [("a", 3972.3), ("b", 2.0), ("slow", 1.0)]
    assert "load" in rows[0]["machine"] and "commit" in rows[0]
    page = file.with_suffix(".md").read_text()
    assert "| a | 3,970 | target 1 | lower |" in page and "1.5, missed |" in page
    assert "| b | 2.00 | measured 1.00 | higher | 2.00 | 1.5, met |" in page
    digits = {0.36161: "0.362", 6.504: "6.50", 1e6: "1,000,000", None: "–"}
    assert {value: harness.three_digits(value) for value in digits} == digits
    file.write_text("[{]")
    with pytest.raises(UserError, match=r"bench\.json is damaged"):
        harness.record([row()])


def test_every_bench_is_there_and_a_failure_does_not_stop_the_others(monkeypatch, capsys):
    modules = {name: importlib.import_module(f"bench_{name}") for name in harness.BENCHES}
    assert all(callable(module.rows) for module in modules.values())

    def fails():
        raise UserError("no model")

    monkeypatch.setattr(modules["client"], "rows", fails)
    monkeypatch.setattr(modules["bootstrap"], "rows", lambda: [row("bootstrap")])
    assert harness.main(["client", "bootstrap"]) == 1
    shown = capsys.readouterr()
    assert "bench client: no model" in shown.err and "bootstrap" in shown.out
    assert harness.main(["nothing"]) == 2


def test_halves_of_a_rows_trainings_are_each_compared_once():
    splits = importlib.import_module("bench_same_twice").splits
    assert list(splits([0, 1])) == [((0,), (1,))]
    assert len(list(splits([0, 1, 2]))) == 3 and len(list(splits([0, 1, 2, 3]))) == 3
    assert len(list(splits(range(6)))) == 10
