"""Table 3 from runs with known scores: values, differences, floors, equal length, best of n, variance, seeds."""

import json

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.prism import probes
from caprl_utils.reports import page, tables
from caprl_utils.reports.numbers import from_record_path, look_up
from caprl_utils.runs import load_result
from tests.reports.finished import MINI, evaluation, row

PAIR = "CapRL − base"


def test_rows_values_differences_best_of_n_and_variance(finished, results_of, cell):
    results = results_of(finished)
    table, bounds = tables.scores_table(results), tables.scores_table(results, bounds=True)
    assert list(dict(table.rows)) == ["base", "strong captioner", "CapRL"]
    assert list(dict(bounds.rows)) == ["floor: empty caption"]
    assert table.columns == ["Mini Chart", "Mini Scene", "Average", "Caption tokens"]
    found = cell(table, "CapRL", "Mini Chart")
    assert found.value == pytest.approx(0.7) and found.text.startswith("70.0 [")
    record = load_result(paths.RUNS / "mini/prism/caprl-seed0")
    assert list(found.interval) == pytest.approx(record["intervals"]["mini-chart"], abs=0.02)
    record = load_result(paths.RUNS / "mini/prism/base-3b")
    assert list(cell(table, "base", "Mini Chart").interval) == record["intervals"]["mini-chart"]
    assert cell(table, "CapRL", "Caption tokens").text == "40.0"
    for each in (each for _, cells in (*table.rows, *bounds.rows) for each in cells):
        found = [look_up(load_result(from_record_path(source.file)), source.key) for source in each.sources]
        assert sum(found) / len(found) == each.value  # every number is in the record that its cell names
    gaps = tables.gaps_table(results)
    assert list(dict(gaps.rows)) == [PAIR, "CapRL − strong captioner"]
    gap = cell(gaps, PAIR, "Average")
    assert gap.value == pytest.approx(0.3) and gap.interval[0] > 0 and gap.text.startswith("+30.0 [+")
    best, variance = tables.best_table(results), tables.variance_table(results)
    assert best.columns == ["Mean", "Best of 2"]
    assert cell(best, "strong captioner", "Best of 2").value == pytest.approx(0.9)
    found = cell(variance, "CapRL", "Between questions")
    assert found.value == pytest.approx((0.7 * 0.3 * 80 / 79) ** 0.5)  # 80 questions, 70 % right
    assert cell(variance, "CapRL", "Between captions").value == 0.0  # both captions score the same


def test_the_report_is_the_same_for_the_same_results(finished, tmp_path, no_figures, report):
    content, folder = tables.write(finished, "table3"), paths.reports_of("mini")
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(first) == {f"table3{end}" for end in ("_curves.svg", "_dots.svg", ".csv", ".json", ".md")}
    tables.write(finished, "table3")
    assert first == {file.name: file.read_bytes() for file in folder.iterdir()}
    text = report("table3.md")
    parts = ["**supported** | +30.0 points", "Qwen2.5-VL-72B", "(r, mode choice)", "in each of the 2 benchmarks"]
    parts.append("the printed average 48.3 lies 0.073 away from the mean of the printed entries")
    assert [part for part in parts if part not in text] == []
    assert content["facts"]["claims"][0]["verdict"] == "supported" and content["runs"][0]["key"]
    assert str(tmp_path) not in text + json.dumps(content)


