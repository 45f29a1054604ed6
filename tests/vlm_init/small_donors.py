"""Helpers of these tests."""

import os

import torch

from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import models
from caprl_utils.schema import Assembly, Donor
from caprl_utils.vlm_init import load_assembly

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
