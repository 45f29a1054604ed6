"""make trace: a printed cell names the record, value and command behind it."""

import json

import pytest

from caprl_utils import paths
from caprl_utils.reporting import trace
from caprl_utils.reporting.tables import Cell, Source, Table, json_text


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """A report of one table over one run record."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    run = tmp_path / "runs" / "mini" / "prism" / "caprl-seed0"
    run.mkdir(parents=True)
    record = {
        "profile": "mini", "stage": "prism", "name": "caprl-seed0", "key": "k" * 32,
        "values": {"benchmarks": {"mini-chart": {"mean": 0.5}}}, "n": 4, "unit": "question", "seeds": [0],
        "commit": "c" * 40, "dirty": False, "finished": "2026-11-23T00:00:00+00:00", "wall_sec": 1.0,
        "hashes": {"config": "a" * 16},
    }  # fmt: skip
    (run / "result.json").write_text(json.dumps(record))
    source = Source("runs/mini/prism/caprl-seed0/result.json", "values/benchmarks/mini-chart/mean")
    cells = [Cell("50.0", 0.5, None, (source,)), Cell("–")]
    table = Table("table3", "c", "Captioner", ["mini-chart", "mini-scene"], [("CapRL-3B", cells)])
    folder = tmp_path / "reports"
    folder.mkdir()
    (folder / "table3.json").write_text(json_text({"tables": [table.as_json()]}))
    return folder


def test_a_cell_is_found_by_words_of_its_row_and_column_and_tells_its_run(reports):
    (cell,) = trace.find("table3 caprl mini-chart", reports)
    told = trace.describe(cell)
    for part in ("holds    0.5", "mini/prism/caprl-seed0", "c" * 40, "make 05_prism_evaluation PROFILE=mini"):
        assert part in told


def test_missing_cells_have_no_trace(reports):
    assert trace.find("table3 caprl mini-scene", reports) == []


def test_an_unknown_report_is_named_with_those_that_are_there(reports):
    with pytest.raises(Exception, match=r"table9.*there are: table3"):
        trace.find("table9 caprl", reports)
