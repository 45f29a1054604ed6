"""Small donors with fresh weights: every kind that a setting takes."""

import shutil

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from caprl_utils.config import load_assembly
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import donors, models
from caprl_utils.schema import Donor

torch.set_num_threads(1)  # models this small gain nothing by a second one, which waits spinning on a busy core
PADDED = torch.ones(3, 20, dtype=torch.long)
PADDED[1, :7] = 0  # left padding, as in generation
PADDED[2, 15:] = 0  # right padding, as in training
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def at(folder) -> Donor:
    """A folder as a donor."""
    return Donor(path=str(folder))


def setting_of(name, language, vision):
    """A setting of configs/vlm_init with these two folders."""
    return load_assembly(name, {"language": at(language), "vision": at(vision)})


def stirred(model):
    """Every parameter moved a little, so that a forgotten or swapped one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save_language(model, folder):
    """A language model with the shared tokenizer."""
    model.save_pretrained(folder)
    shared_tokenizer().save_pretrained(folder)
    return folder


def tied_setting(vision_donor, folder):
    """A setting whose head is the embeddings, as the paper's 3B has it; the vision donor says the same."""
    shutil.copytree(vision_donor, folder / "vision")
    frame = Qwen2_5_VLConfig.from_pretrained(vision_donor)
    frame.tie_word_embeddings = frame.text_config.tie_word_embeddings = True
    frame.save_pretrained(folder / "vision")
    torch.manual_seed(6)
    config = Qwen2Config(**models.text_config() | {"tie_word_embeddings": True}, rope_parameters=ROPE)
    language = save_language(stirred(Qwen2ForCausalLM(config)), folder / "language")
    return setting_of("mini-qwen-3b", language, folder / "vision")


def loaded(folder):
    """An assembled model, of which nothing is missing, odd or of another shape."""
    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def same_logits(left, right) -> None:
    """Bit for bit the same logits, without padding and with it on either side."""
    ids = torch.randint(9, len(shared_tokenizer()), PADDED.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(left(input_ids=ids).logits, right(input_ids=ids).logits)
        ours = left(input_ids=ids, attention_mask=PADDED).logits[PADDED.bool()]
        assert torch.equal(ours, right(input_ids=ids, attention_mask=PADDED).logits[PADDED.bool()])


@pytest.fixture(scope="session")
def language_donor(tmp_path_factory):
    """A Qwen2 language model whose biases and norms are not the initial ones."""
    return save_language(stirred(models.build_language_model(1)), tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="session")
def vision_donor(tmp_path_factory):
    """A Qwen2.5-VL with its processor."""
    folder = tmp_path_factory.mktemp("vision")
    model = stirred(models.build_vlm(2))
    model.config.text_config.rms_norm_eps = 1e-6  # as the language donor's
    model.save_pretrained(folder)
    models.build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_donor(tmp_path_factory):
    """A CLIP tower with its image processor."""
    folder = tmp_path_factory.mktemp("clip")
    models.save_clip_tower(models.ClipReader(3, torch.zeros(1, 128)), folder)
    return folder


@pytest.fixture(scope="session")
def internlm_donor(tmp_path_factory):
    """A Llama with grouped heads and no biases in InternLM2's layout."""
    torch.manual_seed(4)
    shape = models.text_config() | {"num_key_value_heads": 2}
    config = LlamaConfig(**shape, rms_norm_eps=1e-5, rope_parameters=ROPE | {"rope_theta": 1e6})
    llama = save_language(stirred(LlamaForCausalLM(config)), tmp_path_factory.mktemp("llama"))
    folder = tmp_path_factory.mktemp("internlm")
    donors.write_internlm2(llama, folder)
    return folder


@pytest.fixture(scope="session")
def qwen_setting(language_donor, vision_donor):
    return setting_of("mini-qwen-3b", language_donor, vision_donor)


@pytest.fixture(scope="session")
def llava_setting(internlm_donor, clip_donor):
    return setting_of("mini-internlm-clip", internlm_donor, clip_donor)
