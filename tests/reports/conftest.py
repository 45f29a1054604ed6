"""Profile mini with runs as `finished` makes them, and what tests look at reports with."""

import re
from contextlib import contextmanager
from functools import cache
from unittest.mock import MagicMock

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.files import write_atomic
from caprl_utils.reports import figures, page
from caprl_utils.reports.items import items
from caprl_utils.reports.results import load
from tests.reports import finished as made


@cache
def profile_named(name):
    over = {"prism.bootstrap_draws": 500, "rl.seeds": [0, 1], "ablations.seeds": [0, 1], "pretraining.seeds": [0, 1]}
    return load_profile(name, over)


@pytest.fixture
def profile(tmp_path, monkeypatch, request):
    """Profile mini, or the test's parameter, with two trainings a row; published reports are the test's own."""
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    return profile_named(getattr(request, "param", "mini"))


@pytest.fixture
def prism_run(profile):
    """Makes a Prism run with two captions an image."""

    def make(name, right, tokens=20, **more):
        own = {} if profile.name == "mini" else {"benchmarks": profile.prism.benchmarks}
        made.answered(profile, "prism", name, right, tokens, captions=2, **own | more)

    return make


@pytest.fixture
def trained(profile, prism_run):
    """Makes trainings with these seeds that come out alike, each with its curve and its evaluation."""

    def make(experiment, right, images=40, tokens=20, rises=True, seeds=(0, 1)):
        for seed in seeds:
            made.training(profile, f"{experiment}-seed{seed}", images, tokens, rises)
            prism_run(f"{experiment}-seed{seed}", right, tokens)

    return make


@pytest.fixture
def finished(profile, prism_run, trained):
    """Base, CapRL with its training, 72B and a floor are done."""
    prism_run("base-3b", right=8)
    trained("caprl", right=14, tokens=40)
    prism_run("base-72b", right=18, tokens=45)
    prism_run("floor-empty", right=1, tokens=0)
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

    @contextmanager
    def drawn(stem, note, title, panels, *_, **__):
        yield [MagicMock() for _ in range(panels)]
        write_atomic(stem.with_name(f"{stem.name}.svg"), "<svg/>")

    monkeypatch.setattr(figures, "drawn", drawn)


@pytest.fixture
def recorded():
    """Checks a page: every number of a result, in tables and in sentences, leads to its record, which names n, seeds,
    commit and rows; returns how many numbers the tables have.
    """

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
def report():
    """Text of a report of mini by its file's name."""
    return lambda name: (paths.reports_of("mini") / name).read_text(encoding="utf-8")


@pytest.fixture
def with_seeds():
    """A profile with these seeds of the main experiment."""
    return lambda profile, *seeds: profile.model_copy(
        update={"rl": profile.rl.model_copy(update={"seeds": list(seeds)})}
    )
