"""Small donors with fresh weights: every kind that a setting takes."""

import json
import os

import pytest
import torch

from caprl_utils.config import load_assembly
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import donors, models
from caprl_utils.schema import Assembly, Donor

PADDED = torch.ones(3, 20, dtype=torch.long)
PADDED[1, :7] = 0  # left padding, as in generation
PADDED[2, 15:] = 0  # right padding, as in training


def at(folder) -> Donor:
    """A folder as a donor."""
    return Donor(path=str(folder))


def stirred(model):
    """Every parameter moved a little, so that a forgotten or swapped one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def language_with_head(tied: bool, folder):
    """A Qwen2 language model whose head is the embeddings (as the paper's 3B has it) or its own; saved to `folder`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(6)
    shape = models.text_config() | {"tie_word_embeddings": tied}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    language = stirred(Qwen2ForCausalLM(Qwen2Config(**shape, rope_parameters=rope)))
    language.save_pretrained(folder)
    shared_tokenizer().save_pretrained(folder)
    return language.eval()


def setting_with_head(tied: bool, vision_donor, folder) -> Assembly:
    """A setting of `language_with_head` and the vision donor, both in `folder`, whose frame says the same of heads."""
    from transformers import Qwen2_5_VLConfig

    frame = Qwen2_5_VLConfig.from_pretrained(vision_donor)
    frame.tie_word_embeddings = frame.text_config.tie_word_embeddings = tied
    (folder / "vision").mkdir()
    for file in vision_donor.iterdir():
        os.link(file, folder / "vision" / file.name)
    (folder / "vision" / "config.json").unlink()
    frame.save_pretrained(folder / "vision")
    language_with_head(tied, folder / "language")
    return load_assembly(
        "mini-qwen-3b",
        {
            "language": at(folder / "language"),
            "vision": at(folder / "vision"),
            "accepted_differences": ["rms_norm_eps"],
        },
    )


def same_logits(left, right, vocabulary: int) -> None:
    """Bit for bit the same logits, without padding and with it on either side."""
    ids = torch.randint(9, vocabulary, PADDED.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(left(input_ids=ids).logits, right(input_ids=ids).logits)
        ours = left(input_ids=ids, attention_mask=PADDED).logits[PADDED.bool()]
        assert torch.equal(ours, right(input_ids=ids, attention_mask=PADDED).logits[PADDED.bool()])


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
    models.save_clip_tower(models.clip_reader(3), folder)
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
