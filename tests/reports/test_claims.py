"""Verdicts; and claims.md: every statement once, its verdict that of its report, the paper's numbers beside it."""

import csv
import json
import math

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.reports import claims, page, paper, tables
from caprl_utils.reports.items import items, texts


@pytest.fixture
def reported(finished, no_figures):
    """Table 3 and the claims; returns profile and what the claims' JSON holds."""
    tables.write(finished, "table3")
    return finished, page.write_claims(finished)


@pytest.fixture(scope="module")
def stated():
    told = [item for item in items(load_profile("mini")).values() if not item.ours]
    return [(item, claim) for item in told for claim in item.claims]


def rows_of(content):
    return {row["label"]: [cell["text"] for cell in row["cells"]] for row in content["tables"][0]["rows"]}


@pytest.mark.parametrize(
    ("kind", "supported", "not_supported", "undecided"),
    [
        ("accuracy", (0.01, 0.1), (-0.1, -0.01), (-0.1, 0.1)),
        ("no gain", (-0.02, 0.005), (0.001, 0.03), (-0.01, 0.02)),
        ("as good", (-0.005, 0.02), (-0.05, -0.02), (-0.03, 0.01)),
    ],
)
def test_verdict(kind, supported, not_supported, undecided):
    words = [claims.verdict(*bounds, kind) for bounds in (supported, not_supported, undecided)]
    assert words == ["supported", "not supported", "undecided"]


def test_rise_by_hand():
    half = 1.959964 * math.sqrt(0.02)  # windows of two: means 0.1 and 0.6, each with variance 0.02 / 2
    assert claims.rise([0.0, 0.2, 0.5, 0.7]) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert claims.rise([0.5, 0.6, 0.7]) is None  # too few steps at either end for a spread


def test_larger_gain_needs_both_groups_of_benchmarks(finished, results_of):
    found = results_of(finished)
    claim = next(claim for claim in found.item.claims if claim.kind == "larger gain")
    (finding,) = [one for one in claims.test_all(found) if one.claim == claim]
    assert finding.value == pytest.approx(0.0) and finding.verdict == "undecided" and finding.images == 80
    del found.parts["mini-scene"]
    assert claim not in [one.claim for one in claims.test_all(found)]


def test_every_statement_stands_once_and_the_papers_own_numbers_carry_it(stated):
    assert len({(item.name, claim.text) for item, claim in stated}) == len(stated) >= 20
    printed = [(i, c, means) for i, c in stated if (means := claims.paper_means(i, c)) is not None]
    assert len(printed) >= 30
    for item, claim, (ours, theirs) in printed:
        gap = round(ours - theirs, 6)
        states = {"no gain": gap <= 0, "as good": gap >= 0}.get(claim.kind, gap > 0)
        assert states, f"{item.name}: {claim.text}: {ours} against {theirs}"


def test_every_setting_of_the_pretraining_is_one_of_the_papers():
    known = texts()["settings"]
    assert set(known) == {file.stem for file in (paths.CONFIGS / "vlm_init").glob("*.yaml")}
    assert set(known.values()) == {setting for setting, _ in paper.paper_values("table1_pretraining.csv")}


def test_verdicts_come_from_the_reports_and_the_rest_is_not_run(reported):
    _, content = reported
    counts, rows = content["facts"]["counts"], rows_of(content)
    assert counts["supported"] >= 3 and counts["not run"] >= 30 and sum(counts.values()) == len(rows)
    statement, verdict, gap, of_paper, test, count = rows["Table 3 (1)"]
    assert statement.startswith("CapRL's captions serve") and of_paper == "48.3 against 39.9 (+8.4)"
    assert test == "accuracy: CapRL-3B − 3B (base) above 0" and verdict == "**supported**"
    assert gap.startswith("+30.0 points [+") and count == "80 images; 1 against 1 evaluated"
    assert rows["Table 3 (2)"][1] == rows["Table 5 (1)"][1] == "not run"
    assert rows["Table 5 (1)"][2] == rows["Table 5 (1)"][5] == "–"
    text = (paths.reports_of("mini") / "claims.md").read_text(encoding="utf-8")
    assert "| [Table 3: caption quality in the Prism framework](table3.md) | 15 |" in text
    with open(paths.reports_of("mini") / "claims.csv", encoding="utf-8", newline="") as file:
        lines = {line["item"]: line for line in csv.DictReader(file)}
    assert float(lines["Table 3 (1)"]["difference"]) == pytest.approx(0.3)
    assert lines["Table 4 (1)"]["low"] == "" and lines["Table 4 (1)"]["paper_ours"] == "48.0"
    (source,) = content["tables"][0]["rows"][14]["cells"][1]["sources"]
    assert source == {"file": "reports/mini/table3.json", "key": "facts/claims/0/verdict"}


def test_averages_that_are_not_the_mean_of_their_row_are_all_named():
    found = paper.all_average_notes()
    rows = [note.split(": ")[0] for note in found]
    assert len(rows) == 5 and rows[0] == "Table 1, Qwen2.5-3B + Qwen2.5-ViT, CapRL-5M"
    assert "62.0 lies 0.100 away from the mean of the printed entries, 62.100" in found[0]
    text = " ".join((paths.PAPER / "README.md").read_text(encoding="utf-8").split())
    assert text.split("entries of their row: ")[1].split(". The SEED")[0].split("; ") == rows


def test_what_the_models_have_built_in_is_counted_apart_with_its_reason(finished, prism_run, no_figures):
    prism_run("base-7b", right=12, tokens=30.0)
    tables.write(finished, "table3")
    content = page.write_claims(finished)
    assert content["facts"]["counts"][claims.BY_CONSTRUCTION] == 2
    _, verdict, gap, *_ = rows_of(content)["Table 3 (12)"]
    assert verdict == "**by construction**" and gap.startswith("+20.0 points [") and ", p" not in gap
    text = (paths.reports_of("mini") / "claims.md").read_text(encoding="utf-8")
    assert "- Table 3 (12), Table 3 (13): the zoo's captioners are all of one size" in text
    lines = (paths.reports_of("mini") / "table3.md").read_text().splitlines()
    (line,) = [line for line in lines if "7B against 3B" in line]
    assert "7B − 3B (base): +20.0 points" in line and line.endswith("leave facts out and to err.")
    assert not any(claim.built_in for claim in items(load_profile("paper"))["table3"].claims)


def test_the_page_says_how_firm_the_supported_are(reported):
    profile, _ = reported
    file = paths.reports_of("mini") / "table3.json"
    content = json.loads(file.read_text())
    supported = [c for c in content["facts"]["claims"] if c["verdict"] == "supported"]
    supported[0]["p"], supported[1]["runs"] = 0.06, [2, 1]
    file.write_text(json.dumps(content))
    facts = page.write_claims(profile)["facts"]
    assert facts["supported_large_p"] == ["Table 3 (1)"]
    assert len(facts["supported_one_training"]) == len(supported) - 1
    text, many = (paths.reports_of("mini") / "claims.md").read_text(encoding="utf-8"), len(supported)
    assert f"Of the {many} supported statements, {many - 1} rest on no more than one" in text
    assert "1 have a corrected p of 0.05 or more: Table 3 (1)." in text
    assert "+30.0 points [" in text and ", p = 0.060 |" in text
