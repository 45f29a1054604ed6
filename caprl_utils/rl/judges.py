"""Judge rewards, what the paper compares the QA reward with (Figure 1c): a model rates the caption of an image.

1. `vlm`: a vision-language model is asked for a score from 1 to 5; the score is the expectation over the
   five digits' probabilities, one forward pass (ours; the paper does not say how the score is read).
2. `unified`: UnifiedReward's contract: an explanation, then a number after "Final Score:" (its repository's
   point_score_image_understanding), here on the paper's scale of 1 to 5.

Both give (score - 1) / 4, from 0 to 1; a caption that could not be rated has None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.models.base import Backend, Request, Sampling
from caprl_utils.rl.rewards import RewardBatch

if TYPE_CHECKING:
    from PIL.Image import Image

SCORES = (1, 2, 3, 4, 5)
UNIFIED_MAX_TOKENS = 512
MIN_SCORE_MASS = 0.5
"""Ours: below it the five digits do not say how the judge would rate."""
_FINAL = re.compile(r"Final Score:\s*\**\s*([0-9]+(?:\.[0-9]+)?)")


def vlm_rewards(captions: list[str], images: list[Image], ids: list[str], judge: Backend) -> RewardBatch:
    """Expected score of each caption over the digits 1 to 5 (see the module); `score_mass` is their probability, and
    a caption for which it is below MIN_SCORE_MASS has None.
    """
    texts = [prompts.RATE.format(caption=caption) for caption in captions]
    rows = _digit_logprobs(judge, _requests(texts, images, ids, prompts.SCORE_PREFILL))
    masses = [sum(map(math.exp, row)) for row in rows if row is not None]
    rewards = [None if row is None else _expected(row) for row in rows]
    return RewardBatch(rewards, {"score_mass": sum(masses) / len(masses)} if masses else {})


def _requests(texts: list[str], images: list[Image], ids: list[str], prefill: str = "") -> list[Request]:
    rows = enumerate(zip(texts, images, ids, strict=True))
    return [Request(f"{name}/{i}", text, image, prefill=prefill) for i, (text, image, name) in rows]


def _digit_logprobs(judge: Backend, requests: list[Request]) -> list[list[float] | None]:
    """Log-probabilities of the five digits after "The score is"; Qwen has the space as a token of its own."""
    try:
        return judge.choice_logprobs(requests, [f" {score}" for score in SCORES])
    except UserError:  # " 1" is no single token
        spaced = [replace(request, prefill=f"{request.prefill} ") for request in requests]
        return judge.choice_logprobs(spaced, [str(score) for score in SCORES])


def _expected(logprobs: Sequence[float]) -> float | None:
    if sum(map(math.exp, logprobs)) < MIN_SCORE_MASS:
        return None
    top = max(logprobs)
    weights = [math.exp(value - top) for value in logprobs]
    return _scaled(sum(s * w for s, w in zip(SCORES, weights, strict=True)) / sum(weights))


def unified_rewards(captions: list[str], images: list[Image], ids: list[str], judge: Backend) -> RewardBatch:
    """The number after "Final Score:"; None where the judge failed or gave none (`unparsed`)."""
    asked = [prompts.UNIFIED.format(question=prompts.CAPTION, caption=caption) for caption in captions]
    requests = _requests(asked, images, ids)
    texts = [c.text for c in judge.generate(requests, Sampling(UNIFIED_MAX_TOKENS))]
    rewards = [None if text is None else final_score(text) for text in texts]
    answered = [r for r, text in zip(rewards, texts, strict=True) if text is not None]
    return RewardBatch(rewards, {"unparsed": answered.count(None) / len(answered)} if answered else {})


def final_score(text: str) -> float | None:
    """The last final score of an answer, scaled to 0 to 1; None without one on the scale."""
    found = _FINAL.findall(text)
    score = float(found[-1]) if found else math.nan
    return _scaled(score) if SCORES[0] <= score <= SCORES[-1] else None


def _scaled(score: float) -> float:
    return (score - SCORES[0]) / (SCORES[-1] - SCORES[0])
