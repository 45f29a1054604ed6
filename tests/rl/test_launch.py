import json
import subprocess
import sys
import threading

import pytest

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.progress import PROGRESS_ENV
from caprl_utils.rl import launch as launching
from tests.rl.conftest import write_questions

ACCELERATE = sorted((paths.CONFIGS / "accelerate").glob("*.yaml"))
WORK = """
import json, os, sys
from pathlib import Path
print("loading weights")
progress = {"label": "train", "done": 3, "total": 4, "note": "reward 0.5", "sec": 1, "time": 1}
Path(os.environ["PROGRESS"]).write_text(json.dumps(progress))
if sys.argv[1] == "fail":
    sys.exit("error: the reader is gone")
folder = Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
(folder / "result.json").write_text(json.dumps({"key": "k", "values": {"steps": 4}}))
""".replace('"PROGRESS"', f'"{PROGRESS_ENV}"')


@pytest.fixture
def work(world, monkeypatch, tmp_path):
    """`launch` on the small world, with a stand-in for the training's process."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    write_questions(tmp_path / "tiny" / "curation" / "main" / "qa.parquet", num_images=2)
    seen = []
    monkeypatch.setattr(
        launching.Progress, "update", lambda bar, n, note: seen.append((n, note)), raising=True
    )

    def run(how: str, **options):
        folder = tmp_path / "tiny" / "rl" / "small-seed0"
        monkeypatch.setattr(launching, "command", lambda *a: [sys.executable, "-c", WORK, how, str(folder)])
        return launching.launch(str(world / "small.yaml"), str(world / "tiny.yaml"), **options)

    run.seen = seen
    return run


def test_launch_returns_the_record_and_shows_progress(work):
    assert work("well")["values"] == {"steps": 4}
    assert (3, "reward 0.5") in work.seen


def test_a_complete_run_is_read_without_a_process(work, monkeypatch):
    monkeypatch.setattr(launching, "finished", lambda *_: {"values": {"steps": 4}})
    assert work("fail")["values"] == {"steps": 4}


def test_launch_stops_when_told(work):
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(UserError, match="small-seed0 ended with status"):
        work("well", stopping=stopping)


def test_failure_shows_the_end_of_the_log(work):
    with pytest.raises(UserError, match=r"(?s)status 1.*small-seed0.log:.*the reader is gone.*Run it again"):
        work("fail")


def test_command_with_one_and_several_gpus():
    plain = launching.command("caprl", "mini", 1, 0, None)
    assert plain[1:3] == ["-m", "caprl_utils.rl.train"] and plain[-1] == "1"
    several = launching.command("caprl", "paper", 0, 8, None)
    assert "accelerate.commands.launch" in several and several[several.index("--num_processes") + 1] == "8"
    configured = launching.command("caprl", "paper", 0, 8, "one_node.yaml")
    assert configured[configured.index("--config_file") + 1] == str(
        paths.CONFIGS / "accelerate" / "one_node.yaml"
    )


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda file: file.stem)
def test_accelerate_configs_parse(file):
    """By accelerate's own reader; what stands under deepspeed_config has to be an option of its launcher."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(file))
    assert str(config.distributed_type).endswith("DEEPSPEED")
    assert config.num_processes == 8 * config.num_machines
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.deepspeed_config) <= options
    assert config.deepspeed_config["zero_stage"] in (2, 3)


@pytest.mark.integration
@pytest.mark.parametrize("file", ACCELERATE, ids=lambda file: file.stem)
def test_deepspeed_takes_the_configs(file):
    """By accelerate's plugin and DeepSpeed's own class, which the environment of LLaMA-Factory has."""
    code = """
import json, sys, yaml
from accelerate import DeepSpeedPlugin
from deepspeed.runtime.config import DeepSpeedConfig
given = yaml.safe_load(open(sys.argv[1]))["deepspeed_config"]
given.pop("deepspeed_multinode_launcher", None)
plugin = DeepSpeedPlugin(**given)
batch = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 16,
         "gradient_clipping": 1.0}
config = DeepSpeedConfig({**plugin.deepspeed_config, **batch})
print(json.dumps([config.zero_optimization_stage, config.zero_config.gather_16bit_weights_on_model_save]))
"""
    python = paths.ROOT / ".venv-llamafactory" / "bin" / "python"
    done = subprocess.run([python, "-c", code, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stage, gathers = json.loads(done.stdout.splitlines()[-1])
    assert stage == (3 if "zero3" in file.stem else 2)
    assert gathers == (stage == 3)  # else the last model could not be written


def test_there_are_accelerate_configs():
    assert len(ACCELERATE) >= 3
