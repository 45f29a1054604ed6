"""claims.md: every statement once, its verdict that of the report it comes from, the paper's numbers beside it."""

import csv
import json

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.reports import claims, claims_page, paper, report3
from caprl_utils.reports.claims import Claim
from caprl_utils.reports.results import load
from caprl_utils.reports.statements import SETTINGS, groups


@pytest.fixture(scope="module")
def all_groups():
    return {group.name: group for group in groups(load_profile("mini"))}


def test_every_table_and_figure_of_the_paper_has_statements(all_groups):
    assert list(all_groups) == [
        "table1", "table2", "table3", "table4", "table5", "table6",
        "figure1c", "figure4", "figure5_left", "figure5_right",
    ]  # fmt: skip
    assert sum(len(group.claims) for group in all_groups.values()) >= 20
    texts = [(group.name, claim.text) for group in all_groups.values() for claim in group.claims]
    assert len(set(texts)) == len(texts)


def test_the_papers_own_numbers_carry_each_statement(all_groups):
    printed = [
        (g, c, m) for g in all_groups.values() for c in g.claims if (m := g.paper_means(c)) is not None
    ]
    assert len(printed) >= 30
    for group, claim, (ours, theirs) in printed:
        gap = round(ours - theirs, 6)
        states = {"no gain": gap <= 0, "as good": gap >= 0}.get(claim.kind, gap > 0)
        assert states, f"{group.name}: {claim.text}: {ours} against {theirs}"


def test_every_setting_of_the_pretraining_is_one_of_the_papers():
    assert set(SETTINGS) == {file.stem for file in (paths.CONFIGS / "vlm_init").glob("*.yaml")}
    assert set(SETTINGS.values()) == {setting for setting, _ in paper.paper_values("table1_pretraining.csv")}


def test_verdicts_come_from_the_reports_and_the_rest_is_not_run(finished, tmp_path):
    report3.write(finished, tmp_path)
    content = claims_page.write(finished, tmp_path)
    counts = content["facts"]["counts"]
    assert (
        counts["supported"] >= 3
        and counts["not run"] >= 30
        and sum(counts.values()) == len(content["tables"][0]["rows"])
    )
    rows = {row["label"]: [cell["text"] for cell in row["cells"]] for row in content["tables"][0]["rows"]}
    statement, verdict, gap, of_paper, test, count = rows["Table 3 (1)"]
    assert statement.startswith("CapRL's captions serve") and of_paper == "48.3 against 39.9 (+8.4)"
    assert test == "accuracy: CapRL-3B − 3B (base) above 0" and verdict == "**supported**"
    assert gap.startswith("+30.0 points [+") and count == "80 images; 1 against 1 evaluated"
    assert rows["Table 3 (2)"][1] == rows["Table 5 (1)"][1] == "not run"
    assert rows["Table 5 (1)"][2] == rows["Table 5 (1)"][5] == "–"
    page = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert "| [Table 3: caption quality in the Prism framework](./table3.md) | 13 |" in page
    with open(tmp_path / "claims.csv", encoding="utf-8", newline="") as file:
        lines = {line["item"]: line for line in csv.DictReader(file)}
    assert (
        float(lines["Table 3 (1)"]["difference"]) == pytest.approx(0.3) and lines["Table 4 (1)"]["low"] == ""
    )
    assert lines["Table 4 (1)"]["paper_ours"] == "48.0"


def test_the_page_of_mini_stands_beside_its_folder(finished):
    report3.write(finished)
    claims_page.write(finished)
    assert "(mini/table3.md)" in (paths.REPORTS / "claims.md").read_text(encoding="utf-8")
    content = json.loads((paths.REPORTS / "mini" / "claims.json").read_text(encoding="utf-8"))
    (source,) = content["tables"][0]["rows"][14]["cells"][1]["sources"]
    assert source == {"file": "reports/mini/table3.json", "key": "facts/claims/0/verdict"}


