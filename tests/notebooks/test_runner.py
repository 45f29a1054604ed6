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
from caprl_utils import run as runner
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.run import first_line, known_times, run_all

FIXTURES = Path(__file__).parent / "fixtures"
GOOD, SLOW = str(FIXTURES / "good.ipynb"), str(FIXTURES / "slow.ipynb")
pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(120)]


@pytest.fixture
def copies(runs_folder):
    return runs_folder / "smoke" / "notebooks"


@pytest.fixture
def start(runs_folder):
    """Start the runner on the slow notebook as a process of its own; none of them outlives the test."""
    started = []

    def call():
        command = [sys.executable, "-m", "caprl_utils", "run", SLOW, "--profile", "smoke"]
        started.append(subprocess.Popen(command, cwd=paths.ROOT, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run(capsys, runs_folder):
    """Run a notebook in this process; gives what is told, and the error behind it."""
    before = dict(os.environ)

    def call(notebook, *parameters):
        try:
            run_all([notebook], load_profile("smoke"), parameters)
        except UserError as error:
            return capsys.readouterr().err, str(error)
        return capsys.readouterr().err, ""

    yield call
    os.environ.clear()
    os.environ.update(before)


def pids_of_slow(runs_folder):
    """The processes of the slow notebook, once it runs."""
    while not (file := runs_folder / "pids").exists() or len(pids := file.read_text().split()) < 2:
        time.sleep(0.1)
    return [int(pid) for pid in pids]


def test_a_good_notebook_leaves_its_copy_dated_at_its_start_and_the_list_of_its_files(
    runs_folder, copies, run, tmp_path, monkeypatch
):
    other = {"argv": ["/nowhere/python", "-m", "ipykernel"], "display_name": "other", "language": "python"}
    write_json(tmp_path / "kernels" / "python3" / "kernel.json", other)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))  # the kernel is that of this interpreter all the same
    before = time.time()
    told, error = run(GOOD)
    assert not error and "good: done in" in told and "cell 3/6" in told
    assert not (copies / ".good.tmp.ipynb").exists()
    record = runs_folder / "smoke" / "fixture" / "good" / "result.json"
    assert before - 1 < (copies / "good.ipynb").stat().st_mtime < record.stat().st_mtime
    assert (copies / "good.files").read_text() == f"{record}\n"

    told, error = run(GOOD, "lr=1e-5")
    assert not error and "good-lr-1e-5: done in" in told
    assert set(known_times("smoke")) >= {"good", "good-lr-1e-5"}
    assert json.loads(record.read_text())["values"] == {"lr": 1e-5}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("broken", 'broken.ipynb, cell 4 (`raise ValueError("the tea is cold")`)\nValueError: the tea'),
        ("system_exit", "system_exit.ipynb, cell 4 (`sys.exit(0)`)\nthe notebook ended here without an error: a cell "),
        ("dead_kernel", "dead_kernel.ipynb, cell 4 (`os.kill(os.getpid(), signal.SIGKILL)`)\nthe kernel died"),
        ("missing_input", "stage/none is missing; make it: make 01_qa_curation PROFILE=smoke"),
    ],
)
def test_a_failure_is_told_and_kept_aside(copies, run, name, expected):
    _, error = run(str(FIXTURES / f"{name}.ipynb"))
    assert expected in error and f"the failed copy is {copies}/{name}.failed.ipynb" in error
    assert "Traceback" not in error
    assert sorted(f.name for f in copies.glob("*.ipynb")) == [f"{name}.failed.ipynb"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([GOOD, "sed=1"], "no parameter 'sed'; did you mean seed?; it has: lr, profile, seed"),
        ([GOOD, "seed=x"], "parameter seed is int, got 'x'"),
        ([GOOD, "rl.steps=3"], "it has: lr, profile, seed; a setting: --set rl.steps=3"),
        ([GOOD, "seed"], "-p seed: expected name=value, for example seed=1"),
        ([str(FIXTURES / "no_parameters.ipynb")], "has no cell tagged `parameters`"),
        (["no_such_notebook"], "no notebook notebooks/no_such_notebook.ipynb"),
        (["x.ipynb"], "x.ipynb is no notebook"),
    ],
)
def test_bad_arguments_run_nothing(runs_folder, run, arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.ipynb").write_text("{}")
    assert expected in run(*arguments)[1]
    assert not list(runs_folder.rglob("*.ipynb"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_runner_takes_kernel_and_children_along(runs_folder, start, number):
    process = start()
    pids = pids_of_slow(runs_folder)
    process.send_signal(number)
    message = process.communicate(timeout=60)[1]
    if number == signal.SIGINT:
        assert process.returncode == 130 and "stopped; run again to continue" in message
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
        time.sleep(0.1)
    assert not list(runs_folder.rglob("slow.ipynb"))


def test_a_second_runner_waits_for_the_first(runs_folder, start):
    first = start()
    pids_of_slow(runs_folder)
    assert f"waiting: slow (smoke) is in use by process {first.pid}" in start().stderr.readline()


def test_the_first_telling_line_of_a_cell():
    assert first_line("# why\n\nrun(1)\nx") == "run(1)" and first_line("") == "(empty)"
    assert len(first_line("x" * 200)) == 60


def test_what_a_chain_misses_is_told_whole_before_a_kernel_starts(runs_folder, monkeypatch):
    monkeypatch.setattr(runner, "ENVIRONMENT", runs_folder / "none")
    chain = ["01_qa_curation", "05_llamafactory_pretraining"]
    with pytest.raises(UserError, match=r"cannot run to its end here(?s:.*)make setup-llamafactory"):
        run_all(chain[:1], load_profile("smoke"), chain=chain)
    with pytest.raises(UserError, match=r"GPUs: 1 at once(?s:.*)model Qwen(?s:.*)benchmark ChartQA"):
        run_all(["01_qa_curation"], load_profile("one_gpu"), chain=["01_qa_curation", "04_prism_evaluation"])
    assert not list(runs_folder.rglob("*.ipynb"))


def test_missing_package_points_to_setup(tmp_path):
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError('no', name='pydantic')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(paths.ROOT)])}
    command = [sys.executable, "-m", "caprl_utils", "config"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "'pydantic' is missing" in done.stderr and "make setup" in done.stderr
