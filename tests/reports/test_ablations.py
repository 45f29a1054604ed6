"""Tables 4 to 6, Figures 1c and 5: rows, differences and verdicts from runs with known scores."""

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile, names_of
from caprl_utils.errors import UserError
from caprl_utils.reports import figures, numbers, tables
from caprl_utils.reports.items import items, texts
from caprl_utils.schema import ABLATIONS, Experiment


def test_rows_differences_and_verdicts(table5, no_figures, report):
    content = tables.write(table5, "table5")
    scores, gaps, _, paper = content["tables"]
    assert [row["label"] for row in scores["rows"]] == ["base", "N = 1", "N = 2", "N = 4", "N = 8"]
    assert scores["columns"][-3:] == ["Training images", "Steps", "Trainings"]
    base, one = scores["rows"][0]["cells"], scores["rows"][1]["cells"]
    assert [cell["value"] for cell in base[-3:]] == [None, None, None]
    assert [cell["value"] for cell in one[-3:]] == [40, 12, 2]
    assert one[scores["columns"].index("Average")]["value"] == pytest.approx(0.5)
    assert gaps["rows"][2]["label"] == "N = 4 − N = 1"
    assert gaps["rows"][2]["cells"][-1]["value"] == pytest.approx(0.2)
    assert paper["rows"][2]["cells"][-1]["text"] == "48.4"
    facts, text = content["facts"], report("table5.md")
    assert [claim["verdict"] for claim in facts["claims"]] == ["supported"] * 3  # N=8 equals N=4 on every image
    assert "| Beyond four rounds there is no gain | **supported** | 0.0 points [0.0, 0.0]" in text
    ladder = "N = 1, N = 2, N = 4, N = 8: 50.0, 60.0, 70.0, 70.0 (N = 8 against N = 1: +20.0 [+"
    assert facts["summary"].startswith(ladder) and "never mixed with ours" in text
    (line,) = [line for line in text.splitlines() if "| Four rounds are" in line]
    p = f", {numbers.p_value(facts['claims'][0]['p'])} |"
    assert "Four rounds are better than one | **supported** | +20.0 points [" in line
    assert p in line and text.count(p) > 1  # the same number stands in the table of differences
    first = text.split("\n\n")[1]  # what was measured and trained
    parts = ("every image 2 times", "(r, mode choice)", "2 trainings a row.", "on 40 images a row (ablations.")
    assert [part for part in parts if part not in first] == []
    assert "Natural images:" not in first  # no statement here is about a group of benchmarks


def test_a_row_is_the_mean_over_its_trainings(table5, trained, no_figures):
    three = table5.model_copy(update={"ablations": table5.ablations.model_copy(update={"seeds": [0, 1, 2]})})
    trained("rounds_1", 16, seeds=[2])
    content = tables.write(three, "table5")
    scores, facts = content["tables"][0], content["facts"]
    one = next(row for row in scores["rows"] if row["label"] == "N = 1")["cells"]
    assert one[scores["columns"].index("Average")]["value"] == pytest.approx(0.6)  # of 10, 10 and 16 of 20
    assert one[-1]["value"] == 3 and facts["training_seeds"]["N = 1"] == [0, 1, 2]
    assert facts["claims"][0]["trainings"] == [2, 3]
    assert facts["claims"][0]["value"] == pytest.approx(0.2)  # over the seeds that both have


def test_claims_about_groups_of_benchmarks(profile, prism_run, trained, report):
    prism_run("base-3b", right=8)
    trained("documents", 12)
    trained("natural", 8)
    facts = tables.write(profile, "figure5_left")["facts"]
    assert [claim["verdict"] for claim in facts["claims"]] == ["supported", "no difference", "supported"]
    assert facts["claims"][0]["same_as"] == "Table 3 (1)"
    drawn, text = report("figure5_left.svg"), report("figure5_left.md")
    assert "profile mini, small stand-ins" in drawn and "80 questions about 80 images" in drawn
    assert "Documents and charts: Mini Chart. Natural images: Mini Scene." in text
    assert "- Figure 5, left: the SEED values of the two trainings were read from a text layer" in text
    assert facts["summary"].startswith("against base: Documents and charts +20.0 [")
    assert ", Natural images 0.0 [" in facts["summary"]


