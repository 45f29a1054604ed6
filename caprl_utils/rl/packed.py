"""A faster reader for models in this process: what prompts have in common is computed once.

The questions about one caption start alike, and so do many captions of one image. The prompts are written as a tree
of tokens, depth first: a token sees its ancestors and itself, at the position it would have alone. The numbers are
those of separate prompts; `PackedReader` compares the two at its first call and says so and stays plain where they
differ (a model whose attention takes no such mask).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from caprl_utils.models.base import Request
from caprl_utils.models.decoding import draw, uniforms
from caprl_utils.models.local import LocalBackend
from caprl_utils.rl.reader import BackendReader

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
TOKENS_PER_PASS = {"cpu": 1024, "cuda": 8192}
"""Ours. On a CPU what lies between the layers stays in the cache: a rollout of the mini world takes a seventh less than
at 2048 and a third less than at 8192. On a GPU not measured.
"""
TOKENS_PER_PACK = 160
"""Ours: attention grows with the square of a pack; longer captions get packs of twice the longest prompt."""
_TOLERANCE = {"float32": 1e-3}
_TOLERANCE_16_BIT = 0.1
_MAX_KEPT = 50_000_000  # log-probabilities that stay in memory between two calls, 0.2 GB
_OPEN = np.iinfo(np.int64).max  # a token that has descendants up to the end of its pack


@dataclass
class Pack:
    """Prompts as a tree of tokens, depth first."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of each token in its prompts
    stops: list[int] = field(default_factory=list)  # the descendants of each token lie before this place
    ends: list[int] = field(default_factory=list)  # place of each prompt's last token
    rows: list[int] = field(default_factory=list)  # which prompts of the list they are
    _last: list[int] = field(default_factory=list)  # the last prompt
    _path: list[int] = field(default_factory=list)  # places of its tokens

    def shared(self, prompt: list[int]) -> int:
        """How many of a prompt's first tokens the last one has too."""
        pairs = enumerate(zip(self._last, prompt, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self._last), len(prompt)))

    def add(self, prompt: list[int], row: int, shared: int) -> None:
        """Append a prompt as a branch that leaves the last one after `shared` tokens."""
        start = len(self.ids)
        for place in self._path[shared:]:
            self.stops[place] = start
        self._path[shared:] = range(start, start + len(prompt) - shared)
        self.ids += prompt[shared:]
        self.positions += range(shared, len(prompt))
        self.stops += [_OPEN] * (len(prompt) - shared)
        self._last = prompt
        self.ends.append(self._path[-1])
        self.rows.append(row)


def pack(prompts: Sequence[list[int]], max_tokens: int) -> list[Pack]:
    """Trees of token lists in sorted order; none grows beyond `max_tokens` unless one prompt does.

    A tree that is half full ends before a prompt that has little in common with it: captions stay whole.
    """
    packs: list[Pack] = []
    for row in sorted(range(len(prompts)), key=lambda i: prompts[i]):
        ids = prompts[row]
        shared = packs[-1].shared(ids) if packs else 0
        size = len(packs[-1].ids) if packs else max_tokens
        if size + len(ids) - shared > max_tokens or (2 * shared < len(ids) and 2 * size > max_tokens):
            packs.append(Pack())
            shared = 0
        packs[-1].add(ids, row, shared)
    return packs


