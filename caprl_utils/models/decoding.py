"""Sampling that does not depend on what else is in the batch: each row has random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor

from caprl_utils.hashing import derive_seed
from caprl_utils.models.base import Sampling


def uniforms(seed: int, request_id: str, index: int, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1) for one completion, the same on every machine."""
    bits = derive_seed(seed, index, request_id, bits=128)
    return np.random.Generator(np.random.PCG64(bits)).random(count)


def draw(logprobs: np.ndarray | Sequence[float], temperature: float, at: float) -> int:
    """A place in (V,) log-probabilities, by inverting the distribution at a random number in [0, 1)."""
    values = np.asarray(logprobs)
    weights = np.exp((values - values.max()) / temperature).cumsum(dtype=np.float64)
    return min(int(np.searchsorted(weights, at * weights[-1], side="right")), len(weights) - 1)


class RowSampler(LogitsProcessor):
    """Repetition penalty, temperature and top-p per row; leaves only the drawn token for the greedy decoder.

    The penalty counts prompt and completion, as vLLM does, but never the padding. rows: (seed, request id, index) of
    each row; prompt_mask: attention mask of the prompts, (B, T).
    """

    def __init__(self, sampling: Sampling, rows: Sequence[tuple[int, str, int]], prompt_mask: torch.Tensor):
        self.sampling = sampling
        self.prompt_mask = prompt_mask.bool()
        self.seen: torch.Tensor | None = None  # (B, V)
        draws = [uniforms(seed, name, index, sampling.max_tokens) for seed, name, index in rows]
        self.draws = torch.tensor(np.stack(draws), device=prompt_mask.device)  # (B, max_tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_mask.shape[1]
        if self.sampling.repetition_penalty != 1.0:
            scores = self._penalised(input_ids, scores, step)
        if self.sampling.temperature == 0:
            return scores
        chosen = self._draw(scores, self.draws[:, step : step + 1])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def _penalised(self, input_ids: torch.Tensor, scores: torch.Tensor, step: int) -> torch.Tensor:
        if step == 0:
            counts = torch.zeros(scores.shape, dtype=torch.long, device=scores.device)
            self.seen = counts.scatter_add_(1, input_ids, self.prompt_mask.long()) > 0
        else:
            self.seen.scatter_(1, input_ids[:, -1:], True)
        penalty = self.sampling.repetition_penalty
        return torch.where(self.seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)

    def _draw(self, scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """`draw` for a batch, on its device: (B, V), (B, 1) -> (B, 1)."""
        probs = torch.softmax(scores.double() / self.sampling.temperature, dim=-1)
        if self.sampling.top_p < 1:
            probs, order = probs.sort(dim=-1, descending=True)
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.sampling.top_p, 0.0)
        total = probs.cumsum(-1)
        index = torch.searchsorted(total, draws * total[:, -1:], right=True)
        index = index.clamp(max=scores.shape[1] - 1)
        return order.gather(1, index) if self.sampling.top_p < 1 else index
