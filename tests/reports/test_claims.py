"""Verdicts; and claims.md: every statement once, its verdict that of its report, the paper's numbers beside it."""

import csv
import json
import math

import pytest
from scipy import stats

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.prism.statistics import Interval
from caprl_utils.reports import claims, paper, tables
from caprl_utils.reports.items import items, texts


def written(profile):
    """What claims.json holds, and its statements: id -> texts of the cells."""
    content = claims.write_claims(profile)
    return content, {row["label"]: [cell["text"] for cell in row["cells"]] for row in content["tables"][1]["rows"]}


@pytest.mark.parametrize(
    ("kind", "supported", "not_supported", "undecided"),
    [
        ("accuracy", (0.01, 0.1), (-0.1, -0.01), (-0.1, 0.1)),
        ("no gain", (-0.02, 0.005), (0.001, 0.03), (-0.01, 0.02)),
        ("as good", (-0.005, 0.02), (-0.05, -0.02), (-0.03, 0.01)),
    ],
)
def test_verdict(kind, supported, not_supported, undecided):
    def of(bounds, trainings=2):
        return claims.verdict(Interval(sum(bounds) / 2, *bounds, 50, trainings=trainings), kind)

    words = [of(bounds)[0] for bounds in (supported, not_supported, undecided)]
    assert words == ["supported", "not supported", "undecided"]
    assert of((-0.004, 0.006))[0] == ("no difference" if kind == "accuracy" else "supported")
    assert of(supported, trainings=1) == ("undecided", "one training")
    assert of(supported, trainings=None)[0] == "supported"  # nothing was trained


def test_rise_by_hand(profile, prism_run, trained, results_of):
    # windows of two: means 0.1 and 0.6, each with variance 0.02 / 2
    assert claims.rise([0.0, 0.2, 0.5, 0.7]) == pytest.approx((0.5, 0.02))
    assert claims.rise([0.5, 0.6, 0.7]) is None  # too few steps at either end for a spread
    prism_run("base-3b", right=8)
    for name in ("judge_vlm", "caprl"):
        trained(name, 14)
    file = paths.RUNS / "mini" / "rl" / "caprl-seed1" / "curve.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"reward": row["reward"] * 2}) + "\n" for row in rows))
    (found,) = [one for one in claims.test_all(results_of(profile, "figure1c")) if one["kind"] == "reward"]
    # windows of six: the rises are 0.18 and 0.36; steps 0.03 (0.06) apart have variance 0.00315 (0.0126)
    within, between = 2 * (0.00315 + 0.0126) / 6 / 4, 0.18**2 / 2 / 2
    df = (within + between) ** 2 / between**2
    half = stats.t.ppf(0.975, df) * math.sqrt(within + between)
    assert (found["value"], found["trainings"]) == (pytest.approx(0.27), [2])
    assert found["interval"] == pytest.approx([0.27 - half, 0.27 + half])


def test_larger_gain_needs_both_groups_of_benchmarks(finished, results_of):
    found = results_of(finished)
    claim = next(claim for claim in found.item.claims if claim.kind == "larger gain")
    (finding,) = [one for one in claims.test_all(found) if one["text"] == claim.text]
    assert finding["value"] == pytest.approx(0.0) and finding["verdict"] == "undecided"
    assert finding["images"] == 80 and finding["p"] > 0.9
    del found.parts["mini-scene"]
    assert claim.text not in [one["text"] for one in claims.test_all(found)]


def test_every_statement_stands_once_and_the_papers_own_numbers_carry_it():
    told = [item for item in items(load_profile("mini")).values() if not item.ours]
    stated = [(item, claim) for item in told for claim in item.claims]
    assert len({(item.name, claim.text) for item, claim in stated}) == len(stated) >= 20
    printed = [(i, c, means) for i, c in stated if (means := claims.paper_means(i, c)) is not None]
    assert len(printed) >= 30
    for item, claim, (ours, theirs) in printed:
        gap = round(ours - theirs, 6)
        states = {"no gain": gap <= 0, "as good": gap >= 0}.get(claim.kind, gap > 0)
        assert states, f"{item.name}: {claim.text}: {ours} against {theirs}"
    known = texts()["settings"]  # of the pretraining: each is one of the paper's
    assert set(known) == {file.stem for file in (paths.CONFIGS / "vlm_init").glob("*.yaml")}
    assert set(known.values()) == {setting for setting, _ in paper.paper_values("table1_pretraining.csv")}


