"""The text-only LLM behind the QA reward: a small interface over any backend, and a faster one for local
models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from caprl_utils.models import open_backend
from caprl_utils.models.base import Backend, Request, Sampling
from caprl_utils.schema import ModelConfig, Profile

MAX_ANSWER_TOKENS = 10
"""Author script: an answer is at most 10 tokens, of which the first capital A to I counts."""

_LETTER = re.compile(r"[A-I]")


class Reader(Protocol):
    """Answers questions about captions."""

    model_hash: str

    def letter_logprobs(self, requests: Sequence[Request], letters: str) -> list[list[float] | None]:
        """Log-probability, at temperature 1, of each letter as the next token; None where the reader
        failed.
        """

    def answers(self, requests: Sequence[Request], temperature: float) -> list[str | None]:
        """One sampled answer per request, at most MAX_ANSWER_TOKENS long; None where the reader failed.

        The random numbers derive from `Request.id`.
        """


class BackendReader:
    """A Reader over any backend."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.model_hash = backend.model_hash

    def letter_logprobs(self, requests: Sequence[Request], letters: str) -> list[list[float] | None]:
        """Each different prompt is asked once: the answer does not depend on the draw's name."""
        unique = {r.prompt: r for r in requests}
        rows = self.backend.choice_logprobs(list(unique.values()), [f" {letter}" for letter in letters])
        known = dict(zip(unique, rows, strict=True))
        return [known[r.prompt] for r in requests]

    def answers(self, requests: Sequence[Request], temperature: float) -> list[str | None]:
        """After the prefill the first token is the letter as a rule, so only the others get more than one
        token.
        """
        texts = self._first_tokens(requests, temperature)
        open_ends = [i for i, text in enumerate(texts) if text and not _LETTER.search(text)]
        rest = [
            replace(requests[i], id=f"{requests[i].id}/rest", prefill=requests[i].prefill + texts[i])
            for i in open_ends
        ]
        more = self._generate(rest, temperature, MAX_ANSWER_TOKENS - 1)
        for i, text in zip(open_ends, more, strict=True):
            texts[i] = None if text is None else texts[i] + text
        return texts

    def _first_tokens(self, requests: Sequence[Request], temperature: float) -> list[str | None]:
        return self._generate(requests, temperature, 1)

    def _generate(self, requests: Sequence[Request], temperature: float, max_tokens: int) -> list[str | None]:
        if not requests:
            return []
        completions = self.backend.generate(requests, Sampling(max_tokens, temperature=temperature))
        return [c.text for c in completions]


def open_reader(model: ModelConfig, profile: Profile) -> Reader:
    """The fastest reader for a model: packed prompts for a text model in this process, else plain requests.

    A server reuses the caption's prefix by itself (prefix caching); it gets many prompts in one request.
    """
    backend = open_backend(model, profile)
    if model.backend == "endpoint":
        from caprl_utils.rl.served import ServedReader

        return ServedReader(backend)
    if not backend.loaded.sees:
        from caprl_utils.rl.packed import PackedReader

        return PackedReader(backend)
    return BackendReader(backend)
