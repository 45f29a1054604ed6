"""The training as a process, or as two: SIGTERM saves and stops, `kill -9` loses nothing, failures name their cause."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from caprl_utils import paths
from caprl_utils.models.server import free_port
from caprl_utils.rl.policy import last_complete
from caprl_utils.rl.train import STOPPED
from caprl_utils.runs import checkpoints_in
from tests.rl.conftest import STEPS


def start(world: Path, runs: Path, log: Path, processes: int = 1) -> subprocess.Popen:
    """One training of the small world, in one process or several; its runs lie in `runs`."""
    launcher = [
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        str(free_port()),
        "-m",
    ]
    module = ["caprl_utils.rl.train", "--experiment", str(world / "small.yaml")]
    return subprocess.Popen(
        [sys.executable, "-m", *(launcher if processes > 1 else []), *module, "--profile", str(world / "tiny.yaml")],
        cwd=paths.ROOT, stdout=open(log, "ab"), stderr=subprocess.STDOUT,
        env={**os.environ, "CAPRL_RUNS": str(runs), "PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def rows(folder: Path) -> list[dict]:
    """A finished training's curve, without its times."""
    found = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in found]


def assert_same_runs(a: Path, b: Path) -> None:
    """The same steps with the same losses, KL and rewards, and the same final weights."""
    assert len(rows(a)) == len(rows(b)) == STEPS
    for one, other in zip(rows(a), rows(b), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert rows(a)[-1]["kl"] > 1e-3  # a reference loaded from the checkpoint would give 0
    assert_same_weights(a / "final", b / "final")


def wait_for(process: subprocess.Popen, happened, log: Path, patience_sec: float = 600) -> None:
    deadline = time.monotonic() + patience_sec
    while not happened():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def steps_in(curve: Path) -> int:
    """Whole rows of a training's curve so far."""
    return curve.read_text().count("\n") if curve.exists() else 0


@pytest.fixture
def copied(world, tmp_path) -> Path:
    """Run folders of this test's own, with the questions in them."""
    from tests.rl.conftest import write_questions

    write_questions(tmp_path / "here" / "tiny" / "curation" / "main" / "qa.parquet", num_images=6)
    return tmp_path / "here"


def moved(runs: Path, other: Path) -> Path:
    """Run folders of their own with the questions of `runs`, which loses them."""
    (other / "tiny").mkdir(parents=True)
    (runs / "tiny" / "curation").rename(other / "tiny" / "curation")
    return other


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_stopped_killed_and_resumed_equals_uninterrupted(world, copied, tmp_path):
    """Stopped after the first step, then killed at a random moment of the rest."""
    kill_at = random.randrange(1, STEPS)
    print(f"killed after step {kill_at}")
    folder, log = copied / "tiny" / "rl" / "small-seed0", tmp_path / "log"
    curve = folder / "curve.jsonl"

    process = start(world, copied, log)
    wait_for(process, lambda: steps_in(curve) >= 1, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == STOPPED, log.read_text()
    assert last_complete(folder) is not None and not (folder / "result.json").exists()

    process = start(world, copied, log)
    wait_for(process, lambda: steps_in(curve) > kill_at, log)
    process.kill()
    process.wait()

    assert start(world, copied, log).wait() == 0, log.read_text()
    assert json.loads((folder / "result.json").read_text())["values"]["steps"] == STEPS
    assert checkpoints_in(folder) == []

    other = moved(copied, tmp_path / "other")
    assert start(world, other, log).wait() == 0, log.read_text()
    assert_same_runs(folder, other / "tiny" / "rl" / "small-seed0")

    before = (other / "tiny" / "rl" / "small-seed0" / "result.json").stat().st_mtime_ns
    assert start(world, other, log).wait() == 0  # complete: nothing is done again
    assert (other / "tiny" / "rl" / "small-seed0" / "result.json").stat().st_mtime_ns == before


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_two_processes_stop_at_one_step_and_go_on(world, copied, tmp_path):
    """The signal reaches each process at its own moment; both save the same step, and end as without it."""
    folder, log = copied / "tiny" / "rl" / "small-seed0", tmp_path / "log"
    process = start(world, copied, log, processes=2)
    wait_for(process, lambda: steps_in(folder / "curve.jsonl") >= 1, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) != 0, log.read_text()
    assert last_complete(folder) is not None, log.read_text()

    assert start(world, copied, log, processes=2).wait() == 0, log.read_text()
    other = moved(copied, tmp_path / "other")
    assert start(world, other, log, processes=2).wait() == 0, log.read_text()
    assert_same_runs(folder, other / "tiny" / "rl" / "small-seed0")


def assert_same_weights(a: Path, b: Path) -> None:
    from safetensors.torch import load_file

    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "capr", "--profile", "mini"], "no experiment 'capr'; did you mean caprl?"),
        (["--experiment", "caprl", "--profile", "minni"], "no profile 'minni'; did you mean mini?"),
    ],
)
def test_mistakes_end_with_their_message(arguments, message, capsys):
    from caprl_utils.rl.train import main

    assert main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.integration
def test_sampling_with_transformers_needs_no_vllm():
    """TRL imports vLLM wherever it is installed, which is half of a training's start."""
    code = (
        "import sys; from caprl_utils.rl import train; train._without_vllm(); from trl import GRPOTrainer; "
        "sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT).returncode == 0
