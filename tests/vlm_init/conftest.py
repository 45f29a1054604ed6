"""Small donors with fresh weights: every kind that a setting takes."""

import json
import sys
from pathlib import Path

import pytest
import torch

from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import clip_lesson, donors, models
from caprl_utils.vlm_init import load_assembly

sys.path.insert(0, str(Path(__file__).parent))
from small_donors import at, stirred


@pytest.fixture(scope="session")
def language_donor(tmp_path_factory):
    """A Qwen2 language model whose biases and norms are not the initial ones."""
    folder = tmp_path_factory.mktemp("language")
    stirred(models.build_language_model(1)).save_pretrained(folder)
    shared_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vision_donor(tmp_path_factory):
    """A Qwen2.5-VL with its processor."""
    folder = tmp_path_factory.mktemp("vision")
    stirred(models.build_vlm(2)).save_pretrained(folder)
    models.build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_donor(tmp_path_factory):
    """A CLIP tower with its image processor."""
    folder = tmp_path_factory.mktemp("clip")
    clip_lesson.save_clip_tower(clip_lesson.clip_reader(3), folder)
    return folder


@pytest.fixture(scope="session")
def llama_donor(tmp_path_factory):
    """A Llama with grouped heads and no biases, as InternLM2.5's are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(4)
    shape = models.text_config() | {"num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=1e-5, rope_parameters=rope))
    stirred(model).save_pretrained(folder)
    shared_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def internlm_donor(llama_donor, tmp_path_factory):
    """The same in InternLM2's layout."""
    folder = tmp_path_factory.mktemp("internlm")
    donors.write_internlm2(llama_donor, folder)
    assert json.loads((folder / "config.json").read_text())["bias"] is False
    return folder


@pytest.fixture(scope="session")
def qwen_setting(language_donor, vision_donor):
    return load_assembly(
        "mini-qwen-3b",
        {
            "language": at(language_donor),
            "vision": at(vision_donor),
            "accepted_differences": ["rms_norm_eps"],
        },
    )


@pytest.fixture(scope="session")
def llava_setting(internlm_donor, clip_donor):
    return load_assembly("mini-internlm-clip", {"language": at(internlm_donor), "vision": at(clip_donor)})