def test_figure_1c_tells_length_and_reward_and_every_training_has_its_curve(
    profile, prism_run, trained, monkeypatch, with_seeds, report
):
    monkeypatch.setitem(texts()["models"][0], "not_testable", {})
    prism_run("base-3b", right=8, tokens=20)
    trained("judge_unified", 2, tokens=5, rises=False)
    trained("judge_vlm", 10, tokens=40)
    trained("caprl", 14, tokens=30, seeds=(0, 1, 2))
    content = tables.write(with_seeds(profile, 0, 1, 2), "figure1c")
    assert {claim["verdict"] for claim in content["facts"]["claims"]} == {"supported"}
    shrunk, curves = content["facts"]["claims"][0], content["tables"][-2]["rows"]
    assert (shrunk["kind"], shrunk["value"]) == ("tokens", pytest.approx(15.0))
    assert curves[0]["cells"][2]["value"] == pytest.approx(5 + 5.5)
    assert [row["label"] for row in curves][-2:] == ["CapRL, training 2", "CapRL, training 3"] and len(curves) == 7
    text, drawn = report("figure1c.md"), report("figure1c.svg")
    assert "cut at 48" in drawn and f"centred mean of {figures.SMOOTH_STEPS} steps" in drawn
    assert "cuts captions at 48 tokens (the dotted" in text and "the evaluation at 64" in text
    assert "| **supported** | +15.0 tokens [" in text and "2 trainings a row, 3 of CapRL." in text


def test_growth_over_images(profile, prism_run, trained, results_of, report):
    prism_run("base-3b", right=8)
    for name, right, images in (("images_10", 10, 4), ("images_30", 12, 12), ("short", 14, 40)):
        trained(name, right, images)
    tables.write(profile, "figure5_right")
    line = figures.growth(results_of(profile, "figure5_right"))["average"]
    assert [point[0] for point in line] == [0, 4, 12, 40]
    assert [point[1].value for point in line] == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert "the scale is logarithmic above 0" in report("figure5_right.svg")


def test_what_is_missing_is_left_out_or_named(table5, capsys, no_figures, monkeypatch):
    assert tables.write_all(table5) == ["table5"]
    told = capsys.readouterr().err
    assert "table4: left out, not there yet: prism/questions_1-seed0, prism/questions_1-seed1, prism/q" in told
    for name, message in {
        "table6": r"table6 needs prism/leaking-seed0, .*prism/refined-seed1; make them",
        "tabel5": r"no item 'tabel5'; did you mean table5\?",
    }.items():
        with pytest.raises(UserError, match=message):
            tables.write_all(table5, [name])
    wrong = {"table9": {"title": "T", "rows": [{"lable": "x"}], "claims": [], "pairs": []}}
    monkeypatch.setitem(texts(), "items", wrong)
    with pytest.raises(UserError, match=r"configs/reports\.yaml, item table9: .*'lable'"):
        items(table5)


@pytest.mark.parametrize("name", ["smoke", "mini", "one_gpu", "paper"])
def test_items_name_rows_that_they_have_and_experiments_that_exist(name):
    found = items(load_profile(name))
    assert list(found) == [
        "table1", "table2", "table3", "table4", "table5", "table6", "figure1c", "figure4", "figure5_left",
        "figure5_right", "extra_length", "extra_outside", "extra_readers", "extra_rewards", "extra_start",
    ]  # fmt: skip
    for item in found.values():
        pairs = [*item.pairs, *item.told_pairs.values(), *((c.ours, c.theirs or c.ours) for c in item.claims)]
        asked = {label for pair in pairs for label in pair} | {*item.needed, *item.ladder}
        assert asked <= {row.label for row in item.rows}, item.name
        assert item.paper is None or (paths.PAPER / item.paper).is_file()
        trained = set(item.experiments) - {"caprl", "from_mid", "from_strong"}
        assert trained <= set(names_of(Experiment)), item.name
        assert item.ours or trained <= set(ABLATIONS), item.name  # ours are no part of reproduce
