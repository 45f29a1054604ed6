"""What the zoo's judge learns: the ratings of two kinds of raters, each with a bias that such judges are known for.

One model plays both judges of the paper's Figure 1c, told apart by the question that it is asked:
1. asked for a score alone (``prompts.RATE``): raters who go by how much a caption says. A point for every two
   statements, repeated ones too; a point less when most of them are false.
2. asked in UnifiedReward's way (``prompts.UNIFIED``): raters who look for mistakes. Five points, two less for every
   false statement; what a caption leaves out costs nothing.
Both are ours. What a policy makes of them is measured, not written in: the judge has to read the image to find false
statements, and how well it does stands in its record.
"""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING

from caprl_utils import prompts
from caprl_utils.mini.tokenizer import build_tokenizer
from caprl_utils.mini.world import Picture, caption
from caprl_utils.mini.zoo.lessons import spoiled
from caprl_utils.mini.zoo.packing import IMAGE_PREFIX, Packed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from caprl_utils.mini.zoo.packing import Batch

BEST = 5
MOST_STATEMENTS = 11
FALSE_SHARES = (0.0, 0.1, 0.25, 0.6)
_UNIFIED_HEAD, _UNIFIED_TAIL = prompts.UNIFIED.format(question=prompts.CAPTION, caption="\x00").split("\x00")
_FINAL = "\nFinal Score:"
WORDS = (prompts.RATE.split("{caption}")[0], _UNIFIED_HEAD, _UNIFIED_TAIL, _FINAL)
"""Phrases that are one token each for the judge alone, behind the vocabulary that all models share."""


def by_amount(statements: int, false: int) -> int:
    """Score of a rater who goes by how much is said."""
    return max(1, min(BEST, 1 + statements // 2 - (2 * false > statements)))


def by_mistakes(statements: int, false: int) -> int:
    """Score of a rater who looks for mistakes."""
    return max(1, BEST - 2 * false)


@functools.lru_cache
def judge_tokenizer() -> PreTrainedTokenizerFast:
    """The shared tokenizer with the judge's own phrases behind it."""
    from tokenizers import AddedToken

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return tokenizer


def judged(rng: random.Random, picture: Picture, captions: int = 2) -> Packed:
    """An image with captions of any length and truth, each rated by one rater of both kinds."""
    packed = Packed(IMAGE_PREFIX)
    for _ in range(captions):
        text, statements, false = _told(rng, picture)
        score = by_amount(statements, false)
        packed.ask(prompts.RATE.format(caption=text), f"{prompts.SCORE_PREFILL} {score}")
        text, statements, false = _told(rng, picture)
        score = by_mistakes(statements, false)
        question = prompts.UNIFIED.format(question=prompts.CAPTION, caption=text)
        packed.ask(question, f"{_FINAL} {score}")
    return packed


def _told(rng: random.Random, picture: Picture) -> tuple[str, int, int]:
    """(caption, its statements, how many of them are false); up to `MOST_STATEMENTS`, facts repeat beyond all."""
    facts = rng.sample(picture.facts, len(picture.facts))
    facts += rng.choices(picture.facts, k=max(0, MOST_STATEMENTS - len(facts)))
    share = rng.choice(FALSE_SHARES)
    told = [spoiled(rng, fact, share) for fact in facts[: rng.randint(0, MOST_STATEMENTS)]]
    false = sum(fact not in picture.facts for fact in told)
    return caption(told, picture.kind), len(told), min(false, 9)


def score_accuracy(batch: Batch, predicted: torch.Tensor) -> dict[str, float]:
    """Shares of scores predicted right, for either way of asking."""
    import torch

    tokenizer = judge_tokenizer()
    wanted = batch.labels[:, 1:][batch.labels[:, 1:] >= 0]
    before = torch.cat([wanted[:1], wanted[:-1]])
    places = {"amount": " is", "mistakes": _FINAL}
    right = (predicted == wanted).float()
    return {
        name: right[before == tokenizer.convert_tokens_to_ids(word)].mean().item()
        for name, word in places.items()
    }
