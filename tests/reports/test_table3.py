import json

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.reports import captioners, claims, report3, table3
from caprl_utils.reports.results import load
from caprl_utils.reports.tables import from_record_path, look_up
from caprl_utils.runs import load_result


def test_rows_values_and_differences(finished):
    results = load(finished)
    table = table3.scores_table(results, bounds=False)
    assert [label for label, _ in table.rows] == ["3B (base)", "72B", "CapRL-3B"]
    assert table.columns == ["Mini Chart", "Mini Scene", "Average", "Caption tokens"]
    cell = table.cell("CapRL-3B", "Mini Chart")
    assert cell.value == pytest.approx(0.7) and cell.text.startswith("70.0 [")
    assert cell.interval[0] < 0.7 < cell.interval[1]
    assert table.cell("CapRL-3B", "Caption tokens").text == "40.0"
    gaps = table3.differences_table(results)
    assert [label for label, _ in gaps.rows] == ["CapRL-3B − 3B (base)", "CapRL-3B − 72B"]
    gap = gaps.cell("CapRL-3B − 3B (base)", "Average")
    assert gap.value == pytest.approx(0.3) and gap.interval[0] > 0 and gap.text.startswith("+30.0 [+")
    bounds = table3.scores_table(results, bounds=True)
    assert [label for label, _ in bounds.rows] == ["floor: empty caption"]


def test_every_number_is_in_the_record_that_its_cell_names(finished):
    results = load(finished)
    for table in (table3.scores_table(results, False), table3.scores_table(results, True)):
        for _, cells in table.rows:
            for cell in cells:
                (source,) = cell.sources
                assert look_up(load_result(from_record_path(source.file)), source.key) == cell.value


def test_the_interval_is_that_of_the_run_record(finished):
    results = load(finished)
    record = results.measured["CapRL-3B"].records[0]
    interval = results.interval("CapRL-3B", "mini-chart")
    assert [interval.low, interval.high] == record["intervals"]["mini-chart"]


def test_the_report_is_the_same_for_the_same_results(finished, tmp_path):
    for name in ("one", "two"):
        report3.write(finished, tmp_path / name)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == [
        "table3.csv", "table3.json", "table3.md", "table3_curves.png", "table3_curves.svg",
        "table3_dots.png", "table3_dots.svg",
    ]  # fmt: skip
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = (tmp_path / "one" / "table3.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "supported (+30.0 points" in text and "Qwen2.5-VL-72B" in text
    assert "the printed average 48.3 lies 0.073 away from the mean of the printed entries" in text
    assert "All captioners have 2.1 million parameters" in text
    assert "40 questions about 40 images in each of the 2 benchmarks" in text and "(r, mode choice)" in text
    content = json.loads((tmp_path / "one" / "table3.json").read_text(encoding="utf-8"))
    assert content["facts"]["verdict"] == "supported" and content["runs"][0]["key"]
    assert str(tmp_path) not in json.dumps(content)


def test_several_training_seeds_are_averaged(finished, prism_run, rl_run):
    two = load_profile("mini", {"rl.seeds": [0, 1], "prism.bootstrap_draws": 500})
    with pytest.raises(UserError, match="CapRL-3B: 1 of 2 training seeds"):
        load(two)
    prism_run(two, "caprl-seed1", right=16)
    rl_run(two, seed=1)
    cell = table3.scores_table(load(two), False).cell("CapRL-3B", "Average")
    assert cell.value == pytest.approx(0.75) and len(cell.sources) == 2
    assert [curve.label for curve in report3.training_curves(two, [0, 1])] == [
        "CapRL, seed 0",
        "CapRL, seed 1",
    ]


def test_the_table_says_what_was_not_evaluated(profile, prism_run, rl_run, tmp_path):
    two = load_profile("mini", {"rl.seeds": [0, 1], "prism.bootstrap_draws": 500})
    prism_run(two, "base-3b", right=8)
    prism_run(two, "caprl-seed1", right=14)
    rl_run(two, seed=1)
    content = report3.write(two, tmp_path / "out")
    first = content["tables"][0]
    assert [row["label"] for row in first["rows"]] == ["3B (base)", "CapRL-3B"]
    assert first["notes"][0].startswith(
        "Not evaluated, so not in the tables: 7B (base-7b); 72B (base-72b); Unified"
    )
    assert first["notes"][1] == (
        "CapRL-3B is averaged over 1 of 2 training seeds; not evaluated: caprl-seed0."
    )
    assert content["facts"]["training_seeds"] == [1]
    assert "judge_vlm-seed0" in (tmp_path / "out" / "table3.md").read_text(encoding="utf-8")


def test_a_missing_run_is_named_with_its_command(profile, prism_run):
    prism_run(profile, "base-3b", right=8)
    with pytest.raises(UserError, match=r"no Prism result of CapRL-3B .* make 05_prism_evaluation"):
        load(profile)


def test_a_missing_curve_writes_nothing(profile, prism_run, tmp_path):
    prism_run(profile, "base-3b", right=8)
    prism_run(profile, "caprl-seed0", right=14)
    with pytest.raises(UserError, match="no training curve"):
        report3.write(profile, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_that_disagrees_with_its_rows_is_refused(finished):
    file = paths.RUNS / "mini" / "prism" / "base-3b" / "result.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["values"]["benchmarks"]["mini-chart"]["mean"] = 0.9
    file.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match=r"says 0\.4"):
        table3.scores_table(load(finished), bounds=False)


def test_smoke_stays_out_of_reports(profile, tmp_path):
    with pytest.raises(UserError, match="smoke does not write"):
        report3.write(load_profile("smoke"), paths.REPORTS / "mini")


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.01, 0.1, "supported"), (-0.1, -0.01, "not supported"), (-0.1, 0.1, "undecided")],
)
def test_verdict(low, high, word):
    assert claims.verdict(low, high) == word


