"""Qwen3-VL as policy: a small random model of the real class takes a step of the real trainer."""

import json
import math

import pytest
import torch
import transformers
import yaml

from caprl_utils.config import load_experiment
from caprl_utils.mini.tokenizer import SPECIAL, build_tokenizer
from caprl_utils.rl.grpo import open_trainer
from caprl_utils.rl.monitor import Monitor
from caprl_utils.rl.policy import save_final

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
IDS = {token: SPECIAL.index(token) for token in SPECIAL}
SIZE = {"shortest_edge": 128 * 128, "longest_edge": 128 * 128}


def text_config(vocabulary: int) -> dict:
    return {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 1024,
        "eos_token_id": IDS["<|im_end|>"], "pad_token_id": IDS["<|endoftext|>"], "tie_word_embeddings": False,
    }  # fmt: skip


def qwen3_vl():
    tokenizer = build_tokenizer()
    shape = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": SIZE}
    config = transformers.Qwen3VLConfig(
        text_config=text_config(len(tokenizer))
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        image_token_id=IDS["<|image_pad|>"], video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"], vision_end_token_id=IDS["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**shape), tokenizer, transformers.Qwen3VLVideoProcessor(**shape),
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def test_a_step_of_training(world, runs, tmp_path):
    from caprl_utils.mini.zoo.models import prepare_generation

    torch.manual_seed(0)
    model, processor = qwen3_vl()
    prepare_generation(model)
    model.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    profile = yaml.safe_load((world / "tiny.yaml").read_text())
    profile["models"]["policy"]["path"] = str(tmp_path / "policy")
    profile["rl"] |= {"steps": 1, "warmup_steps": 0, "save_every": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(profile))
    experiment, resolved = load_experiment(str(world / "small.yaml"), str(tmp_path / "tiny.yaml"))
    (tmp_path / "run").mkdir()
    trainer = open_trainer(experiment, resolved, 0, tmp_path / "run")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with Monitor(trainer, tmp_path / "run", None):
        assert trainer.fit(None)
    (row,) = (tmp_path / "run" / "curve.jsonl").read_text().splitlines()
    assert math.isfinite(json.loads(row)["loss"])
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("language_model" in n for n in moved)

    save_final(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        tmp_path / "final",
        torch.float32,
    )
    _, report = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not any(report.values())
