"""Training batches in which several turns share one prefix (a caption or an image).

A branch sees the prefix and itself, at the positions it would have alone, so that a packed batch computes exactly what
separate sequences would (tests/mini/test_zoo.py) at less than half the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from caprl_utils.mini.render import CELLS
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.prompts import ANSWER_PREFILL, LETTERS
from caprl_utils.rl.packed import IGNORED, visible

IMAGE_PAD, IMAGE_TOKENS = "<|image_pad|>", CELLS**2
TURN_OPEN, TURN_CLOSE, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
IMAGE_PREFIX = TURN_OPEN + "<|vision_start|>" + IMAGE_PAD * IMAGE_TOKENS + "<|vision_end|>"
BEFORE_IMAGE = 3  # tokens: <|im_start|>, "user\n", <|vision_start|>
Batch = dict[str, torch.Tensor]


@dataclass
class Packed:
    """One prefix and its branches, as text; of a branch (asked, answered) only the answer is learned."""

    prefix: str
    branches: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, question: str, answer: str) -> None:
        """Add a user turn (the rest of it after the prefix) and what the assistant should say."""
        self.branches.append((question + TURN_CLOSE, answer + END))


def collate(examples: Sequence[Packed]) -> Batch:
    """Examples as one right-padded batch: input_ids and labels (B, T), position_ids (B, T), or (3, B, T) where all
    start with ``IMAGE_PREFIX``, and attention_mask (B, 1, T, T) bool.
    """
    rows = []
    for example in examples:
        texts = [example.prefix, *(text for branch in example.branches for text in branch)]
        prefix, *parts = shared_tokenizer()(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ids, labels, positions = [*prefix], [IGNORED] * len(prefix), [*range(len(prefix))]
        branches = [0] * len(prefix)  # their numbers; 0: the prefix
        for number, (asked, answered) in enumerate(zip(parts[::2], parts[1::2], strict=True), start=1):
            size = len(asked) + len(answered)
            ids += asked + answered
            labels += [IGNORED] * len(asked) + answered
            positions += range(len(prefix), len(prefix) + size)
            branches += [number] * size
        rows.append((ids, labels, positions, branches))
    ids, labels, positions, branches = (
        pad_sequence([torch.tensor(row) for row in column], batch_first=True, padding_value=value)
        for column, value in zip(zip(*rows, strict=True), (0, IGNORED, 0, -1), strict=True)
    )
    seen = visible(branches)[:, None]
    positions = image_positions(positions) if examples[0].prefix == IMAGE_PREFIX else positions
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": seen}


def image_positions(positions: torch.Tensor) -> torch.Tensor:
    """(B, T) text positions -> (3, B, T) of Qwen2.5-VL, for sequences that start with ``IMAGE_PREFIX``.

    The visual tokens spread over rows and columns; text goes on after the larger side.
    """
    grid, index = positions.expand(3, *positions.shape).clone(), positions - BEFORE_IMAGE
    inside = (index >= 0) & (index < IMAGE_TOKENS)
    grid[0][inside] = BEFORE_IMAGE
    grid[1][inside] = BEFORE_IMAGE + index[inside] // CELLS
    grid[2][inside] = BEFORE_IMAGE + index[inside] % CELLS
    grid[:, index >= IMAGE_TOKENS] -= IMAGE_TOKENS - CELLS
    return grid


def answers_of(model, batch: Batch, seen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the answer tokens of a packed batch (answer tokens, vocabulary), and the tokens wanted there.

    seen: (B, IMAGE_TOKENS, width), the visual tokens of sequences that start with ``IMAGE_PREFIX``.
    """
    text, embedded = model.model, model.get_input_embeddings()(batch["input_ids"])
    if seen is not None:
        text, after = model.model.language_model, embedded[:, BEFORE_IMAGE + IMAGE_TOKENS :]
        embedded = torch.cat([embedded[:, :BEFORE_IMAGE], seen, after], dim=1)
    places = {name: batch[name] for name in ("position_ids", "attention_mask")}
    hidden = text(inputs_embeds=embedded, use_cache=False, **places).last_hidden_state
    wanted = batch["labels"][:, 1:]
    learned = wanted != IGNORED
    return model.lm_head(hidden[:, :-1][learned]), wanted[learned]


def loss_of(model, batch: Batch, seen: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean cross-entropy over the answer tokens of a packed batch, and shares of them that are predicted rightly:
    ``letters`` of options, and all other ``words``.
    """
    logits, wanted = answers_of(model, batch, seen)
    convert = shared_tokenizer().convert_tokens_to_ids
    letters = torch.tensor(convert([f" {letter}" for letter in LETTERS[:5]]))
    is_letter, right = torch.isin(wanted, letters), (logits.argmax(-1) == wanted).float()
    frame = torch.isin(wanted, torch.tensor(convert([ANSWER_PREFILL, END])))
    shares = {"letters": right[is_letter], "words": right[~is_letter & ~frame]}
    return cross_entropy(logits, wanted), {name: one.mean().item() for name, one in shares.items() if len(one)}
