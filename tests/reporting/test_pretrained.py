"""Tables 1 and 2 and Figure 4 from finished runs with known scores."""

import json

import pytest

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.evaluation import prism_scores
from caprl_utils.pretraining.sets import finals, wanted
from caprl_utils.reporting import claims_page, figure4, html, table1, table2, trace
from caprl_utils.reporting.tables import from_record_path, look_up
from caprl_utils.runs import Run

RIGHT = {"vanilla": 4, "sharegpt4v-1m": 6, "densefusion-1m": 8, "caprl-1m": 12, "caprl-5m": 15,
         "caprl-sharegpt4v-1m": 11, "caprl-densefusion-1m": 12, "densefusion-1m-x0.5": 7,
         "caprl-1m-x0.5": 9}  # fmt: skip


def vqa_run(profile, name, right):
    """An evaluation in which the first `right` of every 20 images are answered right."""
    shared = {"question": "What is it?", "options": [], "gold": "7", "answer": "7", "letter_mass": None, "parsed": "7",
              "reason": None, "finish_reason": None, "num_tokens": None, "caption": None,
              "caption_index": 0}  # fmt: skip
    rows = [
        {**shared, "benchmark": benchmark, "sample_id": f"s{n}", "image_id": f"{benchmark}/i{n}",
         "score": float(n % 20 < right)}
        for benchmark in ("mini-chart", "mini-infographic")
        for n in range(40)
    ]  # fmt: skip
    with Run.open(profile, "vqa", name, {"right": right}, ["caprl_utils.evaluation.prism_scores"]) as run:
        prism_scores.write_samples(run.folder / "samples.parquet", rows, name)
        run.finish(**prism_scores.summarise(rows, 500, 0), unit="sample", label=name)


@pytest.fixture
def pretrained(profile):
    """All trainings of the profile and their evaluations."""
    settings = profile.pretraining
    for training in wanted(settings):
        with Run.open(profile, "pretraining", training.name, {}, ["caprl_utils.errors"]) as run:
            run.finish(values={"steps": 3}, n=training.num_rows(settings), unit="row")
    for name in finals(settings):
        slug = next(s for s in sorted(RIGHT, key=len, reverse=True) if name.endswith(f"-{s}-sft"))
        vqa_run(profile, name, RIGHT[slug])


@pytest.mark.parametrize(("module", "num_rows"), [(table1, 15), (table2, 5), (figure4, 5)])
def test_items_are_written_twice_alike_and_every_number_has_its_source(
    module, num_rows, profile, pretrained, tmp_path
):
    content = module.write(profile, tmp_path / "a")
    module.write(profile, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    scores, gaps = content["tables"][:2]
    assert len(scores["rows"]) == num_rows and gaps["rows"]
    for row in scores["rows"]:
        for cell in row["cells"]:
            for source in cell["sources"]:
                record = json.loads(from_record_path(source["file"]).read_text())
                assert look_up(record, source["key"]) == pytest.approx(cell["value"])
        assert all(cell["sources"] or cell["value"] == 0 for cell in row["cells"])


def test_table_1_has_the_values_and_the_verdicts(profile, pretrained, tmp_path):
    content = table1.write(profile, tmp_path)
    rows = {row["label"]: row["cells"] for row in content["tables"][0]["rows"]}
    setting = profile.pretraining.settings[0]
    place = content["tables"][0]["columns"].index("Average")
    assert rows[f"{setting}, Vanilla"][place]["value"] == pytest.approx(0.2)
    assert rows[f"{setting}, CapRL-1M"][place]["value"] == pytest.approx(0.6)
    assert rows[f"{setting}, CapRL-1M"][-1]["value"] == profile.pretraining.further.num_rows
    assert rows[f"{setting}, Vanilla"][-1]["text"] == "0"
    assert {claim["verdict"] for claim in content["facts"]["claims"]} == {"supported"}
    text = (tmp_path / "table1.md").read_text()
    assert "zoo:vlm-7b" in text and "59.7" in text and "shares one alignment" not in text


def test_figure_4_stands_in_the_order_of_sizes(profile, pretrained, tmp_path):
    content = figure4.write(profile, tmp_path)
    assert (tmp_path / "figure4.svg").stat().st_size > 0 and (tmp_path / "figure4.png").stat().st_size > 0
    assert "20.0 to 60.0" not in content["facts"]["summary"] and "40.0 to 60.0" in content["facts"]["summary"]


def test_what_is_missing_is_named_with_its_command(profile, tmp_path):
    with pytest.raises(UserError, match=r"no Vqa result of Vanilla .* make 04_llamafactory_pretraining"):
        table2.write(profile, tmp_path)


def test_claims_trace_and_page_take_these_items_as_they_come(profile, pretrained):
    for module in (table1, table2, figure4):
        module.write(profile)
    counts = claims_page.write(profile)["facts"]["counts"]
    assert counts["supported"] == 18 and counts["not run"] >= 30
    page = html.write(profile).read_text(encoding="utf-8")
    assert all(f'<section id="{name}">' in page for name in ("claims", "table1", "table2", "figure4"))
    cells = list(trace.cells_of(paths.REPORTS / "mini"))
    assert {cell.report for cell in cells} == {"claims", "table1", "table2", "figure4"}
    for cell in cells:
        told = trace.describe(cell)
        assert "no source on record" not in told, told
        assert "    run      mini/" in told or "the paper's value as printed" in told, told
