"""Trainings with the real tokenizer of Qwen2.5 before tiny random models: every reward, full weights and adapters."""

import json
import math

import pytest
import yaml

from caprl_utils import prompts
from caprl_utils.config import load_experiment
from caprl_utils.models.base import Request
from caprl_utils.models.local import LocalBackend
from caprl_utils.rl.grpo import open_trainer
from caprl_utils.rl.judges import vlm_rewards
from caprl_utils.rl.monitor import Monitor
from caprl_utils.rl.readers import PackedPrompts, Reader
from caprl_utils.schema import Lora, ModelConfig, Reward, Training


@pytest.fixture
def judge(qwen_vlm) -> LocalBackend:
    return LocalBackend(ModelConfig(path=str(qwen_vlm)))


def test_digits_are_read_behind_their_space(judge, monkeypatch):
    """The text " 4" is two tokens, a space and the digit: the frequencies of the digits are those after the space."""
    from PIL import Image

    ids = judge.loaded.tokenizer(" 4")["input_ids"]
    assert len(ids) == 2 and judge.loaded.tokenizer(f"{prompts.SCORE_PREFILL} 4")["input_ids"][-2:] == ids
    monkeypatch.setattr("caprl_utils.rl.judges.MIN_SCORE_MASS", 0.0)
    picture = Image.new("RGB", (140, 140), "red")
    batch = vlm_rewards(["A red square.", ""], [picture] * 2, ["a", "b"], judge)
    assert all(0 < reward < 1 for reward in batch.rewards)
    prompt = prompts.RATE.format(caption="A red square.")
    request = Request("x", prompt, picture, prefill=f"{prompts.SCORE_PREFILL} ")
    (row,) = judge.choice_logprobs([request], list("12345"))
    weights = [math.exp(value) for value in row]
    expected = sum(score * w for score, w in enumerate(weights)) / sum(weights) / 4
    assert batch.rewards[0] == pytest.approx(expected, abs=1e-6)


def test_packed_questions_give_the_numbers_of_plain_ones(qwen_reader):
    backend = LocalBackend(ModelConfig(path=str(qwen_reader)))
    options = ["17", "42", prompts.CANNOT_ANSWER]
    requests = [
        Request(str(i), prompts.reward_question(text, "How many?", options, "authors"), prefill=prompts.ANSWER_PREFILL)
        for i, text in enumerate(["There are 42 birds.", "A bird.", ""])
    ]  # fmt: skip
    packed, plain = Reader(backend, PackedPrompts(backend)), Reader(backend)
    for a, b in zip(
        packed.letter_logprobs(requests, "ABC"), plain.letter_logprobs(requests, "ABC"), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-5)
    assert packed._same is True


@pytest.fixture
def step(world, runs, tmp_path, qwen_vlm, qwen_reader):
    """Call with a reward's judge and settings of training: the row of one step, the trainer kept as `.trainer`."""

    def run(judge: str, **parts):
        profile = yaml.safe_load((world / "tiny.yaml").read_text()) | {"prompts": "authors"}
        profile["models"] = {
            role: {"path": str(qwen_vlm)} for role in ("policy", "vlm_judge", "reward_judge")
        }
        profile["models"]["reward_reader"] = {"path": str(qwen_reader)}
        profile["rl"] |= {"steps": 1, "warmup_steps": 0, "max_failed_share": 1.0}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(profile))
        experiment, resolved = load_experiment(str(world / "small.yaml"), str(tmp_path / "tiny.yaml"))
        update = {"training": Training(**parts), "reward": Reward(judge=judge)}
        run.trainer = open_trainer(experiment.model_copy(update=update), resolved, 0, tmp_path)
        with Monitor(run.trainer, tmp_path, None):
            assert run.trainer.fit(None)
        return json.loads((tmp_path / "curve.jsonl").read_text())

    return run


@pytest.mark.integration
@pytest.mark.parametrize(
    ("judge", "parts"),
    [
        ("qa", {"lora": Lora(rank=2, alpha=4)}), ("qa", {"micro_batch_size": 2, "rollout_rows": 3}),
        ("vlm", {"lora": Lora(rank=2, alpha=4)}), ("unified", {}),
    ],
)  # fmt: skip
def test_a_step_of_training(step, judge, parts, monkeypatch, tmp_path):
    monkeypatch.setattr("caprl_utils.rl.judges.MIN_SCORE_MASS", 0.0)
    monkeypatch.setattr("caprl_utils.rl.judges.UNIFIED_MAX_TOKENS", 4)
    row = step(judge, **parts)
    assert math.isfinite(row["loss"]) and row["completion_tokens"] > 0
    if judge == "unified":  # random words name no score
        assert row["failed_share"] == 1.0 and row["unparsed"] == 1.0
    else:
        assert row["failed_share"] == 0.0 and 0 <= row["reward"] <= 1
