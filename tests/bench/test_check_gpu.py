"""The check of a GPU runs whole at tiny size on a CPU."""

import importlib.util
import json
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("check_gpu", Path(__file__).parent / "check_gpu.py")


@pytest.mark.integration
def test_all_seven_steps_pass(qwen_tokenizer, capsys, tmp_path):
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    assert check.main(["--size", "tiny", "--folder", str(tmp_path)]) == 0, capsys.readouterr().out
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["step"] for row in rows] == ["models", "vision", "reader", "rollout", "lora", "full", "resume"]
    assert rows[-1]["grad_norm"] == 0  # the resumed step repeats exactly