def test_captions_of_equal_length_are_compared_alone(profile, prism_run):
    prism_run(profile, "base-3b", right=8, tokens=20)
    prism_run(profile, "caprl-seed0", right=14, tokens=21)
    table = table3.matched_table(load(profile))
    cell = table.cell("CapRL-3B − 3B (base)", "Average")
    assert cell.value == pytest.approx(0.3) and cell.text.endswith("160 pairs")
    assert "100.0 % of the captions" in table.notes[0]


def test_an_interval_needs_ten_pairs(profile, prism_run, monkeypatch):
    prism_run(profile, "base-3b", right=8, tokens=20)
    prism_run(profile, "caprl-seed0", right=14, tokens=21)
    monkeypatch.setattr(table3, "LEAST_PAIRS", 81)
    table = table3.matched_table(load(profile))
    for column in ("Mini Chart", "Average"):  # an average over benchmarks without intervals has none either
        cell = table.cell("CapRL-3B − 3B (base)", column)
        assert cell.interval is None and cell.text in ("+30.0, 80 pairs", "+30.0, 160 pairs")


def test_without_equal_lengths_there_is_no_such_number(finished):
    cell = table3.matched_table(load(finished)).cell("CapRL-3B − 3B (base)", "Mini Chart")
    assert cell.value is None and cell.text == "–"


def test_best_of_n_stands_apart(finished):
    table = table3.best_table(load(finished))
    assert table.columns == ["Mean", "Best of 2"]
    assert table.cell("72B", "Best of 2").value == pytest.approx(0.9)


def test_variance_by_source(finished):
    table = table3.variance_table(load(finished))
    cell = table.cell("CapRL-3B", "Between questions")
    assert cell.value == pytest.approx((0.7 * 0.3 * 80 / 79) ** 0.5)  # 80 questions, 70 % right
    assert table.cell("CapRL-3B", "Between captions").value == 0.0  # both captions score the same
    assert table.cell("CapRL-3B", "Between training seeds").text == "–"


def test_two_trainings_that_differ_by_no_more_than_chance_are_no_zero(finished, prism_run):
    prism_run(finished, "caprl-seed1", right=14)
    two = finished.model_copy(update={"rl": finished.rl.model_copy(update={"seeds": [0, 1]})})
    table = table3.variance_table(load(two))
    cell = table.cell("CapRL-3B", "Between training seeds")
    assert (cell.text, cell.value) == ("not above the noise (2 trainings)", 0.0)
    assert table.notes[1] == (
        "Averages of the trainings of CapRL-3B: 70.0 (caprl-seed0), 70.0 (caprl-seed1)."
    )


def test_captions_cut_to_the_bases_length_are_compared_with_it(finished, prism_run):
    prism_run(finished, "caprl-seed0-cut", right=10)
    table = table3.differences_table(load(finished))
    cell = table.cell("CapRL-3B cut to the base's length − 3B (base)", "Average")
    assert cell.value == pytest.approx(0.1) and ", p" in cell.text


def test_what_the_captioners_of_the_mini_world_are_is_what_their_records_say():
    folders = {name: paths.zoo_folder(f"zoo:vlm-{name}") for name in ("3b", "7b", "72b")}
    records = {name: json.loads((folder / "record.json").read_text()) for name, folder in folders.items()}
    assert records["3b"]["starts_from"] == records["7b"]["starts_from"] == "vlm-72b"
    assert len({record["parameters"] for record in records.values()}) == 1
    assert "2.1 million parameters" in captioners.note(load_profile("mini"))
    assert captioners.note(load_profile("paper")) is None


def test_smallest_difference_that_the_images_can_show(finished):
    # 12 of 40 images differ by 1: sd 0.464; (1.96 + 0.84) * 0.464 / sqrt(40)
    assert table3.detectable_difference(load(finished), "mini-chart") == pytest.approx(0.2056, abs=1e-3)


def test_one_of_two_seeds_makes_a_table_where_that_is_asked_for(finished):
    both = finished.model_copy(update={"rl": finished.rl.model_copy(update={"seeds": [0, 1]})})
    found = load(both, some_seeds=True)
    assert found.training_seeds == [0] and found.missing["CapRL-3B"] == ["caprl-seed1"]
    with pytest.raises(
        UserError, match="1 of 2 training seeds were evaluated; make the rest: make reproduce"
    ):
        load(both)
