"""The sampler draws from the distribution it should, whatever else is in the batch."""

import pytest
import torch

from caprl_utils.models.base import Sampling
from caprl_utils.models.decoding import RowSampler, uniforms


def draw(sampling: Sampling, logits: list[float], rows: int) -> torch.Tensor:
    """First tokens of `rows` requests that all see the same logits."""
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    sampler = RowSampler(sampling, [(sampling.seed, str(i), 0) for i in range(rows)], torch.ones_like(prompt))
    return sampler(prompt, torch.tensor([logits] * rows)).argmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = [0.0, 1.0, 2.0, -1.0]
    tokens = draw(Sampling(max_tokens=1, temperature=temperature), logits, 4000)
    expected = torch.softmax(torch.tensor(logits) / temperature, 0)
    assert torch.allclose(torch.bincount(tokens, minlength=4) / 4000, expected, atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    tokens = draw(Sampling(max_tokens=1, temperature=1.0, top_p=0.7), probs.log().tolist(), 2000)
    assert set(tokens.tolist()) == {1, 3}
    assert (tokens == 1).float().mean() == pytest.approx(0.5 / 0.75, abs=0.03)


def test_repetition_penalty_by_hand_and_padding_not_counted():
    sampling = Sampling(max_tokens=2, repetition_penalty=2.0)
    mask = torch.tensor([[0, 1, 1]])
    sampler = RowSampler(sampling, [(0, "x", 0)], mask)
    scores = sampler(torch.tensor([[0, 1, 2]]), torch.tensor([[4.0, 4.0, -1.0, 3.0]]))
    assert scores.tolist() == [[4.0, 2.0, -2.0, 3.0]]  # token 0 is padding, 1 and 2 are the prompt
    scores = sampler(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[4.0, 4.0, -1.0, 3.0]]))
    assert scores.tolist() == [[4.0, 2.0, -2.0, 1.5]]


def test_uniforms_are_pinned():
    assert uniforms(0, "x", 0, 2) == pytest.approx(uniforms(0, "x", 0, 3)[:2])
    assert uniforms(0, "x", 0, 1)[0] != uniforms(0, "x", 1, 1)[0] != uniforms(1, "x", 0, 1)[0]
