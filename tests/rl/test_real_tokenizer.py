"""Trainings with the real tokenizer of Qwen2.5 before tiny random models: every reward, full weights and adapters; and
with a small random model of Qwen3-VL's real class.
"""

import math

import pytest
import torch
import transformers

from caprl_utils import prompts
from caprl_utils.mini.tokenizer import SPECIAL, build_tokenizer
from caprl_utils.mini.zoo.models import prepare_generation
from caprl_utils.models.base import Request
from caprl_utils.models.local import LocalBackend
from caprl_utils.rl.policy import save_final
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
    monkeypatch.setattr("caprl_utils.rl.rewards.MIN_MASS", 0.0)
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
    [("qa", {"lora": Lora(rank=2, alpha=4), "micro_batch_size": 2, "rollout_rows": 3}), ("vlm", {}), ("unified", {})],
)
def test_a_step_of_training(opened, term, parts, monkeypatch, qwen_vlm, qwen_reader):
    monkeypatch.setattr("caprl_utils.rl.rewards.MIN_MASS", 0.0)
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


def save_qwen3_vl(folder) -> None:
    torch.manual_seed(0)
    tokenizer, edge, same = build_tokenizer(), 128 * 128, {"hidden_size": 64, "intermediate_size": 96}
    ids = {token: SPECIAL.index(token) for token in SPECIAL}
    text = same | {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
        "max_position_embeddings": 1024, "tie_word_embeddings": False, "vocab_size": len(tokenizer),
        "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision = same | {
        "depth": 2, "num_heads": 4, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    shape = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2,
             "size": {"shortest_edge": edge, "longest_edge": edge}}  # fmt: skip
    marks = {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    marks |= {f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **marks)
    parts = (transformers.Qwen2VLImageProcessor(**shape), tokenizer, transformers.Qwen3VLVideoProcessor(**shape))
    prepare_generation(model := transformers.Qwen3VLForConditionalGeneration(config))
    model.save_pretrained(folder)
    transformers.Qwen3VLProcessor(*parts, chat_template=tokenizer.chat_template).save_pretrained(folder)


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_a_step_of_training_of_qwen3_vl(opened, tmp_path):
    save_qwen3_vl(tmp_path / "policy")
    policy = {"policy": {"path": str(tmp_path / "policy")}}
    trainer = opened(policy, {"steps": 1, "warmup_steps": 0, "save_every": 1})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    (row,) = curve_of(trainer)
    assert math.isfinite(row["loss"])
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("language_model" in n for n in moved)
    model, final = trainer.accelerator.unwrap_model(trainer.model), tmp_path / "final"
    save_final(model, trainer.processing_class, final, ModelConfig(path=str(tmp_path / "policy")))
    load = transformers.AutoModelForImageTextToText.from_pretrained
    assert not any(load(final, output_loading_info=True)[1].values())
