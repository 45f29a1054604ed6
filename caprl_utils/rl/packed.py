"""A faster reader for models in this process: all questions about one caption share one pass over it.

Prompts with a common start (instruction and caption) are packed into one sequence: the start once, then the
rest of each prompt as a branch that sees the start and itself, at the positions it would have alone. The
numbers are those of separate prompts; `PackedReader` compares the two at its first call and says so and
stays plain where they differ (a model whose attention takes no such mask).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from caprl_utils.backends.base import Request
from caprl_utils.backends.decoding import uniforms
from caprl_utils.backends.local import LocalBackend
from caprl_utils.rl.reader import BackendReader

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
TOKENS_PER_PASS = 2048
"""Ours: a rollout of the mini world takes half the time of 8192, where padding and attention cost more."""
TOKENS_PER_PACK = 512
"""Ours: attention grows with the square of a pack; longer captions get packs of twice the longest prompt."""
_TOLERANCE = {"float32": 1e-3}
_TOLERANCE_16_BIT = 0.1


@dataclass
class Pack:
    """Prompts that share their first `shared` tokens; `rows` are their places in the list of prompts."""

    ids: list[list[int]]
    rows: list[int]
    shared: int

    @property
    def length(self) -> int:
        """Tokens of the packed sequence."""
        return self.shared + sum(len(ids) - self.shared for ids in self.ids)


def pack(prompts: Sequence[list[int]], max_tokens: int) -> list[Pack]:
    """Group token lists by their common start; no pack grows beyond `max_tokens` unless one prompt does."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    packs: list[Pack] = []
    for row in order:
        ids = prompts[row]
        if packs:
            last = packs[-1]
            shared = min(_common(last.ids[0], ids), last.shared, len(ids) - 1)
            grown = shared + sum(len(x) - shared for x in last.ids) + len(ids) - shared
            if 2 * shared >= len(ids) and grown <= max_tokens:
                last.ids.append(ids)
                last.rows.append(row)
                last.shared = shared
                continue
        packs.append(Pack([ids], [row], len(ids) - 1))
    return packs


def _common(a: list[int], b: list[int]) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(different[0]) if len(different) else size


def batches(packs: Sequence[Pack], max_tokens: int) -> Iterator[list[Pack]]:
    """Packs of similar length, at most `max_tokens` tokens (padding included) a batch, or one pack."""
    batch: list[Pack] = []
    for one in sorted(packs, key=lambda p: -p.length):
        if batch and (len(batch) + 1) * batch[0].length > max_tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def tensors(packs: Sequence[Pack]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids (B, T), positions (B, T), mask (B, 1, T, T) of who sees whom, last token of each prompt (R,
    2)).
    """
    import torch

    length = max(p.length for p in packs)
    ids = np.zeros((len(packs), length), dtype=np.int64)
    positions = np.zeros((len(packs), length), dtype=np.int64)
    segments = np.full((len(packs), length), -1)
    ends = []
    for i, p in enumerate(packs):
        ids[i, : p.shared], positions[i, : p.shared] = p.ids[0][: p.shared], range(p.shared)
        segments[i, : p.shared] = 0
        place = p.shared
        for number, prompt in enumerate(p.ids, start=1):
            stop = place + len(prompt) - p.shared
            ids[i, place:stop], positions[i, place:stop] = prompt[p.shared :], range(p.shared, len(prompt))
            segments[i, place:stop] = number
            ends.append((i, stop - 1))
            place = stop
    seg = torch.from_numpy(segments)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mine = (seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])
    return torch.from_numpy(ids), torch.from_numpy(positions), (causal & mine)[:, None], torch.tensor(ends)


class PackedReader(BackendReader):
    """A `Reader` over a local text model; identical prompts are computed once."""

    def __init__(self, backend: LocalBackend):
        super().__init__(backend)
        self._model = backend.loaded
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
        weights = np.exp((logprobs - logprobs.max()) / temperature).cumsum(dtype=np.float64)
        draw = uniforms(0, request.id, 0, 1)[0]
        token = min(int(np.searchsorted(weights, draw * weights[-1], side="right")), len(weights) - 1)
        # as a backend's completion: the end of the turn and other special tokens leave no text
        return self._model.tokenizer.decode([token], skip_special_tokens=True)

    def _next_logprobs(self, requests: Sequence[Request]) -> list[np.ndarray | None]:
        """Log-probabilities (V,) after each prompt; None for a prompt that the model cannot take."""
        unique = list({r.prompt: r for r in requests}.values())
        texts = [self._model.prompt_text(r) for r in unique]
        prompts = self._model.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        good = [i for i, ids in enumerate(prompts) if self._model.refusal(unique[i], len(ids) + 1) is None]
        found: dict[str, np.ndarray] = {}
        limit = max([TOKENS_PER_PACK, *(2 * len(prompts[i]) for i in good)])
        for batch in batches(pack([prompts[i] for i in good], limit), TOKENS_PER_PASS):
            rows = [good[row] for p in batch for row in p.rows]
            found.update(zip((unique[row].prompt for row in rows), self._pass(batch), strict=True))
        return [found.get(r.prompt) for r in requests]

    def _pass(self, packs: Sequence[Pack]) -> np.ndarray:
        """(R, V) log-probabilities after each prompt of the packs, in their order."""
        import torch

        device, model = self._model.device, self._model.model
        ids, positions, mask, ends = (x.to(device) for x in tensors(packs))
        with torch.inference_mode():
            hidden = model.model(
                input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
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
