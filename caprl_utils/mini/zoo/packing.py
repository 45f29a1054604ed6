"""Training batches in which several turns share one prefix (a caption or an image).

A branch sees the prefix and itself, at the positions it would have alone, so that a packed batch computes exactly what
separate sequences would (tests/mini/test_packing.py) at less than half the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.prompts import ANSWER_PREFILL, LETTERS

IGNORED = -100
PAD_ID, IMAGE_PAD = 0, "<|image_pad|>"
TURN_OPEN, TURN_CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
IMAGE_TOKENS_PER_SIDE = 7
IMAGE_TOKENS = IMAGE_TOKENS_PER_SIDE**2
IMAGE_PREFIX = "<|im_start|>user\n<|vision_start|>" + IMAGE_PAD * IMAGE_TOKENS + "<|vision_end|>"


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
    """Tensors of a packed batch; ``position_ids`` is (B, T) for text models and (3, B, T) for VLMs."""

    input_ids: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T)
    position_ids: torch.Tensor
    attention_mask: torch.Tensor  # (B, 1, T, T) bool


def collate(
    examples: Sequence[Packed], tokenizer, with_image: bool = False, text_positions_of_vlm: bool = False
) -> Batch:
    """Pack examples into one right-padded batch, for a text model unless one of the VLM switches is on."""
    pieces = [text for e in examples for text in (e.prefix, *(part for b in e.branches for part in b))]
    encoded = iter(tokenizer(pieces, add_special_tokens=False, return_attention_mask=False)["input_ids"])
    rows = [_pack_one(next(encoded), [(next(encoded), next(encoded)) for _ in e.branches]) for e in examples]
    length = max(len(row[0]) for row in rows)
    ids = torch.full((len(rows), length), PAD_ID)
    labels = torch.full((len(rows), length), IGNORED)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    segments = torch.full((len(rows), length), -1)
    for i, (row_ids, row_labels, row_positions, row_segments) in enumerate(rows):
        n = len(row_ids)
        ids[i, :n], labels[i, :n] = torch.tensor(row_ids), torch.tensor(row_labels)
        positions[i, :n], segments[i, :n] = torch.tensor(row_positions), torch.tensor(row_segments)
    if with_image:
        positions = image_positions(positions)
    elif text_positions_of_vlm:
        positions = positions.expand(3, *positions.shape)
    return Batch(ids, labels, positions, _tree_mask(segments))


def _pack_one(prefix: list[int], branches: list[tuple[list[int], list[int]]]) -> tuple[list[int], ...]:
    ids, labels = list(prefix), [IGNORED] * len(prefix)
    positions, segments = list(range(len(prefix))), [0] * len(prefix)
    for number, (asked, answered) in enumerate(branches, start=1):
        ids += asked + answered
        labels += [IGNORED] * len(asked) + answered
        positions += range(len(prefix), len(prefix) + len(asked) + len(answered))
        segments += [number] * (len(asked) + len(answered))
    return ids, labels, positions, segments


def _tree_mask(segments: torch.Tensor) -> torch.Tensor:
    """(B, T) branch numbers (0 prefix, -1 padding) -> (B, 1, T, T): who sees whom."""
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    same = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    visible = causal & same & (segments[:, None, :] >= 0) | torch.eye(segments.shape[1], dtype=torch.bool)
    return visible[:, None]


def image_positions(positions: torch.Tensor) -> torch.Tensor:
    """(B, T) text positions -> (3, B, T) of Qwen2.5-VL, for sequences that start with ``IMAGE_PREFIX``.

    The 49 visual tokens (after two text tokens) spread over rows and columns; text goes on after the larger side.
    """
    side, first = IMAGE_TOKENS_PER_SIDE, 3  # <|im_start|>, "user\n", <|vision_start|>
    last = first + side * side
    grid = positions.expand(3, *positions.shape).clone()
    index = positions - first
    inside = (index >= 0) & (positions < last)
    grid[0][inside] = first
    grid[1][inside] = first + index[inside] // side
    grid[2][inside] = first + index[inside] % side
    after = positions >= last
    grid[:, after] -= side * side - side
    return grid


def answers_of(model, batch: Batch, seen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the answer tokens of a packed batch (answer tokens, vocabulary), and the tokens wanted there.

    seen: (B, IMAGE_TOKENS, width), the visual tokens of sequences that start with ``IMAGE_PREFIX``.
    """
    inputs = {name: getattr(batch, name) for name in ("position_ids", "attention_mask")}
    text, embedded = model.model, model.get_input_embeddings()(batch.input_ids)
    if seen is not None:
        text, first = (model.model.language_model, len(shared_tokenizer()(IMAGE_PREFIX.split(IMAGE_PAD)[0]).input_ids))
        embedded = torch.cat([embedded[:, :first], seen, embedded[:, first + IMAGE_TOKENS :]], dim=1)
    hidden = text(inputs_embeds=embedded, use_cache=False, **inputs).last_hidden_state
    wanted = batch.labels[:, 1:]
    learned = wanted != IGNORED
    return model.lm_head(hidden[:, :-1][learned]), wanted[learned]


def loss_of(model, batch: Batch, seen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the answer tokens of a packed batch, and the tokens predicted there, (answer tokens,)."""
    logits, wanted = answers_of(model, batch, seen)
    return torch.nn.functional.cross_entropy(logits, wanted), logits.argmax(-1)


def answer_accuracy(batch: Batch, predicted: torch.Tensor) -> dict[str, float]:
    """Shares of predicted answers that are right: ``letters`` of options, and all other ``words``."""
    wanted = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORED]
    tokenizer = shared_tokenizer()
    letters = torch.tensor(tokenizer.convert_tokens_to_ids([f" {letter}" for letter in LETTERS[:5]]))
    frame = torch.tensor(tokenizer.convert_tokens_to_ids([ANSWER_PREFILL, "<|im_end|>"]))
    is_letter, right = torch.isin(wanted, letters), (predicted == wanted).float()
    shares = {"letters": right[is_letter], "words": right[~is_letter & ~torch.isin(wanted, frame)]}
    return {name: share.mean().item() for name, share in shares.items() if len(share)}
