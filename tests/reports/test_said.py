"""What captions say, in reports: the table, the statements, the curve over a training, the page of examples."""

import json

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.image_sources import open_images
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.sources import image_ids
from caprl_utils.prism.told import counts
from caprl_utils.reports import claims, numbers, page, tables
from caprl_utils.reports.items import items
from caprl_utils.reports.results import Curve
from tests.reports.finished import evaluation, row

META = {"world": "mini-world", "facts": {"topic": "sales", "unit": "percent"}, "known": {}}
BASE = "This is a chart. The topic is sales."
OURS = "This is a chart. The topic is sales. The topic is sales. The unit is tons."
CHARTS = [f"mini-chart/i{n}" for n in range(8)]


def run_of(profile, name, texts):
    """A Prism run with these captions (image id -> caption, meta) of each image; every second question is right."""
    rows = [
        row(image.partition("/")[0], n, float(n % 2), image_id=image, caption=caption,
            num_tokens=len(caption.split())) | counts(caption, meta)
        for n, (image, (caption, meta)) in enumerate(texts.items())
    ]  # fmt: skip
    evaluation(profile, "prism", name, rows)


def test_the_table_and_the_statements(finished, results_of, cell, no_figures, report):
    """CapRL tells as much, and more that is false or said before."""
    runs = {"caprl-seed0": OURS, "caprl-seed1": OURS, **dict.fromkeys(("base-3b", "base-72b", "floor-empty"), BASE)}
    for name, text in runs.items():
        run_of(finished, name, dict.fromkeys(CHARTS, (text, META)))
    table = tables.said_table(results_of(finished))
    assert [label for label, _ in table.rows][:3] == ["base", "strong captioner", "CapRL"]
    assert cell(table, "CapRL", "Facts told (%)").text == "50.0"
    assert cell(table, "CapRL", "False (%)").value == pytest.approx(1 / 3)
    assert cell(table, "CapRL", "Repeats (%)").interval == pytest.approx((1 / 3, 1 / 3))
    gap = cell(table, "CapRL − base", "False a caption")
    assert gap.text == "+1.00 [1.00, 1.00]" and gap.sources[0].key == "wrong" and len(gap.sources) == 3
    found = {one["kind"]: one for one in tables.write(finished, "table3")["facts"]["claims"]}
    assert found["false share"]["value"] == pytest.approx(-1 / 3) and found["false count"]["value"] == -1.0
    assert found["false count"]["verdict"] == "not supported"
    assert "-1.00 statements a caption" in report("table3.md")


def test_false_statements_over_a_training_are_of_the_kept_captions(finished):
    few = finished.model_copy(update={"images": finished.images.model_copy(update={"num_images": 2})})
    image = next(open_images(few))
    key, fact = next(iter(image.meta["facts"].items()))
    said = [(1, ""), (1, ""), (2, fact), (2, "this")]
    rows = [{"step": step, "image_id": image.id, "caption": f"The {key} is {word}."} for step, word in said]
    curve = Curve("CapRL", [1, 2], [0.1, 0.2], [5.0, 6.0], "runs/mini/rl/caprl-seed0/curve.jsonl")
    assert tables.false_over_steps(few, [curve]) == []  # none kept
    file = paths.RUNS / "mini" / "rl" / "caprl-seed0" / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tables.false_over_steps(few, [curve]) == [[1.0, 0.5]]


def test_the_page_of_examples_marks_every_statement(finished, no_figures):
    profile = load_profile("mini", {"prism.num_samples": 6})
    samples = {image_ids(sample)[0]: sample for sample in load_samples(profile)}
    texts = {
        name: (f"{s.meta['true_caption']} The sugar is <b>. The sugar is <b>.", s.meta) for name, s in samples.items()
    }
    assert page.write_examples(profile) is None  # these captions are of other pictures
    for name in ("base-3b", "caprl-seed0", "base-72b"):
        run_of(profile, name, texts)
    file = page.write_examples(profile)
    text, before = file.read_text(), {f.name: f.read_bytes() for f in file.parent.rglob("*") if f.is_file()}
    assert text.count("| ![") == 12 and len(list((file.parent / "examples").glob("*.png"))) == 12
    assert "facts, 2 false.* This is a" in text and "**The sugar is \\<b\\>. ✗**" in text
    said = page.marked("The topic is sales. The topic is sales. The topic is prices. The topic", META)
    marks = "The topic is sales. ✓ ~~The topic is sales.~~ **The topic is prices. ✗** The topic"
    assert said == f"*1 of 2 facts, 1 false.* {marks}"
    _, html = page.chapter(file)
    assert "data:image/png;base64" in html and "<s>" in html and "<strong>" in html
    page.write_examples(profile)
    assert before == {f.name: f.read_bytes() for f in file.parent.rglob("*") if f.is_file()}


def test_rewards_on_one_footing(profile, prism_run, trained, cell, results_of, capsys, report):
    """Three rewards; correctness has nothing false, the last states nothing, the judge was not trained. Without known
    facts they have a figure of accuracy.
    """
    texts = {"short": OURS, "reward_correct": BASE, "reward_balanced": "This is a chart."}
    for by in ("", "-by-reward_reader"):
        prism_run(f"base-3b{by}", right=8)
    for name in texts:
        trained(name, 10)
    tables.write(profile, "extra_rewards")
    assert "accuracy (%)" in report("extra_rewards.svg")
    runs = {"base-3b": BASE} | {f"{name}-seed{seed}": text for name, text in texts.items() for seed in (0, 1)}
    for name, text in runs.items():
        for by in ("", "-by-reward_reader"):
            run_of(profile, f"{name}{by}", dict.fromkeys(CHARTS, (text, META)))
    content = tables.write(profile, "extra_rewards")
    table = tables.footing_table(results_of(profile, "extra_rewards"))
    utility, correct, silent = "CapRL (utility)", "utility and correctness", "precision, recall, fluency"
    assert [label for label, _ in table.rows] == ["base", utility, correct, silent]
    assert cell(table, correct, "by the reward's reader").value == 0.5
    assert cell(table, correct, "False (%)").value == 0 and cell(table, utility, "False (%)").text == "33.3"
    assert cell(table, silent, "Facts told (%)").value == 0 and cell(table, silent, "False (%)").text == numbers.MISSING
    assert cell(table, correct, "Reward calls a step").text == numbers.MISSING  # these trainings did not count
    found = {one["text"]: one for one in content["facts"]["claims"]}
    (checked,) = (one for text, one in found.items() if "checking sentences" in text)
    assert checked["verdict"] == "supported" and checked["value"] == pytest.approx(1 / 3)
    assert not any("linear penalty" in text for text in found)  # that row is not there
    drawn = report("extra_rewards.svg")
    assert "false statements (%), fewer is better" in drawn and correct in drawn and silent not in drawn
    of_paper = sum(len(item.claims) for item in items(profile).values() if not item.ours)
    assert claims.write_claims(profile)["facts"]["statements"] == of_paper  # those of later papers are not among them
    text = report("claims.md")
    assert text.count("| CCCaption: checking sentences") == 1 and "## What follow-up papers state" in text
    assert "make it: make rewards" not in capsys.readouterr().err
