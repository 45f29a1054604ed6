"""The one writer of bench results."""

import json

import pytest

from caprl_utils import bench, paths
from caprl_utils.errors import UserError


@pytest.fixture(autouse=True)
def reports(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)


def row(name, ours=2.0, **more):
    return {
        "name": name,
        "ours": ours,
        "baseline": 1.0,
        "ratio": ours,
        "goal": 1.5,
        "unit": "x/s",
        "n": 9,
    } | more


def test_rows_are_merged_by_name_with_the_machine():
    bench.record([row("b"), row("a")])
    bench.record([row("a", 1.0, extra="kept")])
    rows = json.loads(bench.results_file().read_text())
    assert [(r["name"], r["ours"]) for r in rows] == [("a", 1.0), ("b", 2.0)]
    assert rows[0]["extra"] == "kept" and "load" in rows[0]["machine"] and "commit" in rows[0]


def test_a_row_without_a_column_is_refused():
    with pytest.raises(ValueError, match="lacks goal"):
        bench.record([{k: v for k, v in row("a").items() if k != "goal"}])
    assert bench.read() == []


def test_a_damaged_file_is_named():
    bench.results_file().parent.mkdir(parents=True)
    bench.results_file().write_text("[{]")
    with pytest.raises(UserError, match=r"bench\.json is damaged"):
        bench.read()


def test_the_table_says_what_was_met():
    table = bench.table([row("fast"), row("slow", 1.0), row("other", ratio=None)]).splitlines()
    assert table[1].endswith("met") and table[2].endswith("MISSED") and table[3].endswith("x/s")


def test_every_bench_is_there_and_a_failure_does_not_stop_the_others(monkeypatch, capsys):
    import importlib

    for target in bench.BENCHES.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), target

    def fails():
        raise UserError("no model")

    monkeypatch.setattr("caprl_utils.models.bench.bench_client", fails)
    monkeypatch.setattr("caprl_utils.prism.bench.bench_bootstrap", lambda: row("bootstrap"))
    assert bench.main(["client", "bootstrap"]) == 1
    shown = capsys.readouterr()
    assert "bench client: no model" in shown.err and "bootstrap" in shown.out
    assert bench.main(["nothing"]) == 2
