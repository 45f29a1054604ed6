"""make trace: a printed cell names the record, value and command behind it."""

import json

import pytest
from typer.testing import CliRunner

from caprl_utils import paths
from caprl_utils.__main__ import app
from caprl_utils.files import write_json
from caprl_utils.reports import numbers, trace
from caprl_utils.reports.numbers import Cell, Source, Table


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """A report of one table over one run record."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    record = {
        "profile": "mini", "stage": "prism", "name": "caprl-seed0", "key": "k" * 32,
        "values": {"benchmarks": {"mini-chart": {"mean": 0.5}}}, "n": 4, "unit": "question", "seeds": [0],
        "commit": "c" * 40, "dirty": False, "finished": "2026-11-23T00:00:00+00:00", "wall_sec": 1.0,
        "hashes": {"config": "a" * 16},
    }  # fmt: skip
    write_json(tmp_path / "runs" / "mini" / "prism" / "caprl-seed0" / "result.json", record)
    source = Source("runs/mini/prism/caprl-seed0/result.json", "values/benchmarks/mini-chart/mean")
    cells = [Cell("50.0", 0.5, None, (source,)), Cell("–")]
    table = Table("table3", "c", "Captioner", ["mini-chart", "mini-scene"], [("CapRL-3B", cells)])
    numbers.write(tmp_path / "reports" / "table3", {}, [table], "", [])
    return tmp_path / "reports"


def test_a_cell_is_found_by_words_of_its_row_and_column_and_tells_its_run(reports):
    (cell,) = trace.find("table3 caprl mini-chart", reports)
    told = trace.describe(cell)
    for part in ("holds    0.5", "mini/prism/caprl-seed0", "c" * 40, "make 04_prism_evaluation PROFILE=mini"):
        assert part in told
    assert trace.find("table3 caprl mini-scene", reports) == []  # nothing was measured there
    with pytest.raises(Exception, match=r"table9.*there are: table3"):
        trace.find("table9 caprl", reports)
    assert trace.command("mini", "rl", "rounds_8-seed0") == "caprl train rounds_8 --profile mini"


def test_the_command_tells_what_it_found_and_that_nothing_fits():
    runner = CliRunner()
    found = runner.invoke(app, ["trace", "table3 CapRL mini-chart"])
    assert found.exit_code == 0 and "run      mini/prism/caprl-seed0, key" in found.stdout
    told = str(runner.invoke(app, ["trace", "table3 nobody"]).exception)
    assert "no cell of reports/mini fits 'table3 nobody'. Rows: base, " in told
    assert "Columns: Mini Chart, " in told


def test_without_its_run_a_report_still_answers_and_a_new_run_under_its_name_is_told(reports):
    content = json.loads((reports / "table3.json").read_text())
    record_file = paths.RUNS / "mini" / "prism" / "caprl-seed0" / "result.json"
    record = json.loads(record_file.read_text())
    kept = {key: record[key] for key in ("key", "commit", "dirty", "seeds", "hashes")}
    content["runs"] = [{"file": "runs/mini/prism/caprl-seed0/result.json", **kept}]
    (reports / "table3.json").write_text(json.dumps(content))
    record_file.write_text(json.dumps(record | {"key": "n" * 32, "values": {}}))
    told = trace.describe(trace.find("table3 caprl mini-chart", reports)[0])
    assert "was made again since this report (now key nnnn" in told and f"key {'k' * 16}" in told
    record_file.unlink()
    told = trace.describe(trace.find("table3 caprl mini-chart", reports)[0])
    assert "is not here" in told and "c" * 40 in told and "config aaaa" in told


def test_every_cell_of_every_table_in_git_is_traced(monkeypatch, tmp_path):
    """From the reports alone: what a fresh clone, without runs/, can say of each printed number."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    cells = list(trace.cells_of(folder := paths.PAPER.parent / "mini"))
    assert {cell.name[0] for cell in cells} | {"examples"} == {file.stem for file in folder.glob("*.json")}  # captions
    assert len(cells) > 300 and all(cell.sources for cell in cells)
    for cell in {cell.name[:3]: cell for cell in cells}.values():  # one of each row
        told = trace.describe(cell)
        value = f"{cell.value:.12g}" if isinstance(cell.value, float) else cell.value
        assert f"value {value}\n" in told, told
        if any(source["file"].startswith("reports/paper/") for source in cell.sources):
            assert f"holds    {cell.text}: the paper's value as printed" in told, told
            continue
        assert "runs/mini/" in told and "not recorded" not in told, told
        for part in ("run      mini/", "commit   ", "data     ", "config   ", "command  "):
            assert f"    {part}" in told, told
    for cell in {cell.name[0]: cell for cell in cells}.values():  # each is found by its own words
        assert cell in trace.find(" ".join(cell.name), folder)
