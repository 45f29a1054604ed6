"""The plan of a training, by hand."""

import pytest

from caprl_utils.config import load_experiment, load_profile
from caprl_utils.rl.plan import plan_rl, size_of


def plan(name: str, experiment: str | None = None) -> dict:
    return {row["item"]: row["value"] for row in plan_rl(load_profile(name), experiment)}


def test_paper_size_by_hand():
    rows = plan("paper")
    assert rows["experiment"] == "caprl" and rows["processes"] == 16
    assert rows["captions a step"] == 1024 and rows["passes over the images"] == pytest.approx(3.072)
    # 1800 steps x 10 x 3.75e9 x 1024 x 2100 / (990e12 x 0.35) / 3600
    assert rows["GPU-hours, training"] == pytest.approx(116.36, abs=0.01)
    # 4 x 3.75 + 12 x 3.75 / 16 + 4 x 3.75 + 4 x 2100 x 2048 x 140 / 1e9 + 0.3 x 80 for vLLM
    assert rows["memory of a GPU"] == pytest.approx(15 + 2.8125 + 15 + 2.408 + 24, abs=0.01)
    assert rows["on a GPU of 80 GB"] == "fits"


def test_every_node_has_its_command():
    rows = plan("paper")
    variables = "MASTER_ADDR=HOST_0 MASTER_PORT=29500"
    runner = ".venv/bin/python -m caprl_utils.runner --profile paper"
    assert rows["command on node 0"] == (
        f"NODE_RANK=0 {variables} {runner} 03_caprl_rl_training:with_ablations=True"
    )
    assert rows["command on node 1"] == (
        f"NODE_RANK=1 {variables} .venv/bin/python -m caprl_utils.rl.ablations --follow --profile paper"
    )
    assert not any("command" in item for item in plan("one_gpu"))


def test_a_policy_server_has_its_command(tmp_path):
    file = tmp_path / "served.yaml"
    file.write_text("extends: caprl\ntraining: {rollout: vllm_server}")
    command = plan("one_gpu", str(file))["command of the policy's server"]
    assert command.startswith("VLLM_SERVER_DEV_MODE=1 .venv/bin/vllm serve Qwen/Qwen2.5-VL-3B-Instruct ")
    assert "--port 8010" in command and "--max-model-len 5120" in command


@pytest.mark.integration
def test_the_policy_servers_command_parses_with_vllms_own_parser(tmp_path):
    import shlex

    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    file = tmp_path / "served.yaml"
    file.write_text("extends: caprl\ntraining: {rollout: vllm_server}")
    words = shlex.split(plan("paper", str(file))["command of the policy's server"])[3:]
    found = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    assert found.model_tag == "Qwen/Qwen2.5-VL-3B-Instruct" and found.max_model_len == 8192
    assert found.logprobs_mode == "processed_logprobs" and found.enable_scale_out


def test_one_gpu_trains_adapters_by_the_profiles_preset():
    experiment, profile = load_experiment("rounds_1", "one_gpu")
    assert experiment.training.lora.rank == 64 and profile.rl.learning_rate == 1e-5 and profile.rl.rounds == 1
    assert plan("one_gpu")["on a GPU of 80 GB"] == "fits"
    assert load_experiment("rounds_1", "mini")[0].training.lora is None


def test_size_from_files_and_unknown():
    assert size_of("zoo:reader-reward").weights == pytest.approx(0.96e6, rel=0.02)
    assert size_of("zoo:reader-reward").layers == 5
    assert size_of("somebody/unknown") is None
    rows = plan("paper", "judge_vlm")
    assert rows["GPU-hours, reward"] > 0


def test_every_row_has_its_formula():
    rows = plan_rl(load_profile("one_gpu"))
    assert all(set(row) == {"part", "item", "value", "unit", "formula"} for row in rows)
    assert all(row["formula"] for row in rows if row["unit"] == "h")
