import csv
import io

import pytest

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.reports.paper import paper_table
from caprl_utils.reports.tables import Cell, Source, Table, from_record_path, look_up, record_path


def make_table():
    source = Source("runs/mini/prism/x/result.json", "values/average")
    cells = [Cell("41.3", 0.4125, (0.38, 0.44), (source,)), Cell("–")]
    return Table("t", "A caption", "Model", ["Chart", "Tokens"], [("a|b", cells)], ["a note"])


def test_markdown():
    assert make_table().markdown() == (
        "**A caption**\n\n| Model | Chart | Tokens |\n| :--- | ---: | ---: |\n"
        "| a\\|b | 41.3 | – |\n\n- a note\n"
    )


def test_csv_holds_raw_values():
    rows = list(csv.DictReader(io.StringIO(make_table().csv())))
    assert rows[0]["value"] == "0.4125" and rows[0]["low"] == "0.38" and rows[0]["row"] == "a|b"
    assert rows[1]["value"] == ""  # missing is missing


def test_json_keeps_the_sources():
    cell = make_table().as_json()["rows"][0]["cells"][0]
    assert cell["sources"] == [{"file": "runs/mini/prism/x/result.json", "key": "values/average"}]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table("t", "c", "m", ["a", "b"], [("x", [Cell("1")])])


def test_a_cell_is_found_by_row_and_column():
    assert make_table().cell("a|b", "Chart").value == 0.4125
    with pytest.raises(KeyError, match="Chart"):
        make_table().cell("a|b", "Charts")


def test_record_paths_do_not_depend_on_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    file = tmp_path / "mini" / "prism" / "x" / "result.json"
    assert record_path(file) == "runs/mini/prism/x/result.json"
    assert from_record_path(record_path(file)) == file


def test_look_up():
    record = {"values": {"a/b": 1, "list": [{"x": 2}]}}
    assert look_up(record, "values/list/0/x") == 2
    with pytest.raises(KeyError, match="no 'y'"):
        look_up(record, "values/y")


def test_the_papers_table_and_its_odd_averages():
    table = paper_table("table3_prism.csv", "Paper", ("caption_model",))
    assert table.cell("CapRL-3B", "Average").text == "48.3"
    assert [note.split(":")[0] for note in table.notes] == ["Qwen2.5-VL-72B", "CapRL-3B"]


def test_a_missing_paper_table_is_named():
    with pytest.raises(UserError, match=r"reports/paper/table9\.csv"):
        paper_table("table9.csv", "Paper", ("caption_model",))
