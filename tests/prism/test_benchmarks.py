"""The registry: complete, typed, and without a doubtful entry."""

import pytest

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import benchmarks_of_table, get_benchmark, load_registry, overview
from caprl_utils.prism.loading import how_to_get
from caprl_utils.schema import PRISM_BENCHMARKS


def columns_of(table):
    header = (paths.PAPER / table).read_text(encoding="utf-8").splitlines()[0].split(",")
    return [name for name in header[2:] if name != "Average"]


def test_the_benchmarks_of_the_paper_and_the_branches_of_the_authors_scorer():
    assert len(benchmarks_of_table(3)) == len(columns_of("table3_prism.csv")) == 11
    assert len(benchmarks_of_table(1)) == len(columns_of("table1_pretraining.csv")) == 12
    assert [facts.key for facts in benchmarks_of_table(3)] == PRISM_BENCHMARKS
    branches = {facts.key: facts.caprl.branch for facts in benchmarks_of_table(3)}
    charts = dict.fromkeys(("chartqa", "chartqapro", "charxiv"), "chart")
    assert branches == dict.fromkeys(branches, "symbolic") | charts | {"infovqa": "info"}


def test_every_benchmark_tells_where_it_is_and_unknown_ones_name_the_nearest():
    assert {"visulogic", "captionqa"} <= set(load_registry())
    for facts in load_registry().values():
        if facts.hub is None:
            assert facts.loader or facts.key == "seed2k"
        else:
            assert facts.hub.id in how_to_get(facts) and facts.columns and facts.size
    lines = overview().splitlines()
    assert [line.split()[0] for line in lines] == list(load_registry())
    assert "2500 rows" in lines[0] and lines[0].endswith("tables 1, 2, 3")
    with pytest.raises(UserError, match="chartqapro"):
        get_benchmark("chartqapor")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmarks: [{key: x, name: X, answer: short, metric: anls, colour: red}]", "colour"),
        ("benchmarks: [{key: x, name: X, answer: sometimes, metric: anls}]", "answer"),
        ("benchmarks: [&b {key: x, name: X, answer: short, metric: a}, *b]", "keys given twice: x"),
        ("benchmarks: [", "valid registry"),
    ],
)
def test_a_wrong_registry_is_named(tmp_path, text, message):
    file = tmp_path / "benchmarks.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_registry(file)
