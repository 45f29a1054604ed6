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
from safetensors.torch import load_file

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.models.server import free_port
from caprl_utils.rl.policy import is_whole
from caprl_utils.rl.train import STOPPED, main
from caprl_utils.runs import checkpoints_in, last_checkpoint
from tests.rl.conftest import STEPS, write_questions


class Process:
    """One training of the small world, in one process or several, again and again in one folder of runs."""

    module, own = "caprl_utils.rl.train", {"PYTHONPATH": str(paths.ROOT)}

    def __init__(self, world: Path, runs: Path, processes: int):
        self.world, self.runs = world, runs
        self.folder, self.log = runs / "tiny" / "rl" / "small-seed0", runs / "log"
        several = f"torch.distributed.run --nproc_per_node {processes} --master_port {free_port()} -m"
        self.launcher = several.split() if processes > 1 else []
        write_questions(runs / "tiny" / "curation" / "main" / "qa.parquet", num_images=6)

    def start(self) -> subprocess.Popen:
        names = ["--experiment", str(self.world / "small.yaml"), "--profile", str(self.world / "tiny.yaml")]
        env = os.environ | {"CAPRL_RUNS": str(self.runs), "OMP_NUM_THREADS": "1"} | self.own
        return subprocess.Popen(
            [sys.executable, "-m", *self.launcher, self.module, *names], cwd=paths.ROOT, env=env,
            stdout=open(self.log, "ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def end_after(self, step: int, signal_number: int) -> int:
        """Start it and send the signal when so many steps are done; returns the exit status."""
        process, deadline = self.start(), time.monotonic() + 600
        curve = self.folder / "curve.jsonl"
        while not curve.exists() or curve.read_text().count("\n") < step:
            assert process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        process.send_signal(signal_number)
        return process.wait(timeout=300)

    def finish(self) -> None:
        assert self.start().wait() == 0, self.log.read_text()

    @property
    def result(self) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """The curve without its times, and the final weights."""
        rows = [json.loads(line) for line in (self.folder / "curve.jsonl").read_text().splitlines()]
        curve = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]
        return curve, load_file(self.folder / "final" / "model.safetensors")


@pytest.mark.integration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_killed_and_resumed_equals_uninterrupted(world, tmp_path, processes):
    """Stopped after the first step (each process hears it at its own moment), then killed after a random other."""
    broken, whole = (Process(world, tmp_path / name, processes) for name in ("broken", "whole"))
    status = broken.end_after(1, signal.SIGTERM)
    assert status == STOPPED if processes == 1 else status != 0, broken.log.read_text()
    assert last_checkpoint(broken.folder, is_whole) is not None and not (broken.folder / "result.json").exists()
    if processes == 1:
        kill_at = random.randrange(2, STEPS + 1)
        print(f"killed after step {kill_at}")
        broken.end_after(kill_at, signal.SIGKILL)
    broken.finish()
    assert json.loads((broken.folder / "result.json").read_text())["values"]["steps"] == STEPS
    assert checkpoints_in(broken.folder) == []

    whole.finish()
    (curve, weights), (other, others) = broken.result, whole.result
    assert len(curve) == STEPS and curve == [pytest.approx(row, abs=1e-5) for row in other]
    assert curve[-1]["kl"] > 1e-3  # a reference loaded from the checkpoint would give 0
    torch.testing.assert_close(weights, others, atol=1e-5, rtol=0)

    before = (whole.folder / "result.json").stat().st_mtime_ns
    whole.finish()  # complete: nothing is done again
    assert (whole.folder / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("capr", "mini"), r"no experiment 'capr'; did you mean caprl\?"),
        (("caprl", "minni"), r"no profile 'minni'; did you mean mini\?"),
    ],
)  # fmt: skip
def test_mistakes_end_with_their_message(names, message):
    with pytest.raises(UserError, match=message):
        main(["--experiment", names[0], "--profile", names[1]])


@pytest.mark.integration
def test_sampling_with_transformers_needs_no_vllm():
    """TRL imports vLLM wherever it is installed, which is half of a training's start."""
    code = (
        "import sys; from caprl_utils.rl import train; train._without_vllm(); from trl import GRPOTrainer; "
        "sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT).returncode == 0