def batches(packs: Sequence[Pack], max_tokens: int) -> Iterator[list[Pack]]:
    """Packs of similar length, at most `max_tokens` tokens (padding included) a batch, or one pack."""
    batch: list[Pack] = []
    for one in sorted(packs, key=lambda p: -len(p.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > max_tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def tensors(packs: Sequence[Pack]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids (B, T), positions (B, T), what is added to the attention scores (B, 1, T, T), last token of each
    prompt (R, 2)).
    """
    import torch

    length = max(len(p.ids) for p in packs)
    ids = np.zeros((len(packs), length), dtype=np.int64)
    positions = np.zeros((len(packs), length), dtype=np.int64)
    stops = np.full((len(packs), length), _OPEN)  # padding sees itself: a row without any would be NaN
    for i, p in enumerate(packs):
        size = len(p.ids)
        ids[i, :size], positions[i, :size], stops[i, :size] = p.ids, p.positions, p.stops
    place = torch.arange(length)
    before = place[:, None] >= place[None, :]
    inside = place[:, None] < torch.from_numpy(stops)[:, None, :]
    # a mask of booleans would be turned into this anew in every layer
    hidden = torch.where(before & inside, 0.0, -torch.inf)
    ends = torch.tensor([(i, end) for i, p in enumerate(packs) for end in p.ends])
    return torch.from_numpy(ids), torch.from_numpy(positions), hidden[:, None], ends


class PackedReader(BackendReader):
    """A `Reader` over a local text model; identical prompts are computed once."""

    def __init__(self, backend: LocalBackend):
        super().__init__(backend)
        self._model = backend.loaded
        self._frame = ("", "")  # the template's text before and after a prompt
        self._last: dict[tuple[str, str], np.ndarray] = {}  # (prompt, prefill) -> its row, of the last call
        self._checked: bool | None = None  # None until the first call

    def letter_logprobs(self, requests: Sequence[Request], letters: str) -> list[list[float] | None]:
        """See `Reader.letter_logprobs`."""
        if not self._usable(requests):
            return super().letter_logprobs(requests, letters)
        ids = self._model.choice_ids([f" {letter}" for letter in letters])
        return [None if row is None else row[ids].tolist() for row in self._next_logprobs(requests)]

    def _first_tokens(self, requests: Sequence[Request], temperature: float) -> list[str | None]:
        if not self._usable(requests):
            return super()._first_tokens(requests, temperature)
        return [
            None if row is None else self._drawn(row, request, temperature)
            for row, request in zip(self._next_logprobs(requests), requests, strict=True)
        ]

    def _drawn(self, logprobs: np.ndarray, request: Request, temperature: float) -> str:
        """One token by inverting the distribution at the request's own random number; "" at the end of the
        turn.
        """
        # as a backend's completion: the end of the turn and other special tokens leave no text
        return self._text([draw(logprobs, temperature, uniforms(0, request.id, 0, 1)[0])])

    def _generate(self, requests: Sequence[Request], temperature: float, max_tokens: int) -> list[str | None]:
        """Completions of prompts that share their starts, as the backend's own."""
        if not self._checked or not requests:
            return super()._generate(requests, temperature, max_tokens)
        prompts = self._prompt_ids([(r.prompt, r.prefill) for r in requests])
        good = [
            i for i, ids in enumerate(prompts) if not self._model.refusal(requests[i], len(ids) + max_tokens)
        ]
        texts: list[str | None] = [None] * len(requests)
        for tree in pack([prompts[i] for i in good], TOKENS_PER_PASS[self._model.device]):
            rows = [good[row] for row in tree.rows]
            draws = np.stack([uniforms(0, requests[row].id, 0, max_tokens) for row in rows])
            for row, ids in zip(rows, self._continued(tree, temperature, draws), strict=True):
                texts[row] = self._text(ids)
        return texts

    def _continued(self, tree: Pack, temperature: float, draws: np.ndarray) -> list[list[int]]:
        """Tokens after each prompt of a tree, up to the end of the turn; draws: (R, most tokens)."""
        import torch
        from transformers import DynamicCache

        model, device, count = self._model.model, self._model.device, len(tree.rows)
        ids, positions, scores, ends = (x.to(device) for x in tensors([tree]))
        own = torch.full((count, count), -torch.inf, device=device).fill_diagonal_(0.0)
        sees, depths = scores[0, 0, ends[:, 1]], positions[0, ends[:, 1]]
        cache, place = DynamicCache(), ends[:, 1]
        new: list[list[int]] = [[] for _ in tree.rows]
        for step in range(draws.shape[1]):
            with torch.inference_mode():
                hidden = model.model(
                    input_ids=ids, position_ids=positions, attention_mask=scores.to(model.dtype),
                    past_key_values=cache, use_cache=True,
                ).last_hidden_state  # fmt: skip
                rows = torch.log_softmax(model.lm_head(hidden[0, place]).float(), dim=-1).cpu().numpy()
            drawn = [draw(row, temperature, at) for row, at in zip(rows, draws[:, step], strict=True)]
            for tokens, token in zip(new, drawn, strict=True):
                tokens.append(token)
            if all(self._model.end_ids.intersection(tokens) for tokens in new):
                break
            sees, place = torch.cat([sees, own], dim=1), torch.arange(count, device=device)
            ids, positions = torch.tensor([drawn], device=device), (depths + step + 1)[None]
            scores = sees[None, None]
        return new

    def _text(self, ids: list[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in self._model.end_ids), len(ids))
        return self._model.tokenizer.decode(
            ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _prompt_ids(self, names: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Tokens of each (prompt, prefill) in the chat template."""
        before, after = self._frame
        texts = [before + prompt + after + prefill for prompt, prefill in names]
        return self._model.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _next_logprobs(self, requests: Sequence[Request]) -> list[np.ndarray | None]:
        """Log-probabilities (V,) after each prompt; None for a prompt that the model cannot take.

        Those of the last call are kept, unless they are many: the reward samples an answer where the letters had
        little probability.
        """
        unique = {(r.prompt, r.prefill): r for r in requests}
        rows = self._last if unique.keys() <= self._last.keys() else self._computed(unique)
        self._last = rows if sum(row.size for row in rows.values()) <= _MAX_KEPT else {}
        return [rows.get((r.prompt, r.prefill)) for r in requests]

    def _computed(self, unique: Mapping[tuple[str, str], Request]) -> dict[tuple[str, str], np.ndarray]:
        names, asked = list(unique), list(unique.values())
        prompts = self._prompt_ids(names)
        good = [i for i, ids in enumerate(prompts) if self._model.refusal(asked[i], len(ids) + 1) is None]
        found: dict[tuple[str, str], np.ndarray] = {}
        limit = max([TOKENS_PER_PACK, *(2 * len(prompts[i]) for i in good)])
        per_pass = TOKENS_PER_PASS[self._model.device]
        for batch in batches(pack([prompts[i] for i in good], limit), per_pass):
            rows = [good[row] for p in batch for row in p.rows]
            found.update(zip((names[row] for row in rows), self._pass(batch), strict=True))
        return found

    def _pass(self, packs: Sequence[Pack]) -> np.ndarray:
        """(R, V) log-probabilities after each prompt of the packs, in their order."""
        import torch

        device, model = self._model.device, self._model.model
        ids, positions, mask, ends = (x.to(device) for x in tensors(packs))
        with torch.inference_mode():
            hidden = model.model(
                input_ids=ids, position_ids=positions, attention_mask=mask.to(model.dtype), use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden[ends[:, 0], ends[:, 1]])
            return torch.log_softmax(logits.float(), dim=-1).cpu().numpy()

    def _usable(self, requests: Sequence[Request]) -> bool:
        if self._checked is None and requests:
            self._checked = self._same_as_plain(requests[:4])
            if not self._checked:
                log.warning(
                    "%s: packed prompts differ from separate ones; asking one by one", self.backend.name
                )
        return bool(self._checked)

    def _same_as_plain(self, requests: Sequence[Request]) -> bool:
        choices = [" A", " B"]
        plain = self.backend.choice_logprobs(requests, choices)
        first = replace(requests[0], prefill="")
        before, _, after = self._model.prompt_text(first).partition(first.prompt)
        self._frame = (before, after)
        try:
            rows = self._next_logprobs(requests)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            log.warning("%s takes no packed prompts: %s", self.backend.name, error)
            return False
        ids = self._model.choice_ids(choices)
        limit = _TOLERANCE.get(str(self._model.model.dtype).removeprefix("torch."), _TOLERANCE_16_BIT)
        return all(
            (a is None) == (b is None) and (a is None or np.abs(b[ids] - a).max() < limit)
            for a, b in zip(plain, rows, strict=True)
        )
