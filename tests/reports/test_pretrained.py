"""Tables 1 and 2 and Figure 4 from finished runs with known scores."""

import json
import re
import shutil

import pytest

from caprl_utils import paths
from caprl_utils.pretraining.data import run_name
from caprl_utils.pretraining.sets import all_trainings, final_names
from caprl_utils.prism.told import MEASURES
from caprl_utils.reports import claims, page, tables, trace
from caprl_utils.reports.items import figure4, texts
from caprl_utils.reports.numbers import from_record_path, look_up
from caprl_utils.runs import Run
from tests.reports.finished import RECIPE, answered

RIGHT = {"vanilla": 4, "sharegpt4v-1m": 6, "densefusion-1m": 8, "caprl-1m": 12, "caprl-5m": 15,
         "caprl-sharegpt4v-1m": 11, "caprl-densefusion-1m": 12, "densefusion-1m-x0.5": 7,
         "caprl-1m-x0.5": 9}  # fmt: skip
CAPTIONS = {"count": 10, **dict.fromkeys(MEASURES, 0.6), "tokens": 12.3, "cut": 0.0, "looped": 0.1}
AT_THE_FLOOR = claims.at_the_floor
ITEMS = {"table1": 15, "table2": 5, "figure4": 5}  # rows


@pytest.fixture
def vqa_run(profile):
    """Makes an evaluation of a VLM."""

    def make(name, right):
        answered(profile, "vqa", name, right, benchmarks=("mini-chart", "mini-infographic"))

    return make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder for the runs of all trainings, filled by the first test that asks."""
    return tmp_path_factory.mktemp("made") / "runs"


@pytest.fixture
def pretrained(profile, vqa_run, made, monkeypatch):
    """Profile mini with two trainings a row and their evaluations, its models able to test everything."""
    monkeypatch.setitem(texts()["models"][0], "not_testable", {})
    monkeypatch.setattr(claims, "at_the_floor", lambda *a: "")  # these questions have one answer: the guesser is right
    if not made.is_dir():
        settings = profile.pretraining
        for training in all_trainings(settings):
            with Run.open(profile, "pretraining", training.name, {}, RECIPE) as run:
                run.finish(values={"steps": 3}, n=training.num_rows(settings), unit="row")
        for dataset in {training.dataset for training in all_trainings(settings)}:
            with Run.open(profile, "pretraining", run_name(dataset), {}, RECIPE) as run:
                run.finish(values={"rows": 10, "captions": CAPTIONS}, n=10, unit="row")
        for name in final_names(settings):
            row = re.sub(r"-seed\d+$", "", name)
            slug = next(s for s in sorted(RIGHT, key=len, reverse=True) if row.endswith(f"-{s}-sft"))
            vqa_run(name, RIGHT[slug])
        shutil.copytree(paths.RUNS, made)
    shutil.copytree(made, paths.RUNS, dirs_exist_ok=True)
    return profile


def test_rows_at_the_floor_decide_nothing(pretrained, monkeypatch, no_figures):
    monkeypatch.setattr(claims, "at_the_floor", AT_THE_FLOOR)
    found = tables.write(pretrained, "table1")["facts"]["claims"]
    assert {claim["reason"] for claim in found} == {
        "neither side is measurably above always giving the most frequent answer"
    }
    assert {claim["verdict"] for claim in found} == {claims.NOT_TESTABLE} and not any(claim["p"] for claim in found)


def test_every_number_has_its_source_and_its_verdict(pretrained, recorded, report, no_figures):
    facts, tables_of = {}, {}
    for name, num_rows in ITEMS.items():
        content = tables.write(pretrained, name)
        facts[name], tables_of[name] = content["facts"], content["tables"]
        scores, gaps = content["tables"][:2]
        # one question about every image, and one answer: the guesser is right
        floor = scores["rows"].pop()
        assert floor["label"].startswith("floor: the most frequent answer")
        printed = [cell["text"] for cell in floor["cells"]]
        assert printed[0].startswith("100.0 [") and printed[-2:] == ["–", "–"]
        assert floor["cells"][0]["sources"][0]["file"].endswith("samples.parquet")
        assert len(scores["rows"]) == num_rows and gaps["rows"]
        for row in scores["rows"]:
            for value, source in ((cell["value"], source) for cell in row["cells"] for source in cell["sources"]):
                record = json.loads(from_record_path(source["file"]).read_text())
                assert look_up(record, source["key"]) == pytest.approx(value)
            heads = zip(scores["columns"], row["cells"], strict=True)
            assert all(cell["sources"] or cell["value"] == 0 for head, cell in heads if head != "Trainings")

    scores, settings = tables_of["table1"][0], pretrained.pretraining.settings
    rows, place = {row["label"]: row["cells"] for row in scores["rows"]}, scores["columns"].index("Average")
    vanilla, ours = (rows[f"{settings[0]}, {name}"] for name in ("Vanilla", "CapRL captions"))
    assert vanilla[place]["value"] == pytest.approx(0.2) and ours[place]["value"] == pytest.approx(0.6)
    assert ours[-1]["value"] == pretrained.pretraining.further.num_rows and vanilla[-1]["text"] == "0"
    assert {claim["verdict"] for claim in facts["table1"]["claims"]} == {"supported"}
    told = ("40 questions about 40 images in each of the 2 benchmarks", "DenseFusion-1M (here: mid captions)", "59.7")
    assert [part for part in (*told, "the mid captioner") if part not in report("table1.md")] == []
    summary = facts["table1"]["summary"]
    assert summary.startswith("CapRL captions against none: ") and all(setting in summary for setting in settings)

    summary = facts["figure4"]["summary"]
    assert summary.startswith("no pairs to all: CapRL captions +40.0 [") and ", mid captions +20.0 [" in summary
    # a comparison that Table 1 makes is counted there alone
    assert [claim["same_as"] for claim in facts["figure4"]["claims"]] == ["", "Table 1 (3)", "Table 1 (1)", ""]
    alone = pretrained.pretraining.model_copy(update={"items": ["figure4"]})
    assert not any(claim.same_as for claim in figure4(pretrained.model_copy(update={"pretraining": alone})).claims)

    counts = page.write_claims(pretrained)["facts"]["counts"]
    assert counts["supported"] == 16 and counts["not run"] >= 20
    text = page.write_html(pretrained).read_text(encoding="utf-8")
    assert all(f'<section id="{name}">' in text for name in ("claims", *ITEMS)) and recorded(text) > 300
    cells = list(trace.cells_of(paths.reports_of("mini")))
    assert {cell.name[0] for cell in cells} == {"claims", *ITEMS}
    assert all(cell.sources for cell in cells)
    for told in map(trace.describe, {cell.name[:3]: cell for cell in cells}.values()):  # one of each row
        assert "    run      mini/" in told or "the paper's value as printed" in told, told


def test_a_row_is_the_mean_over_its_seeds_question_by_question(pretrained, vqa_run, no_figures):
    setting = pretrained.pretraining.settings[0]
    vqa_run(f"{setting}-caprl-1m-sft-seed1", 8)
    content = tables.write(pretrained, "table1")
    scores, gaps, captions = content["tables"][:3]
    rows = {row["label"]: dict(zip(scores["columns"], row["cells"], strict=True)) for row in scores["rows"]}
    ours = rows[f"{setting}, CapRL captions"]
    assert ours["Average"]["value"] == pytest.approx((12 + 8) / 2 / 20) and ours["Trainings"]["value"] == 2
    assert len(ours["Average"]["sources"]) == len(ours["Caption pairs"]["sources"]) == 2
    files = {run["file"] for run in content["runs"]}
    for stage, seed in (("vqa", 0), ("vqa", 1), ("pretraining", 0), ("pretraining", 1)):
        assert f"runs/mini/{stage}/{setting}-caprl-1m-sft-seed{seed}/result.json" in files
    assert f"runs/mini/pretraining/{setting}-caprl-1m-further-seed1/result.json" in files
    # nine rows of the first setting, five of each other; 60 and 40 % are SD 14.1 in one of them
    assert "over the 19 rows of pretraining" in gaps["notes"][1] and "varies by 3.2 points" in gaps["notes"][1]
    printed = dict(zip(captions["columns"], (cell["text"] for cell in captions["rows"][0]["cells"]), strict=True))
    assert printed["Captions"] == "10" and printed["Tokens"] == "12.3" and printed["Facts told (%)"] == "60.0"
    assert (printed["Cut (%)"], printed["Loops (%)"]) == ("0.0", "10.0")


def test_with_a_users_captions_no_model_of_ours_is_named(pretrained, report):
    further = pretrained.pretraining.further.model_copy(update={"data": "own/{name}.json"})
    settings = pretrained.pretraining.model_copy(update={"further": further})
    tables.write(pretrained.model_copy(update={"pretraining": settings}), "figure4")
    text, drawn = report("figure4.md"), report("figure4.svg")
    assert "files of the user (own/{name}.json)" in text
    assert "mid captions" not in text and "| DenseFusion-1M |" in text
    assert [name for name in ("Mini Infographic", "Average", "Vanilla", "DenseFusion-1M") if name not in drawn] == []
