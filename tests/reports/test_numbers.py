import csv
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from caprl_utils.reports import numbers
from caprl_utils.reports.numbers import Cell, Source, Table

shares = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 6))


def test_values_keep_their_difference_from_others_from_0_and_from_100_and_differences_their_sign():
    half_up = {0.4125: "41.3", 0.41: "41.0", 0.0: "0.0", 1.0: "100.0", 0.1 + 0.2: "30.0", None: "–"}
    shown = half_up | {0.9996: "99.96", 0.0004: "0.04"}
    assert {value: numbers.percent(value) for value in shown} == shown
    assert numbers.percents([0.65604, 0.656, 0.701]) == ["65.604", "65.600", "70.1"]
    assert numbers.percents([0.5, 0.5, None]) == ["50.0", "50.0", "–"]
    assert numbers.percents([1 / 3, 1 / 3 + 1e-14]) == ["33.3", "33.3"]
    assert numbers.numbers([61.21, 61.24]) == ["61.21", "61.24"] and numbers.number(61.25) == "61.3"
    shown = {0.213: "+21.3", -0.004: "-0.4", 0.0: "0.0", 0.0002: "+0.02", -0.0002: "-0.02"}
    assert {value: numbers.differences([value])[0] for value in shown} == shown


def test_intervals_p_values_and_counts():
    assert numbers.interval((0.38, 0.443)) == "[38.0, 44.3]" and numbers.interval(None) == "–"
    assert numbers.interval((-0.0003, 0.05), signed=True) == "[-0.03, +5.0]"
    shown = {0.0001: "p < 0.001", 0.0123: "p = 0.012", 1.0: "p = 1.000"}
    assert {p: numbers.p_value(p) for p in shown} == shown and numbers.count(10000) == "10,000"


@settings(deadline=None, max_examples=30)
@given(st.lists(shares, min_size=2, max_size=8))
def test_order_and_difference_survive_formatting(values):
    texts = numbers.percents(values)
    for a, text_a in zip(values, texts, strict=True):
        for b, text_b in zip(values, texts, strict=True):
            assert (text_a == text_b) == (a == b)
            if a < b:
                assert float(text_a) < float(text_b)
        assert abs(float(text_a) - 100 * a) <= 0.05 + 1e-9


def test_a_table_as_markdown_csv_and_json(tmp_path):
    source = Source("runs/mini/prism/x/result.json", "values/average")
    cells = [Cell("41.3", 0.4125, (0.38, 0.44), (source,)), Cell("–")]
    table = Table("t", "A caption", "Model", ["Chart", "Tokens"], [("a|b", cells)], ["a note"])
    lines = "| Model | Chart | Tokens |\n| :--- | ---: | ---: |\n| a\\|b | 41.3 | – |"
    assert table.markdown() == f"**A caption**\n\n{lines}\n\n- a note\n"
    content = numbers.write(tmp_path / "t", {}, [table], "text", [])
    first, second = csv.DictReader((tmp_path / "t.csv").read_text().splitlines())
    assert (first["value"], first["low"], first["row"]) == ("0.4125", "0.38", "a|b")
    assert second["value"] == ""  # missing is missing
    assert numbers.read(tmp_path / "t.json") == json.loads(json.dumps(content)) and not numbers.read(
        tmp_path / "u.json"
    )
    (found,) = numbers.look_up(content, "tables/0/rows/0/cells/0/sources")
    assert found == {"file": "runs/mini/prism/x/result.json", "key": "values/average"}
    assert numbers.look_up({"pairs": [{"good / bad": 0.5}]}, "pairs/0/good / bad") == 0.5
