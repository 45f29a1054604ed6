"""The runner on small notebooks that work, break, lie and die: a failure names notebook, cell and cause."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest

from caprl_utils import paths
from caprl_utils import run as runner
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.run import known_times, run_all

FIXTURES = Path(__file__).parent / "fixtures"
GOOD = str(FIXTURES / "good.ipynb")
pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(120)]


@pytest.fixture
def copies(runs_folder):
    return runs_folder / "smoke" / "notebooks"


@pytest.fixture
def start():
    """Start the runner on the slow notebook as a process of its own; none of them outlives the test."""
    command = [sys.executable, "-m", "caprl_utils", "run", str(FIXTURES / "slow.ipynb"), "--profile", "smoke"]
    with ExitStack() as stack:

        def call():
            process = subprocess.Popen(command, cwd=paths.ROOT, stderr=subprocess.PIPE, text=True)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield call


@pytest.fixture
def run(capsys, runs_folder):
    """Run a notebook in this process; gives what is told, and the error behind it."""

    def call(notebook, *parameters, error=""):
        try:
            run_all([notebook], load_profile("smoke"), parameters)
        except UserError as raised:
            error = str(raised)
        return capsys.readouterr().err, error

    with patch.dict(os.environ):
        yield call


def test_a_good_notebook_leaves_its_copy_dated_at_its_start_and_the_list_of_its_files(
    runs_folder, copies, run, tmp_path, monkeypatch
):
    other = {"argv": ["/nowhere/python", "-m", "ipykernel"], "display_name": "other", "language": "python"}
    write_json(tmp_path / "kernels" / "python3" / "kernel.json", other)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))  # the kernel is that of this interpreter all the same
    before = time.time()
    told, error = run(GOOD, "lr=1e-5")
    assert not error and "good-lr-1e-5: done in" in told and "cell 3/6" in told
    assert not list(copies.glob(".*.ipynb")) and "good-lr-1e-5" in known_times("smoke")
    record = runs_folder / "smoke" / "fixture" / "good" / "result.json"
    assert before - 1 < (copies / "good-lr-1e-5.ipynb").stat().st_mtime < record.stat().st_mtime
    assert (copies / "good-lr-1e-5.files").read_text() == f"{record}\n"
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


@pytest.mark.timeout(300)
def test_a_killed_or_stopped_runner_takes_kernel_and_children_along_and_the_next_one_takes_over(runs_folder, start):
    """Two runners of one notebook: the second waits until `kill -9` ends the first, and is stopped by SIGTERM, which
    is handled as Ctrl-C is.
    """
    working, pids = start(), runs_folder / "pids"
    for number in (signal.SIGKILL, signal.SIGTERM):
        while not pids.exists() or len(pids.read_text().split()) < 2:
            time.sleep(0.1)
        children = [int(pid) for pid in pids.read_text().split()]
        pids.unlink()
        if number == signal.SIGKILL:
            second = start()
            assert f"waiting: slow (smoke) is in use by process {working.pid}" in second.stderr.readline()
        working.send_signal(number)
        message = working.communicate(timeout=60)[1]
        while any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in children):
            time.sleep(0.1)
        working, ended = second, working
    assert ended.returncode == 130 and "stopped; run again to continue" in message
    assert not list(runs_folder.rglob("slow.ipynb"))


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
