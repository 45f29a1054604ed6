"""Helpers of these tests."""

import torch

from caprl_utils.vlm_init.settings import Donor

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


def same_logits(left, right, vocabulary: int) -> None:
    """Bit for bit the same logits, without padding and with it on either side."""
    ids = torch.randint(9, vocabulary, PADDED.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(left(input_ids=ids).logits, right(input_ids=ids).logits)
        ours = left(input_ids=ids, attention_mask=PADDED).logits[PADDED.bool()]
        assert torch.equal(ours, right(input_ids=ids, attention_mask=PADDED).logits[PADDED.bool()])
