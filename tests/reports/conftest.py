"""Finished runs with known scores, written by the same code that real runs use."""

import json
import re

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.files import write_atomic
from caprl_utils.prism import scores, told
from caprl_utils.reports import figures, page
from caprl_utils.reports.items import items
from caprl_utils.reports.results import load
from caprl_utils.runs import Run

RECIPE = ["caprl_utils.errors"]


def evaluate(
    profile, stage, name, right, tokens=None, benchmarks=("mini-chart", "mini-scene"), captions=1, unscored=()
):
    """An evaluation in which the first `right` of every 20 of 40 images are answered right.

    unscored: benchmarks, or samples of one (benchmark, number), that have no score.
    """
    shared = {"question": "What is it?", "options": [], "gold": "7", "answer": "7", "letter_mass": None,
              "parsed": "7", "reason": None, "finish_reason": "stop", "model": name, **dict.fromkeys(told.COLUMNS),
              "num_tokens": None if tokens is None else int(tokens)}  # fmt: skip
    rows = [
        shared | {"benchmark": benchmark, "sample_id": f"s{n}", "image_id": f"{benchmark}/i{n}", "caption_index": index,
                  "caption": f"caption {index} of {n}",
                  "score": None if {benchmark, (benchmark, n)} & {*unscored} else float(n % 20 < right)}
        for benchmark in benchmarks for n in range(40) for index in range(captions)
    ]  # fmt: skip
    with Run.open(profile, stage, name, {"right": right}, RECIPE) as run:
        scores.write_samples(run.folder / "samples.parquet", rows, name)
        summary = scores.summarise(rows, profile.prism.bootstrap_draws, profile.seed)
        reader = {"name": "r", "mode": "choice"}
        run.finish(**summary, unit="sample", label=name, captions_per_image=captions, reader=reader)


@pytest.fixture
def profile(tmp_path, monkeypatch, request):
    """Profile mini, or the test's parameter, with two trainings a row; published reports are the test's own."""
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    over = {"prism.bootstrap_draws": 500, "rl.seeds": [0, 1], "ablations.seeds": [0, 1], "pretraining.seeds": [0, 1]}
    return load_profile(getattr(request, "param", "mini"), over)


@pytest.fixture
def prism_run(profile):
    """Makes a Prism run with two captions an image."""

    def make(name, right, tokens=20.0, **more):
        own = {} if profile.name == "mini" else {"benchmarks": profile.prism.benchmarks}
        evaluate(profile, "prism", name, right, tokens, captions=2, **own | more)

    return make


@pytest.fixture
def trained(profile, prism_run):
    """Makes trainings with these seeds that come out alike, each with its curve and its evaluation."""

    def make(experiment, right, images=40, tokens=20.0, rises=True, seeds=(0, 1)):
        about = {"name": experiment, "description": "as in the paper", "rl": {"group_size": 8},
                 "reward": {"judge": "qa"}, "data": {"file": "curation/main/qa.parquet"}}  # fmt: skip
        values = {"steps": 12, "reward_first": 0.25, "reward_last": 0.7}
        rows = [{"step": n, "reward": 0.3 + 0.03 * n * rises, "completion_tokens": tokens + n} for n in range(1, 13)]
        for seed in seeds:
            name = f"{experiment}-seed{seed}"
            with Run.open(profile, "rl", name, {"questions": "q"}, RECIPE) as run:
                (run.folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                run.finish(values=values, n=images, unit="image", seeds=[seed], experiment=about)
            prism_run(name, right, tokens)

    return make


@pytest.fixture
def finished(profile, prism_run, trained):
    """Base, CapRL with its training, 72B and a floor are done."""
    prism_run("base-3b", right=8)
    trained("caprl", right=14, tokens=40.0)
    prism_run("base-72b", right=18, tokens=45.0)
    prism_run("floor-empty", right=1, tokens=0.0)
    return profile


@pytest.fixture
def table5(profile, prism_run, trained):
    """Table 5 is done."""
    prism_run("base-3b", right=8)
    for name, right in (("rounds_1", 10), ("rounds_2", 12), ("short", 14), ("rounds_8", 14)):
        trained(name, right)
    return profile


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longest: empty pictures, for tests of anything else."""

    def save(figure, stem, note=""):
        write_atomic(stem.with_name(f"{stem.name}.svg"), "<svg/>")

    monkeypatch.setattr(figures, "save", save)


@pytest.fixture
def recorded():
    """Checks a page: every number of a result, in tables and in sentences, leads to its record, which names n, seeds,
    commit and rows; returns how many numbers the tables have."""

    def check(text):
        dts = dict(re.findall(r'<dt id="([^"]+)">.*?</dt>\s*<dd>(.*?)</dd>', text, re.DOTALL))
        tables = "".join(re.findall(r'<table id="[^"]+".*?</table>', text, re.DOTALL))
        cells = re.findall(r"<td>(.*?)</td>", tables, re.DOTALL)
        numbers = [cell for cell in cells if re.match(r"(p [=<] )?[+-]?\d", re.sub("<[^>]+>", "", cell))]
        for cell in numbers:
            anchor = re.match(r'<a href="#([^"]+)"', cell)
            assert anchor and anchor[1] in dts, cell
            for name in re.findall(r'href="#([^"]+)"', dts[anchor[1]]) or [anchor[1]]:
                told = ("n = ", "; seed", "; commit ", "; rows: ", "made by <code>")
                assert dts[name] == "The paper's values as printed." or all(part in dts[name] for part in told), name
        prose = re.sub(r"<(nav|style|table|dl|h\d)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert all(anchor in dts for anchor in re.findall(r'<a class="number" href="#([^"]+)"', prose))
        prose = re.sub(r"<a\b.*?</a>|<[^>]+>", "", prose, flags=re.DOTALL)
        assert not (left := page.NUMBER.findall(prose)), left
        return len(numbers)

    return check


@pytest.fixture
def results_of():
    """The results of an item by its name."""
    return lambda profile, name="table3": load(profile, items(profile)[name])


@pytest.fixture
def cell():
    """A cell of a table by row label and column head."""
    return lambda table, row, column: dict(table.rows)[row][list(table.columns).index(column)]


@pytest.fixture
def with_seeds():
    """A profile with these seeds of the main experiment."""
    return lambda profile, *seeds: profile.model_copy(
        update={"rl": profile.rl.model_copy(update={"seeds": list(seeds)})}
    )


@pytest.fixture
def evaluation():
    """The function evaluate."""
    return evaluate
