"""Training batches in which several turns share one prefix (a caption or an image).

A branch sees the prefix and itself, at the positions it would have alone, so that a packed batch computes exactly what
separate sequences would (tests/mini/test_zoo.py) at less than half the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.prompts import ANSWER_PREFILL, LETTERS

IGNORED = -100
PAD_ID, IMAGE_PAD = 0, "<|image_pad|>"
TURN_OPEN, TURN_CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
IMAGE_TOKENS_PER_SIDE = 7
IMAGE_TOKENS = IMAGE_TOKENS_PER_SIDE**2
IMAGE_PREFIX = "<|im_start|>user\n<|vision_start|>" + IMAGE_PAD * IMAGE_TOKENS + "<|vision_end|>"
BEFORE_IMAGE = 3  # tokens: <|im_start|>, "user\n", <|vision_start|>


@dataclass
class Packed:
    """One prefix and its branches, as text; of a branch (asked, answered) only the answer is learned."""

    prefix: str
    branches: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, question: str, answer: str) -> None:
        """Add a user turn (the rest of it after the prefix) and what the assistant should say."""
        self.branches.append((question + TURN_CLOSE, answer + END))


@dataclass
class Batch:
    """Tensors of a packed batch; ``position_ids`` is (B, T) for text and (3, B, T) with an image."""

    input_ids: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T)
    position_ids: torch.Tensor
    attention_mask: torch.Tensor  # (B, 1, T, T) bool


def collate(examples: Sequence[Packed], with_image: bool = False) -> Batch:
    """Pack examples into one right-padded batch. with_image: they start with ``IMAGE_PREFIX``."""
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
        for column, value in zip(zip(*rows, strict=True), (PAD_ID, IGNORED, 0, -1), strict=True)
    )
    size = branches.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    same = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    visible = causal & same & (branches[:, None, :] >= 0) | torch.eye(size, dtype=torch.bool)
    return Batch(ids, labels, image_positions(positions) if with_image else positions, visible[:, None])


def image_positions(positions: torch.Tensor) -> torch.Tensor:
    """(B, T) text positions -> (3, B, T) of Qwen2.5-VL, for sequences that start with ``IMAGE_PREFIX``.

    The 49 visual tokens spread over rows and columns; text goes on after the larger side.
    """
    side, first = IMAGE_TOKENS_PER_SIDE, BEFORE_IMAGE
    grid = positions.expand(3, *positions.shape).clone()
    index = positions - first
    inside = (index >= 0) & (index < IMAGE_TOKENS)
    grid[0][inside] = first
    grid[1][inside] = first + index[inside] // side
    grid[2][inside] = first + index[inside] % side
    grid[:, index >= IMAGE_TOKENS] -= IMAGE_TOKENS - side
    return grid


def answers_of(model, batch: Batch, seen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the answer tokens of a packed batch (answer tokens, vocabulary), and the tokens wanted there.

    seen: (B, IMAGE_TOKENS, width), the visual tokens of sequences that start with ``IMAGE_PREFIX``.
    """
    text, embedded = model.model, model.get_input_embeddings()(batch.input_ids)
    if seen is not None:
        text, after = model.model.language_model, embedded[:, BEFORE_IMAGE + IMAGE_TOKENS :]
        embedded = torch.cat([embedded[:, :BEFORE_IMAGE], seen, after], dim=1)
    inputs = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
    hidden = text(inputs_embeds=embedded, use_cache=False, **inputs).last_hidden_state
    wanted = batch.labels[:, 1:]
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
    figures = {name: share.mean().item() for name, share in shares.items() if len(share)}
    return torch.nn.functional.cross_entropy(logits, wanted), figures
