"""The lesson of vision towers: to say which two words every grid cell stands for. And the small CLIP tower it makes.

The tower of CLIP is the mini world's part of CLIP-ViT-L: class token, one patch per grid cell, features taken before
the last layer, as LLaVA does. The projector it learns with is thrown away.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from caprl_utils import paths
from caprl_utils.mini.render import render, shown_words
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.world import Picture
from caprl_utils.mini.zoo.packing import IMAGE_TOKENS_PER_SIDE

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPImageProcessor

CLIP_SIDE, CLIP_PATCH = 140, 28  # one patch is one cell
CLIP_WIDTH, CLIP_MLP, CLIP_LAYERS, CLIP_HEADS = 64, 128, 5, 4
FEATURE_LAYER = -2


def word_targets(shown: Sequence[Picture], num_words: int) -> torch.Tensor:
    """(pictures * cells, words): one half for the key and one for the value of the cell's fact, else zeros."""
    convert, side = shared_tokenizer().convert_tokens_to_ids, IMAGE_TOKENS_PER_SIDE
    wanted = torch.zeros(len(shown) * side**2, num_words)
    for number, one in enumerate(shown):
        for (column, row), texts in shown_words(one).items():
            for text in texts:
                wanted[number * side**2 + row * side + column, convert(f" {text}")] = 0.5
    return wanted


def naming_loss(
    seen: torch.Tensor, wanted: torch.Tensor, words: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and figures of visual tokens (cells, width) that should be the sum of their two words' embeddings.

    Cross-entropy with the two words as equally likely, plus the squared distance from that sum: without it tokens had
    three times its length and empty cells were as loud as full ones. `cells`: the two words are the likeliest.
    """
    scale = 20 / words.norm(dim=1).mean() ** 2  # a token equal to its word's embedding is then sure of it
    filled = wanted.sum(1) > 0
    logits = scale * seen[filled] @ words.T
    right = (wanted[filled].gather(1, logits.topk(2).indices) > 0).all(1)
    away = (seen - 2 * wanted @ words).square().sum(1).mean() / words.square().sum(1).mean()
    loss = nn.functional.cross_entropy(logits, wanted[filled]) + away
    return loss, {"cells": right.float().mean().item(), "away": away.item()}


class ClipReader(nn.Module):
    """A CLIP vision tower and a projector into a language model's (frozen) embeddings."""

    def __init__(self, seed: int, words: torch.Tensor) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        torch.manual_seed(seed)
        self.tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=CLIP_WIDTH,
                intermediate_size=CLIP_MLP,
                num_hidden_layers=CLIP_LAYERS,
                num_attention_heads=CLIP_HEADS,
                image_size=CLIP_SIDE,
                patch_size=CLIP_PATCH,
                projection_dim=CLIP_WIDTH,
            )
        )
        width = words.shape[1]
        self.projector = nn.Sequential(nn.Linear(CLIP_WIDTH, width), nn.GELU(), nn.Linear(width, width))
        nn.init.normal_(self.projector[2].weight, std=0.02)  # tokens start quieter than the words, not louder
        nn.init.zeros_(self.projector[2].bias)
        self.register_buffer("words", words)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, side, side) -> (B * cells, width of the language model)."""
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[FEATURE_LAYER]
        return self.projector(hidden[:, 1:]).flatten(0, 1)


def clip_reader(seed: int) -> ClipReader:
    """A fresh tower that is to speak the words of zoo:reader-reward."""
    from safetensors import safe_open

    with safe_open(f"{paths.resolve_model('zoo:reader-reward')}/model.safetensors", "pt") as weights:
        return ClipReader(seed, weights.get_tensor("model.embed_tokens.weight").float())


@functools.lru_cache
def clip_image_processor() -> CLIPImageProcessor:
    """The real image processor at the tower's size."""
    from transformers import CLIPImageProcessor

    side = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    return CLIPImageProcessor(size={"shortest_edge": CLIP_SIDE}, crop_size=side)


def clip_pixels(shown: Sequence[Picture]) -> torch.Tensor:
    """(B, 3, side, side) of rendered pictures, by the real image processor."""
    return clip_image_processor()(images=[render(p) for p in shown], return_tensors="pt").pixel_values


def save_clip_tower(reader: ClipReader, folder: Path) -> None:
    """The tower alone, in 16 bit, with its image processor."""
    reader.tower.to(torch.float16).save_pretrained(folder)
    clip_image_processor().save_pretrained(folder)