def test_what_has_no_score_is_a_dash_and_stays_out_of_averages(finished, prism_run, cell, results_of):
    """A benchmark that nobody could score, and a sample that one captioner has no score for."""
    three = ("mini-chart", "mini-scene", "mini-document")
    for name, right in (("base-3b", 8), ("caprl-seed0", 14), ("base-72b", 18), ("floor-empty", 1)):
        lost = {("mini-chart", 0)} if name == "base-72b" else set()
        prism_run(name, right, benchmarks=three, unscored={"mini-document", *lost})
    results = results_of(finished)
    scores, gaps = tables.scores_table(results), tables.gaps_table(results)
    assert scores.columns[:4] == ["Mini Chart", "Mini Scene", "Mini Document", "Average"]
    for table, label in ((scores, "CapRL"), (gaps, PAIR)):
        missing = cell(table, label, "Mini Document")
        assert missing.text == "–" and missing.value is None
    assert cell(scores, "CapRL", "Mini Chart").value == pytest.approx(27 / 39)
    assert cell(scores, "CapRL", "Average").value == pytest.approx((27 / 39 + 0.7) / 2)
    assert cell(gaps, PAIR, "Mini Scene").value == pytest.approx(0.3)
    assert scores.notes[-2:] == [
        "Without scores, and not in the average: Mini Document.",
        "Samples that some row has no score for are left out of all: 1 of Mini Chart.",
    ]


def test_trainings_are_averaged_and_how_much_they_differ_is_in_the_intervals(
    finished, trained, results_of, cell, with_seeds
):
    """70 and 80 % with two seeds, no other row with several: SD 7.07 on one degree of freedom."""
    trained("caprl", 16, seeds=[2])
    same, other, one = (results_of(with_seeds(finished, *seeds)) for seeds in ((0, 1), (0, 2), (0,)))
    found = cell(tables.scores_table(other), "CapRL", "Average")
    assert found.value == pytest.approx(0.75) and len(found.sources) == 2
    assert [curve.label for curve in tables.curves_of(other)] == ["CapRL, seed 0", "CapRL, seed 2"]
    note = tables.variance_table(other).notes[1]
    assert note == "Averages of the trainings of CapRL: 70.0 (caprl-seed0), 80.0 (caprl-seed2)."
    wide, narrow = (cell(tables.gaps_table(results), PAIR, "Average") for results in (other, same))
    assert wide.value == pytest.approx(0.35) and narrow.value == pytest.approx(0.3)
    assert wide.interval[1] - wide.interval[0] > 1.8 * (narrow.interval[1] - narrow.interval[0])
    note = tables.gaps_table(other).notes[-1]
    told = ("over the 1 rows of reinforcement learning", "varies by 7.1 points", "1 degrees of freedom")
    assert [part for part in told if part not in note] == []
    assert tables.gaps_table(one).notes[-1].startswith("No row has two trainings: intervals are over images alone")


def test_the_table_says_what_was_not_evaluated(profile, prism_run, trained, no_figures):
    prism_run("base-3b", right=8)
    trained("caprl", 14, seeds=[1])
    content = tables.write(profile, "table3")
    first, facts = content["tables"][0], content["facts"]
    in_paper, _, gone, short = first["notes"]
    assert [row["label"] for row in first["rows"]] == ["base", "CapRL"]
    assert in_paper.startswith("In the paper: base: Qwen2.5-VL-3B; mid captioner: Qwen2.5-VL-7B; ")
    assert gone.startswith("Not evaluated, so not in the tables: mid captioner (base-7b); strong captioner (base-72b);")
    assert short == "CapRL is averaged over 1 of 2 training seeds; not evaluated: caprl-seed0."
    assert facts["training_seeds"]["CapRL"] == [1] and facts["missing"]["CapRL"] == ["caprl-seed0"]
    verdict = {key: facts["claims"][0][key] for key in ("verdict", "reason", "trainings")}
    assert verdict == {"verdict": "undecided", "reason": "one training", "trainings": [1, 0]}


def test_a_missing_run_a_missing_curve_and_a_record_unlike_its_rows_are_named(profile, prism_run, trained, results_of):
    prism_run("base-3b", right=8)
    with pytest.raises(UserError, match="table3 needs prism/caprl-seed0, prism/caprl-seed1; make them: make table3"):
        tables.write(profile, "table3")
    trained("caprl", right=14)
    (paths.RUNS / "mini" / "rl" / "caprl-seed0" / "curve.jsonl").unlink()
    with pytest.raises(UserError, match="no training curve"):
        tables.write(profile, "table3")
    assert not list(paths.RUNS.rglob("*.md"))
    file = paths.RUNS / "mini" / "prism" / "base-3b" / "result.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["values"]["benchmarks"]["mini-chart"]["mean"] = 0.9
    file.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match=r"says 0\.4"):
        tables.scores_table(results_of(profile))


