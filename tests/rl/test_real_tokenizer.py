"""Trainings with the real tokenizer of Qwen2.5 before tiny random models: every reward, full weights and adapters."""

import math

import pytest

from caprl_utils import prompts
from caprl_utils.models.base import Request
from caprl_utils.models.local import LocalBackend
from caprl_utils.rl.rewards import Rollout, vlm
from caprl_utils.schema import RL, Lora, ModelConfig
from tests.rl.conftest import curve_of


@pytest.fixture
def judge(qwen_vlm) -> LocalBackend:
    return LocalBackend(ModelConfig(path=str(qwen_vlm)))


def test_digits_are_read_behind_their_space(judge, monkeypatch):
    """The text " 4" is two tokens, a space and the digit: the frequencies of the digits are those after the space."""
    from PIL import Image

    ids = judge.loaded.tokenizer(" 4")["input_ids"]
    assert len(ids) == 2 and judge.loaded.tokenizer(f"{prompts.SCORE_PREFILL} 4")["input_ids"][-2:] == ids
    monkeypatch.setattr("caprl_utils.rl.rewards.MIN_SCORE_MASS", 0.0)
    picture = Image.new("RGB", (140, 140), "red")
    rows = {"image": [picture] * 2, "id": ["a", "b"]}
    batch = vlm(Rollout(["A red square.", ""], [4, 0], rows), judge, RL())
    assert all(0 < reward < 1 for reward in batch.rewards)
    prompt = prompts.RATE.format(caption="A red square.")
    request = Request("x", prompt, picture, prefill=f"{prompts.SCORE_PREFILL} ")
    (row,) = judge.choice_logprobs([request], list("12345"))
    weights = [math.exp(value) for value in row]
    expected = sum(score * w for score, w in enumerate(weights)) / sum(weights) / 4
    assert batch.rewards[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("qa", {"lora": Lora(rank=2, alpha=4)}), ("qa", {"micro_batch_size": 2, "rollout_rows": 3}),
        ("vlm", {"lora": Lora(rank=2, alpha=4)}), ("unified", {}),
    ],
)  # fmt: skip
def test_a_step_of_training(opened, term, parts, monkeypatch, qwen_vlm, qwen_reader):
    monkeypatch.setattr("caprl_utils.rl.rewards.MIN_SCORE_MASS", 0.0)
    monkeypatch.setattr("caprl_utils.rl.rewards.UNIFIED_MAX_TOKENS", 4)
    models = {role: {"path": str(qwen_vlm)} for role in ("policy", "vlm_judge", "reward_judge")}
    models["reward_reader"] = {"path": str(qwen_reader)}
    rl = {"steps": 1, "warmup_steps": 0, "max_failed_share": 1.0}
    (row,) = curve_of(opened(models, rl, term, "authors", **parts))
    assert math.isfinite(row["loss"]) and row["completion_tokens"] > 0
    if term == "unified":  # random words name no score
        assert row["failed_share"] == 1.0 and row["unparsed"] == 1.0
    else:
        assert row["failed_share"] == 0.0 and 0 <= row["reward"] <= 1
