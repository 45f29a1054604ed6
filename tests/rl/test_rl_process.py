"""The training as a process: SIGTERM saves and stops, `kill -9` loses nothing, failures name their cause."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from caprl_utils import paths
from caprl_utils.rl import checkpoints
from caprl_utils.rl.train import STOPPED


def start(world: Path, runs: Path, log: Path) -> subprocess.Popen:
    """One training of the small world; its runs lie in `runs`."""
    command = [sys.executable, "-m", "caprl_utils.rl.train", "--experiment", str(world / "small.yaml")]
    return subprocess.Popen(
        [*command, "--profile", str(world / "tiny.yaml")], cwd=paths.ROOT, stdout=open(log, "ab"),
        stderr=subprocess.STDOUT, env={**os.environ, "CAPRL_RUNS": str(runs)},
    )  # fmt: skip


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


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_stopped_killed_and_resumed_equals_uninterrupted(world, copied, tmp_path):
    folder, log = copied / "tiny" / "rl" / "small-seed0", tmp_path / "log"
    curve = folder / "curve.jsonl"

    process = start(world, copied, log)
    wait_for(process, lambda: steps_in(curve) >= 1, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == STOPPED, log.read_text()
    assert checkpoints.last_complete(folder) is not None and not (folder / "result.json").exists()

    process = start(world, copied, log)
    wait_for(process, lambda: (folder / "checkpoint-4").exists() or steps_in(curve) >= 4, log)
    process.kill()
    process.wait()

    assert start(world, copied, log).wait() == 0, log.read_text()
    assert json.loads((folder / "result.json").read_text())["values"]["steps"] == 4
    assert checkpoints.all_checkpoints(folder) == []

    other = tmp_path / "other"
    (copied / "tiny" / "curation").rename(tmp_path / "curation")
    (other / "tiny").mkdir(parents=True)
    (tmp_path / "curation").rename(other / "tiny" / "curation")
    assert start(world, other, log).wait() == 0, log.read_text()
    assert_same_weights(folder / "final", other / "tiny" / "rl" / "small-seed0" / "final")

    before = (other / "tiny" / "rl" / "small-seed0" / "result.json").stat().st_mtime_ns
    assert start(world, other, log).wait() == 0  # complete: nothing is done again
    assert (other / "tiny" / "rl" / "small-seed0" / "result.json").stat().st_mtime_ns == before


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
