"""Qwen3-VL as policy: a small random model of the real class takes a step of the real trainer."""

import math

import pytest
import torch
import transformers

from caprl_utils.mini.tokenizer import SPECIAL, build_tokenizer
from caprl_utils.mini.zoo.models import prepare_generation
from caprl_utils.rl.policy import save_final
from tests.rl.conftest import curve_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
IDS = {token: SPECIAL.index(token) for token in SPECIAL}
SHAPE = {"hidden_size": 64, "intermediate_size": 96}
TEXT = SHAPE | {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "eos_token_id": IDS["<|im_end|>"], "pad_token_id": IDS["<|endoftext|>"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
}  # fmt: skip
VISION = SHAPE | {
    "depth": 2, "num_heads": 4, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
}  # fmt: skip


def save_qwen3_vl(folder) -> None:
    torch.manual_seed(0)
    tokenizer, edge = build_tokenizer(), 128 * 128
    size = {"shortest_edge": edge, "longest_edge": edge}
    shape = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    marks = {f"{name}_token_id": IDS[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    marks |= {f"{name}_token_id": IDS[f"<|{name}_pad|>"] for name in ("image", "video")}
    text = TEXT | {"vocab_size": len(tokenizer)}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False, **marks)
    parts = (transformers.Qwen2VLImageProcessor(**shape), tokenizer, transformers.Qwen3VLVideoProcessor(**shape))
    model = transformers.Qwen3VLForConditionalGeneration(config)
    prepare_generation(model)
    model.save_pretrained(folder)
    transformers.Qwen3VLProcessor(*parts, chat_template=tokenizer.chat_template).save_pretrained(folder)


def test_a_step_of_training(opened, tmp_path):
    save_qwen3_vl(tmp_path / "policy")
    rl = {"steps": 1, "warmup_steps": 0, "save_every": 1}
    trainer = opened({"policy": {"path": str(tmp_path / "policy")}}, rl)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    (row,) = curve_of(trainer)
    assert math.isfinite(row["loss"])
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("language_model" in n for n in moved)
    model, final = trainer.accelerator.unwrap_model(trainer.model), tmp_path / "final"
    save_final(model, trainer.processing_class, final, torch.float32)
    load = transformers.AutoModelForImageTextToText.from_pretrained
    assert not any(load(final, output_loading_info=True)[1].values())
