"""ZeRO-2 over two CPU processes, by DeepSpeed of the environment of LLaMA-Factory: stopped and resumed, it repeats."""

import signal
import subprocess
import sys

import pytest
import torch
import yaml

from caprl_utils import paths
from tests.rl.test_rl_process import Process

PACKAGES = ("deepspeed", "hjson", "cpuinfo", "py_cpuinfo", "msgpack", "ninja")
OTHER = paths.ROOT / ".venv-llamafactory" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"


class ZeroProcess(Process):
    """As configs/accelerate/one_node.yaml lays it out, but for precision and device."""

    def start(self) -> subprocess.Popen:
        borrowed, config = self.runs / "packages", self.runs / "accelerate.yaml"
        borrowed.mkdir(exist_ok=True)
        for name in PACKAGES:
            for found in OTHER.glob(f"{name}*"):
                if not (borrowed / found.name).exists():
                    (borrowed / found.name).symlink_to(found)
        given = yaml.safe_load((paths.CONFIGS / "accelerate" / "one_node.yaml").read_text())
        config.write_text(yaml.safe_dump(given | {"mixed_precision": "no", "use_cpu": True}))
        self.launcher = f"accelerate.commands.launch --config_file {config} --num_processes 2 --module".split()
        self.module = "tests.rl.zero_on_cpu"
        self.own = {"PYTHONPATH": f"{paths.ROOT}:{borrowed}", "DS_ACCELERATOR": "cpu"}
        return super().start()


@pytest.mark.integration
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (OTHER / "deepspeed").is_dir(), reason="no DeepSpeed: make setup-llamafactory")
def test_stopped_and_resumed_equals_uninterrupted(world, tmp_path):
    broken, whole = (ZeroProcess(world, tmp_path / name, 2) for name in ("broken", "whole"))
    broken.end_after(1, signal.SIGTERM)  # it saves at the end of the step that it is in
    assert not (broken.folder / "result.json").exists()
    broken.finish()
    whole.finish()
    (curve, weights), (other, others) = broken.result, whole.result
    assert curve == [pytest.approx(row, abs=1e-5) for row in other] and curve[-1]["kl"] > 1e-3
    torch.testing.assert_close(weights, others, atol=1e-5, rtol=0)
