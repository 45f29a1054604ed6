"""Tables 4 to 6, Figures 1c and 5: rows, differences and verdicts from runs with known scores."""

import json
import math

import pytest

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.reporting import ablations, claims
from caprl_utils.reporting.ablation_items import BY_NAME, ITEMS
from caprl_utils.reporting.results import load
from caprl_utils.reporting.tables import from_record_path, look_up
from caprl_utils.rl.experiment import experiment_names
from caprl_utils.runs import Run, load_result
from caprl_utils.schema import ABLATIONS


@pytest.fixture
def trained(profile, prism_run):
    """Makes a training with its curve, and its evaluation."""

    def make(experiment, right, images=40, tokens=20.0, rises=True):
        name = f"{experiment}-seed0"
        with Run.open(profile, "rl", name, {"name": name}, ["caprl_utils.errors"]) as run:
            rows = [
                {"step": n, "reward": 0.3 + (0.03 * n if rises else 0.0), "completion_tokens": tokens + n}
                for n in range(1, 13)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (run.folder / "curve.jsonl").write_text(lines)
            run.finish(values={"steps": 12}, n=images, unit="image", seeds=[0])
        prism_run(profile, name, right=right, tokens=tokens)

    return make


@pytest.fixture
def table5(profile, prism_run, trained):
    prism_run(profile, "base-3b", right=8)
    for name, right in (("rounds_1", 10), ("rounds_2", 12), ("short", 14), ("rounds_8", 14)):
        trained(name, right)
    return profile


def test_rows_images_and_differences(table5, tmp_path):
    content = ablations.write(table5, BY_NAME["table5"], tmp_path)
    scores, gaps, paper = content["tables"]
    assert [row["label"] for row in scores["rows"]] == ["3B (base)", "N = 1", "N = 2", "N = 4", "N = 8"]
    assert scores["columns"][-3:] == ["Training images", "Steps", "Trainings"]
    base, one = scores["rows"][0]["cells"], scores["rows"][1]["cells"]
    assert [cell["value"] for cell in base[-3:]] == [None, None, None]
    assert [cell["value"] for cell in one[-3:]] == [40, 12, 1]
    average = scores["columns"].index("Average")
    assert one[average]["value"] == pytest.approx(0.5)
    assert gaps["rows"][2]["label"] == "N = 4 − N = 1"
    assert gaps["rows"][2]["cells"][-1]["value"] == pytest.approx(0.2)
    assert paper["rows"][2]["cells"][-1]["text"] == "48.4"
    for row in scores["rows"]:
        for cell in row["cells"]:
            for source in cell["sources"][:1]:
                assert look_up(load_result(from_record_path(source["file"])), source["key"]) is not None


def test_verdicts(table5, tmp_path):
    content = ablations.write(table5, BY_NAME["table5"], tmp_path)
    verdicts = [claim["verdict"] for claim in content["facts"]["claims"]]
    assert verdicts == ["supported", "supported", "supported"]  # N=8 equals N=4 on every image
    text = (tmp_path / "table5.md").read_text()
    assert "Beyond four rounds there is no gain: **supported**, 0.0 points [0.0, 0.0]" in text
    assert "never mixed with ours" in text
    assert content["facts"]["summary"].startswith("50.0 to 70.0 (+20.0 [+")


def test_claims_about_groups_of_benchmarks(profile, prism_run, trained, tmp_path):
    prism_run(profile, "base-3b", right=8)
    trained("documents", 12)
    trained("natural", 8)
    content = ablations.write(profile, BY_NAME["figure5_left"], tmp_path)
    assert [c["verdict"] for c in content["facts"]["claims"]] == ["supported", "undecided", "supported"]
    assert (tmp_path / "figure5_left.svg").stat().st_size > 0


def test_figure_1c_tells_length_and_reward(profile, prism_run, trained, tmp_path):
    prism_run(profile, "base-3b", right=8, tokens=20)
    trained("judge_unified", 2, tokens=5, rises=False)
    trained("judge_vlm", 10, tokens=40)
    trained("caprl", 14, tokens=30)
    content = ablations.write(profile, BY_NAME["figure1c"], tmp_path)
    assert {c["verdict"] for c in content["facts"]["claims"]} == {"supported"}
    shrunk = content["facts"]["claims"][0]
    assert (shrunk["kind"], shrunk["value"]) == ("tokens", pytest.approx(15.0))
    assert content["tables"][2]["rows"][0]["cells"][2]["value"] == pytest.approx(5 + 5.5)
    assert (tmp_path / "figure1c.svg").is_file()


def test_growth_over_images(profile, prism_run, trained, tmp_path):
    prism_run(profile, "base-3b", right=8)
    for name, right, images in (("images_10", 10, 4), ("images_30", 12, 12), ("short", 14, 40)):
        trained(name, right, images)
    ablations.write(profile, BY_NAME["figure5_right"], tmp_path)
    rows = BY_NAME["figure5_right"].rows
    results = load(profile, [row.entry() for row in rows], needed=())
    records = {r.label: ablations.training_records(profile, r) for r in rows}
    line = ablations.growth(results, records)["average"]
    assert [point[0] for point in line] == [0, 4, 12, 40]
    assert [point[1] for point in line] == pytest.approx([0.4, 0.5, 0.6, 0.7])


def test_same_results_same_bytes(table5, tmp_path):
    for name in ("one", "two"):
        ablations.write(table5, BY_NAME["table5"], tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        assert str(tmp_path) not in file.read_text()


def test_what_is_missing_is_left_out_or_named(table5, capsys):
    done = ablations.write_all(table5)
    assert list(done) == ["table5"]
    assert "table4: left out, not there yet: questions_1-seed0, questions_2-seed0" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"table6 needs leaking-seed0, refined-seed0; make them"):
        ablations.write_all(table5, ["table6"])
    with pytest.raises(UserError, match=r"no item 'tabel5'; did you mean table5\?"):
        ablations.write_all(table5, ["tabel5"])


def test_every_row_is_an_experiment_that_some_profile_trains():
    rows = {row.experiment for item in ITEMS for row in item.rows} - {None, "caprl"}
    assert rows <= set(experiment_names())
    assert rows - {"sampled"} <= set(ABLATIONS)  # the paper's own reward is sampled already
    for item in ITEMS:
        labels = {row.label for row in item.rows}
        asked = {c.ours for c in item.claims} | {c.theirs for c in item.claims if c.theirs}
        assert asked | {label for pair in item.pairs for label in pair} | set(item.needed) <= labels, (
            item.name
        )
        assert item.paper is None or (paths.PAPER / item.paper[0]).is_file()


@pytest.mark.parametrize(
    ("low", "high", "word"), [(-0.02, 0.005, "supported"), (0.001, 0.03, "not supported"), (-0.01, 0.02, "undecided")]
)  # fmt: skip
def test_no_gain(low, high, word):
    assert claims.no_gain(low, high) == word


def test_rise_by_hand():
    value, low, high = claims.rise([0.0, 0.2, 0.5, 0.7])
    # windows of two: means 0.1 and 0.6, each with variance 0.02 / 2
    assert value == pytest.approx(0.5)
    half = 1.959964 * math.sqrt(0.02)
    assert (low, high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert claims.rise([0.5, 0.6, 0.7]) is None  # too few steps at either end for a spread


def test_experiments_of_items():
    assert ablations.experiments_of(["table5", "figure5_right"]) == [
        "rounds_1", "rounds_2", "short", "rounds_8", "images_10", "images_30",
    ]  # fmt: skip
