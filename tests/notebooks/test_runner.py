"""The runner on small notebooks that work, break, lie and die: a failure names notebook, cell and cause."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.runner import times
from caprl_utils.runner.cli import main
from caprl_utils.runner.monitor import Place, duration, first_line
from caprl_utils.runner.parameters import parse_parameters
from caprl_utils.runner.stamps import is_valid, read_notebook

FIXTURES = Path(__file__).parent / "fixtures"
pytestmark = pytest.mark.notebooks


@pytest.fixture
def start(runs_folder):
    """Start the runner as a process of its own; none of them outlives the test."""
    started = []

    def call(*arguments):
        command = [sys.executable, "-m", "caprl_utils.runner", *arguments, "--profile", "smoke"]
        process = subprocess.Popen(command, cwd=paths.ROOT, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def run(capsys, runs_folder):
    """Run the command line in this process; gives (exit status, what stderr says)."""
    before = dict(os.environ)

    def call(*arguments):
        status = main([*arguments, "--profile", "smoke"])
        return status, capsys.readouterr().err

    yield call
    os.environ.clear()
    os.environ.update(before)


def fixture(name):
    return str(FIXTURES / f"{name}.ipynb")


def wait_for(condition, sec=60):
    deadline = time.monotonic() + sec
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def test_a_good_notebook_runs_once(runs_folder, run):
    folder = runs_folder / "smoke" / "notebooks"
    status, message = run(fixture("good"))
    assert status == 0, message
    assert "good: done in" in message and "cell 3/6" in message
    assert (folder / "good.ipynb").is_file() and not (folder / ".good.tmp.ipynb").exists()

    status, message = run(fixture("good"))
    assert status == 0 and "everything is up to date" in message and "cell" not in message

    (runs_folder / "smoke" / "fixture" / "good" / "result.json").unlink()
    status, message = run(fixture("good"), "-p", "lr=1e-5")
    assert set(times.expected("smoke")) >= {"good", "good-lr=1e-5"}
    assert status == 0 and "good-lr=1e-5: done in" in message
    record = json.loads((runs_folder / "smoke" / "fixture" / "good" / "result.json").read_text())
    assert record["values"] == {"lr": 1e-5}


def test_a_record_that_is_gone_makes_its_notebook_stale(tmp_path):
    record, stamp = tmp_path / "result.json", tmp_path / "good.json"
    record.write_text("{}")
    (tmp_path / "good.ipynb").write_text("{}")
    stamp.write_text(json.dumps({"key": "k", "files": {str(record): "44136fa355b3678a"}}))
    assert is_valid(stamp, "k") and not is_valid(stamp, "other")
    record.write_text("{ }")
    assert not is_valid(stamp, "k")
    record.unlink()
    assert not is_valid(stamp, "k")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "broken",
            ['broken.ipynb, cell 4 (`raise ValueError("the tea is cold")`)', "ValueError: the tea is cold"],
        ),
        ("system_exit", ["system_exit.ipynb, cell 4 (`sys.exit(0)`)", "must not call exit()"]),
        ("dead_kernel", ["dead_kernel.ipynb, cell 4", "the kernel died"]),
        ("missing_input", ["stage/none is missing; make it: make 01_qa_curation PROFILE=smoke"]),
    ],
)
def test_a_failure_is_told_and_kept_aside(runs_folder, run, name, expected):
    status, message = run(fixture(name))
    assert status == 1
    for text in [*expected, f"the failed copy is {runs_folder}/smoke/notebooks/{name}.failed.ipynb"]:
        assert text in message
    assert "Traceback" not in message
    left = sorted(f.name for f in (runs_folder / "smoke" / "notebooks").glob("*.ipynb"))
    assert left == [f"{name}.failed.ipynb"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [fixture("good"), "-p", "sed=1"],
            "no parameter 'sed'; did you mean seed?; it has: lr, profile, seed",
        ),
        ([fixture("good"), "-p", "seed=x"], "parameter seed is int, got 'x'"),
        ([fixture("good"), "-p", "seed"], "-p seed: expected name=value"),
        ([fixture("no_parameters")], "has no cell tagged `parameters`"),
        (["no_such_notebook"], "no notebook notebooks/no_such_notebook.ipynb"),
    ],
)
def test_bad_arguments_run_nothing(runs_folder, run, arguments, expected):
    status, message = run(*arguments)
    assert status == 1 and expected in message
    assert not list(runs_folder.rglob("*.ipynb"))


def test_interrupt_stops_cleanly(runs_folder, start):
    process = start(fixture("slow"))
    pids = wait_for(lambda: _pids(runs_folder))
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "stopped; run again to continue" in message
    wait_for(lambda: not _alive(pids), 15)


def test_a_killed_runner_takes_kernel_and_children_along(runs_folder, start):
    process = start(fixture("slow"))
    pids = wait_for(lambda: _pids(runs_folder))
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not _alive(pids), 15)
    assert not list(runs_folder.rglob("slow.ipynb"))


def test_a_second_runner_waits_for_the_first(runs_folder, start):
    first = start(fixture("slow"))
    wait_for(lambda: _pids(runs_folder))
    second = start(fixture("slow"))
    try:
        line = wait_for(second.stderr.readline)
        assert f"waiting: slow (smoke) is in use by process {first.pid}" in line
    finally:
        for process in (second, first):
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def _pids(runs_folder):
    file = runs_folder / "pids"
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def _alive(pids):
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def test_parameters_are_read_as_numbers_words_and_lists():
    items = ["lr=1e-5", "n=3", "name=x=y", "on=true", "none=null", "names=[a, b]", "word=yes please"]
    assert parse_parameters(items) == {
        "lr": 1e-5, "n": 3, "name": "x=y", "on": True, "none": None, "names": ["a", "b"],
        "word": "yes please",
    }  # fmt: skip


def test_what_is_no_notebook_is_named(tmp_path):
    (tmp_path / "x.ipynb").write_text("{}")
    with pytest.raises(UserError, match=r"x\.ipynb is no notebook"):
        read_notebook(tmp_path / "x.ipynb")


def test_lines_of_the_monitor():
    assert first_line("# why\n\nrun(1)\nx") == "run(1)"
    assert first_line("") == "(empty)"
    assert len(first_line("x" * 200)) == 60
    assert [duration(s) for s in (5, 65, 3605)] == ["0:05", "1:05", "1:00:05"]


def test_time_left_counts_the_notebooks_to_come_and_is_not_guessed():
    place = Place(1, 3, {"a": 60.0, "b": 120.0, "c": 300.0}, ("b", "c"))
    assert place.head() == "[1/3] " and place.left("a", 30) == " [all: about 8 min left]"
    assert place.left("a", 500) == " [all: about 7 min left]"  # late: what comes after is left at least
    assert place.left("new", 0) == "" and Place().head() == "" and Place().left("a", 0) == ""


def test_the_longest_time_of_a_notebook_is_kept(runs_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(times, "REPORT", tmp_path / "times.json")
    assert times.main(["smoke"]) == 1 and "nothing measured yet" in capsys.readouterr().err
    times.note("smoke", "a", 60.04)
    times.note("smoke", "a", 2.0)  # found its results made
    assert times.expected("smoke") == {"a": 60.0}
    assert times.main(["smoke"]) == 0 and json.loads(times.REPORT.read_text()) == {"smoke": {"a": 60.0}}


def test_missing_package_points_to_setup(tmp_path):
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError('no', name='pydantic')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(paths.ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "caprl_utils.runner", "x"], env=environment, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "package 'pydantic' is missing" in done.stderr
        and "make setup" in done.stderr
    )