def test_verdicts_come_from_the_reports_and_p_is_corrected_over_all_facts(finished, trained, no_figures, report):
    tables.write(finished, "table3")
    content, rows = written(finished)
    counts = content["facts"]["counts"]
    assert counts["supported"] >= 1 and counts["not run"] >= 20
    linked = [row for row in rows.values() if "; the fact of " in row[1]]
    assert sum(counts.values()) + len(linked) == len(rows) == content["facts"]["statements"]
    statement, verdict, gap, of_paper, count, p = rows["Table 3 (1)"]
    assert statement.startswith("CapRL's captions serve") and of_paper == "48.3 against 39.9 (+8.4)"
    assert verdict == "**supported**"
    assert gap.startswith("+30.0 points [+") and count == "80 images; trainings: 2 against 0" and p == "p < 0.001"
    assert rows["Table 3 (2)"][1] == rows["Table 5 (1)"][1] == "not run"
    assert rows["Table 5 (1)"][2] == rows["Table 5 (1)"][4] == "–"
    assert rows["Table 3 (4)"][1] == "**supported**; the fact of Table 3 (1)" and rows["Table 3 (4)"][5] == "–"
    headlines = [row["label"] for row in content["tables"][0]["rows"]]
    assert headlines[0] == "Table 3 (1)" and not {*headlines} & {"Table 3 (2)", "Table 3 (4)", "Table 5 (1)"}
    text = report("claims.md")
    assert "| Table 3 (1) | CapRL's captions serve" in text and "](claims.svg)" in text
    with open(paths.reports_of("mini") / "claims.csv", encoding="utf-8", newline="") as file:
        lines = {line["item"]: line for line in csv.DictReader(file)}
    assert float(lines["Table 3 (1)"]["difference"]) == pytest.approx(0.3)
    assert lines["Table 4 (1)"]["low"] == "" and lines["Table 4 (1)"]["paper_ours"] == "48.0"
    (row,) = [row for row in content["tables"][1]["rows"] if row["label"] == "Table 3 (1)"]
    files = {source["file"].split("/")[3] for source in row["cells"][1]["sources"]}
    assert files == {"caprl-seed0", "caprl-seed1", "base-3b"}

    for name, right in (("rounds_1", 12), ("rounds_2", 12), ("short", 14), ("rounds_8", 14)):
        trained(name, right)
    tables.write(finished, "table5")
    file = paths.reports_of("mini") / "table3.json"
    content = json.loads(file.read_text())
    next(c for c in content["facts"]["claims"] if c["verdict"] == "supported")["p"] = 0.03
    file.write_text(json.dumps(content))
    content, rows = written(finished)
    tested, facts = [row for row in rows.values() if row[5] != "–"], content["facts"]
    assert facts["tests"] == len(tested) >= 4 and facts["large_p"]["supported"] == ["Table 3 (1)"]
    text = report("claims.md")
    assert "1 has a corrected p of 0.05 or more: Table 3 (1)." in text
    assert "+30.0 points [" in text and ", p = 0.030 | 48.3 against" in text


def test_averages_that_are_not_the_mean_of_their_row_are_all_named():
    found = paper.all_average_notes()
    rows = [note.split(": ")[0] for note in found]
    assert len(rows) == 5 and rows[0] == "Table 1, Qwen2.5-3B + Qwen2.5-ViT, CapRL-5M"
    assert "62.0 lies 0.100 away from the mean of the printed entries, 62.100" in found[0]
    text = " ".join((paths.PAPER / "README.md").read_text(encoding="utf-8").split())
    assert text.split("entries of their row: ")[1].split(". The SEED")[0].split("; ") == rows


def test_what_the_models_cannot_test_is_counted_apart_and_the_same_fact_must_be_one(
    finished, no_figures, monkeypatch, report
):
    def change(**keys):
        item = texts()["items"]["table3"]
        told = [{**item["claims"][0], **keys}, *item["claims"][1:]]
        monkeypatch.setitem(texts(), "items", texts()["items"] | {"table3": {**item, "claims": told}})

    change(**{"not testable": "why"})
    assert not items(finished)["table3"].claims[0].not_testable  # the models have no such reason
    monkeypatch.setitem(texts()["models"][0], "not_testable", {"why": "they were made so"})
    tables.write(finished, "table3")
    content, rows = written(finished)
    assert content["facts"]["counts"]["not testable here"] == 1
    _, verdict, gap, *_ = rows["Table 3 (1)"]
    assert verdict == "**not testable here**: they were made so"
    assert gap.startswith("+30.0 points [") and ", p" not in gap
    text = report("table3.md")
    assert "trained from | **not testable here**: they were made so | +30.0 points" in text
    assert not any(claim.not_testable for claim in items(load_profile("paper"))["table3"].claims)
    change(**{"same as": "table3 (99)"})
    with pytest.raises(UserError, match=r"is the same as table3 \(99\), which is no statement"):
        items(finished)