def test_captions_are_compared_at_equal_length(finished, prism_run, results_of, cell, no_figures):
    for name, right in (("base-3b", 6), ("caprl-seed0", 9)):
        prism_run(f"{name}-first-16", right, tokens=16.0)
    prism_run("base-3b-joined", right=11, tokens=39.0)
    results = results_of(finished)
    table = tables.budget_table(results)
    assert table.columns == ["First 16 tokens", "Whole captions"] and "39.0" in table.notes[0]
    joined = "control: base captions joined, up to CapRL's length"
    assert list(dict(table.rows)) == ["base", "strong captioner", "CapRL", joined, PAIR]
    assert cell(table, "base", "First 16 tokens").value == pytest.approx(0.3)
    assert cell(table, "strong captioner", "First 16 tokens").text == cell(table, joined, "First 16 tokens").text == "–"
    gap = cell(table, PAIR, "First 16 tokens")
    assert gap.value == pytest.approx(0.15) and gap.interval[0] > 0 and len(gap.sources) == 2
    found = cell(tables.gaps_table(results), "CapRL − base captions joined, up to CapRL's length", "Average")
    assert found.value == pytest.approx(0.15) and ", p" in found.text
    text = json.dumps(tables.write(finished, "table3"))
    assert joined in dict(tables.scores_table(results, bounds=True).rows) and "first 24 tokens" not in text


def test_what_the_captioners_of_the_mini_world_are_is_what_their_records_say(finished, no_figures, report):
    folders = {name: paths.zoo_folder(f"zoo:{name}") for name in ("base", "mid", "strong")}
    records = [json.loads((folder / "record.json").read_text()) for folder in folders.values()]
    drafts = [json.loads((paths.ZOO / record["starts_from"] / "record.json").read_text()) for record in records]
    assert {record["starts_from"] for record in drafts} == {"imaginer"}
    sizes = [record["parameters"] for record in records]
    assert sizes == sorted(set(sizes))  # each is deeper than the one before
    real = finished.model_copy(update={"models": load_profile("paper").models})
    for profile, stand_ins in ((finished, True), (real, False)):
        tables.write(profile, "table3")
        text = report("table3.md")
        assert ("one start: the base" in text and "million parameters" in text) == stand_ins


def test_what_readers_make_of_the_probes_is_tabled_and_drawn(finished, results_of, cell, no_figures):
    names = probes.names(finished)
    rows = [
        row(benchmark, n, float(n % 10 < index), caption_index=index, caption=name, num_tokens=10 + index,
            options=["7", "8"] if benchmark == "mini-scene" else [])
        for benchmark in MINI for n in range(20) for index, name in enumerate(names)
        if benchmark == "mini-scene" or name != probes.OPTIONS
    ]  # fmt: skip
    evaluation(finished, "readers", "prism_reader", rows)
    content = tables.write(finished, "table3")
    table, reader = tables.readers_table(results_of(finished)), "Reader of the evaluation"
    assert [label for label, _ in table.rows] == names and len(table.columns) == 3
    found = cell(table, "complete true facts", reader)
    assert found.value == pytest.approx(0.2) and found.interval[0] < 0.2 < found.interval[1]
    assert cell(table, probes.OPTIONS, reader).text == "–"
    assert cell(table, probes.OPTIONS, f"{reader}, questions with options").value == pytest.approx(0.8)
    assert cell(table, "nothing", "Tokens").text == "10.0"
    assert "runs/mini/readers/prism_reader/result.json" in {run["file"] for run in content["runs"]}
    title, shown = page.chapter(paths.reports_of("mini") / "table3.md")
    assert title.startswith("Table 3: caption quality") and shown.count('src="data:image/svg+xml') == 3
