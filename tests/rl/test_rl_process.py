"""The training as a process, or as two: SIGTERM saves and stops, `kill -9` loses nothing."""

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
import yaml
from safetensors.torch import load_file

from caprl_utils import paths
from caprl_utils.models.server import free_port
from caprl_utils.rl.policy import is_whole
from caprl_utils.rl.train import STOPPED
from caprl_utils.runs import checkpoints_in, last_checkpoint
from tests.rl.conftest import STEPS, write_questions

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
OTHER = paths.ROOT / ".venv-llamafactory" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
ALONE = "caprl_utils.rl.train"
TWO = "torch.distributed.run --nproc_per_node 2 --master_port {port} -m caprl_utils.rl.train"
ZERO_2 = "accelerate.commands.launch --config_file {folder}/zero.yaml --num_processes 2 --module tests.rl.zero_on_cpu"


class Process:
    """One training of the small world, again and again in one folder of runs. line: what Python runs."""

    def __init__(self, world: Path, runs: Path, line: str):
        self.world, self.runs, self.line = world, runs, line
        self.folder, self.log = runs / "tiny" / "rl" / "small-seed0", runs / "log"
        write_questions(runs / "tiny" / "curation" / "main" / "qa.parquet", num_images=6)
        self.env = os.environ | {"PYTHONPATH": f"{paths.ROOT}:{runs / 'packages'}", "DS_ACCELERATOR": "cpu",
                                 "CAPRL_RUNS": str(runs), "OMP_NUM_THREADS": "1"}  # fmt: skip
        if line == ZERO_2:  # as configs/accelerate/one_node.yaml lays it out, but for precision and device
            given = yaml.safe_load((paths.CONFIGS / "accelerate" / "one_node.yaml").read_text())
            (runs / "zero.yaml").write_text(yaml.safe_dump(given | {"mixed_precision": "no", "use_cpu": True}))
            (runs / "packages").mkdir()
            for name in ("deepspeed", "hjson", "cpuinfo", "py_cpuinfo", "msgpack", "ninja"):
                for found in OTHER.glob(f"{name}*"):
                    (runs / "packages" / found.name).symlink_to(found)

    def start(self) -> subprocess.Popen:
        names = ["--experiment", str(self.world / "small.yaml"), "--profile", str(self.world / "tiny.yaml")]
        words = self.line.format(port=free_port(), folder=self.runs).split()
        how = {"cwd": paths.ROOT, "env": self.env, "stderr": subprocess.STDOUT}
        with open(self.log, "ab") as log:
            return subprocess.Popen([sys.executable, "-m", *words, *names], stdout=log, **how)

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


@pytest.mark.parametrize("line", [ALONE, TWO, ZERO_2], ids=["one process", "two", "ZeRO-2 by DeepSpeed"])
def test_stopped_killed_and_resumed_equals_uninterrupted(world, tmp_path, line):
    """Stopped in the first step (each process hears it at its own moment), then killed after a random other."""
    if line == ZERO_2 and not (OTHER / "deepspeed").is_dir():
        pytest.skip("no DeepSpeed: make setup-llamafactory")
    broken, whole = (Process(world, tmp_path / name, line) for name in ("broken", "whole"))
    status = broken.end_after(1, signal.SIGTERM)
    assert status == STOPPED if line == ALONE else status != 0 or line == ZERO_2, broken.log.read_text()
    assert line == ZERO_2 or last_checkpoint(broken.folder, is_whole) is not None
    assert not (broken.folder / "result.json").exists()
    if line == ALONE:
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

    if line == ALONE:
        before = (whole.folder / "result.json").stat().st_mtime_ns
        whole.finish()  # complete: nothing is done again
        assert (whole.folder / "result.json").stat().st_mtime_ns == before
