"""Captions of one prompt side by side in one row, so that a pass reads each image and each question once.

A caption sees its prompt and itself, at the positions that it would have alone: the numbers are those of separate rows.
Of 32 captions of 4 images (the mini world's) a third of the tokens is left. For CPUs: on a GPU a mask of one's own
costs the fast kernels of attention, and a pass holds few captions of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from caprl_utils.models.local import distinct

IGNORED = -100


def visible(branches: torch.Tensor) -> torch.Tensor:
    """(B, T) numbers of branches, 0 for the prefix and -1 for padding -> (B, T, T) whether a token (row) sees another:
    those before it in the prefix and in its own branch, and itself.
    """
    size = branches.shape[1]
    shared = (branches == 0)[:, None, :] | (branches[:, None, :] == branches[:, :, None])
    before = torch.ones(size, size, dtype=torch.bool, device=branches.device).tril()
    alone = torch.eye(size, dtype=torch.bool, device=branches.device)
    return before & shared & (branches >= 0)[:, None, :] | alone


def packed_logps(
    model: Any, positions_of: Callable[..., tuple], input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: int,
    fields: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(B, keep) log-probabilities, and entropies where the model gives them, of the last `keep` tokens of rows of a
    Qwen-VL model, as TRL's own pass has them; 0 where a caption has ended. One image a row, prompts padded on the left,
    captions on the right.

    model: patched by TRL to score in its forward. positions_of: the model's `get_rope_index`.
    """
    start, grid, types = input_ids.shape[1] - keep, fields["image_grid_thw"], fields["mm_token_type_ids"]
    images = torch.split(fields["pixel_values"], grid.prod(-1).tolist())
    groups: dict[tuple, list[int]] = {}  # of captions that share image and prompt
    for row, image in enumerate(distinct(images)[0]):
        groups.setdefault((image, *input_ids[row, :start].tolist()), []).append(row)
    first, prompts = [rows[0] for rows in groups.values()], slice(start)
    mask = attention_mask[first, prompts]
    positions, _ = positions_of(input_ids[first, prompts], types[first, prompts], grid[first], attention_mask=mask)
    columns, places = [], []
    for number, rows in enumerate(groups.values()):
        used = mask[number].bool()
        prompt, spots = input_ids[rows[0], prompts][used], positions[:, number, used]
        # a caption begins with the prompt's last token once more: what follows it differs
        ids, at, branches, labels = [prompt[:-1]], [spots[:, :-1]], [0] * (len(prompt) - 1), [prompt[:-1] * 0 + IGNORED]
        for branch, row in enumerate(rows, start=1):
            told = input_ids[row, start:][attention_mask[row, start:].bool()]
            places.append((row, number, len(branches), len(told)))
            ids += [prompt[-1:], told]
            labels += [told, told.new_tensor([IGNORED])]
            at.append(spots[:, -1:] + torch.arange(len(told) + 1, device=spots.device))
            branches += [branch] * (len(told) + 1)
        columns.append((torch.cat(ids), torch.cat(labels), torch.cat(at, 1).T, input_ids.new_tensor(branches)))
    ids, labels, at, branches = (
        pad_sequence(column, batch_first=True, padding_value=filler)
        for column, filler in zip(zip(*columns, strict=True), (0, IGNORED, 0, -1), strict=True)
    )
    scored = model(
        input_ids=ids, attention_mask=visible(branches)[:, None], position_ids=at.permute(2, 0, 1),
        pixel_values=torch.cat([images[row] for row in first]), image_grid_thw=grid[first],
        shift_labels=labels, fused_lm_head=True,
    )  # fmt: skip

    def of_rows(values: torch.Tensor) -> torch.Tensor:
        own = {row: values[number, begin : begin + count] for row, number, begin, count in places}
        whole = pad_sequence([own[row] for row in range(len(input_ids))], batch_first=True)
        return torch.nn.functional.pad(whole, (0, keep - whole.shape[1]))

    return of_rows(scored.log_probs), None if scored.entropy is None else of_rows(scored.entropy)