def test_smoke_stays_out_of_reports():
    with pytest.raises(UserError, match="smoke does not write"):
        claims_page.write(load_profile("smoke"), paths.REPORTS / "mini")


def test_averages_that_are_not_the_mean_of_their_row_are_all_named():
    rows = [note.split(": ")[0] for note in paper.average_notes()]
    assert rows == [
        "Table 1, Qwen2.5-3B + Qwen2.5-ViT, CapRL-5M", "Table 1, Qwen2.5-7B + Qwen2.5-ViT, DenseFusion-1M",
        "Table 3, Qwen2.5-VL-72B", "Table 3, CapRL-3B", "Table 4, CapRL-3QA-20k",
    ]  # fmt: skip
    assert "62.0 lies 0.100 away from the mean of the printed entries, 62.100" in paper.average_notes()[0]


def test_the_readme_of_the_papers_values_lists_the_same_averages():
    text = " ".join((paths.PAPER / "README.md").read_text(encoding="utf-8").split())
    listed = text.split("entries of their row: ")[1].split(". The SEED")[0]
    assert listed.split("; ") == [note.split(": ")[0] for note in paper.average_notes()]


def test_what_the_mini_world_has_built_in_is_listed_with_its_reason_and_counted_apart(
    finished, prism_run, tmp_path
):
    prism_run(finished, "base-7b", right=12, tokens=30.0)
    report3.write(finished, tmp_path)
    content = claims_page.write(finished, tmp_path)
    assert content["facts"]["counts"][claims.BY_CONSTRUCTION] == 2
    rows = {row["label"]: [cell["text"] for cell in row["cells"]] for row in content["tables"][0]["rows"]}
    assert rows["Table 3 (12)"][1] == "**by construction**" and rows["Table 3 (12)"][2].startswith(
        "+20.0 points ["
    )
    assert not rows["Table 3 (12)"][2].endswith("p < 0.001")
    page = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert "- Table 3 (12), Table 3 (13): the zoo's captioners are all of one size" in page
    (line,) = [line for line in (tmp_path / "table3.md").read_text().splitlines() if "7B against 3B" in line]
    assert "7B − 3B (base): +20.0 points" in line and line.endswith("leave facts out and to err.")
    assert not Claim("", "7B", "3B", built_in="so").tested(finished)
    assert Claim("", "7B", "3B", built_in="so").tested(load_profile("paper"))


def test_the_page_says_how_firm_the_supported_are(finished, tmp_path):
    report3.write(finished, tmp_path)
    file = tmp_path / "table3.json"
    content = json.loads(file.read_text())
    supported = [c for c in content["facts"]["claims"] if c["verdict"] == "supported"]
    supported[0]["p"], supported[1]["runs"] = 0.06, [2, 1]
    file.write_text(json.dumps(content))
    facts = claims_page.write(finished, tmp_path)["facts"]
    assert facts["supported_large_p"] == ["Table 3 (1)"]
    assert len(facts["supported_one_training"]) == len(supported) - 1
    page = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert (
        f"Of the {len(supported)} supported statements, {len(supported) - 1} rest on no more than one" in page
    )
    assert "1 have a corrected p of 0.05 or more: Table 3 (1)." in page
    assert "+30.0 points [" in page and ", p = 0.060 |" in page


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(-0.005, 0.02, "supported"), (-0.05, -0.02, "not supported"), (-0.03, 0.01, "undecided")],
)
def test_as_good(low, high, word):
    assert claims.as_good(low, high) == word


def test_larger_gain_needs_both_groups_of_benchmarks(finished):
    results = load(finished)
    charts, scenes = ("mini-chart",), ("mini-scene",)
    found = claims.test(Claim("", "CapRL-3B", "3B (base)", "larger gain", charts, scenes), results, {})
    assert found.value == pytest.approx(0.0) and found.verdict == "undecided" and found.images == 80
    assert (
        claims.test(Claim("", "CapRL-3B", "3B (base)", "larger gain", charts, ("mmstar",)), results, {})
        is None
    )
