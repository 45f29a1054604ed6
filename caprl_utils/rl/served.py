"""A faster reader for models behind a vLLM server: many prompts in one HTTP request, letters by probability.

A request per question costs the server more in HTTP, templates and scheduling than the one new token itself. Here the
chat template is taken once from the server, put around every prompt, and the prompts are sent as a list to
/v1/completions. The first call compares the numbers with those of plain requests, and stays plain where they differ.
A list that the server refuses (one prompt is too long, say) is asked one by one, so that only the bad one fails.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from caprl_utils.models.base import Request
from caprl_utils.models.decoding import draw, uniforms
from caprl_utils.models.endpoint import EndpointBackend, Post, RequestError
from caprl_utils.rl.reader import BackendReader

log = logging.getLogger(__name__)
PROMPTS_PER_REQUEST = 64
"""Ours: 16 captions with four questions each; larger lists gain little and spread badly over several servers."""
MAX_STRAY = 0.001
"""Ours: an answer is drawn from the letters here where all other tokens together have at most this probability."""
ANSWERS = "ABCDEFGHI"  # author script: the first of these capitals counts
_TOLERANCE = 0.02  # between batches of another size; 16-bit servers differ by a few thousandths


class ServedReader(BackendReader):
    """A `Reader` over a vLLM server; identical prompts are asked once."""

    def __init__(self, backend: EndpointBackend):
        super().__init__(backend)
        self._frame: tuple[str, str] | None = None  # the template's text before and after a prompt
        self._checked: bool | None = None  # None until the first call

    def letter_logprobs(self, requests: Sequence[Request], letters: str) -> list[list[float] | None]:
        """See `Reader.letter_logprobs`."""
        if not self._usable(requests):
            return super().letter_logprobs(requests, letters)
        found = self._ask({r.prompt: r for r in requests}, letters)
        return [found[r.prompt] for r in requests]

    def _first_tokens(self, requests: Sequence[Request], temperature: float) -> list[str | None]:
        """Drawn here where it is a letter nearly for sure; the other prompts are sampled by the server."""
        if not self._usable(requests):
            return super()._first_tokens(requests, temperature)
        rows = self.letter_logprobs(requests, ANSWERS)
        texts = [
            _drawn(row, r, temperature) if row is not None and stray(row, temperature) <= MAX_STRAY else None
            for row, r in zip(rows, requests, strict=True)
        ]
        unsure = [i for i, row in enumerate(rows) if row is not None and texts[i] is None]
        sampled = super()._first_tokens([requests[i] for i in unsure], temperature)
        for i, text in zip(unsure, sampled, strict=True):
            texts[i] = text
        return texts

    def _ask(self, unique: dict[str, Request], letters: str) -> dict[str, list[float] | None]:
        """Prompt -> log-probabilities of the letters, None where the server failed."""
        before, after = self._frame
        ids = self.backend.choice_ids(tuple(f" {letter}" for letter in letters))
        prompts = list(unique)
        fixed = {
            "model": self.backend.served, "max_tokens": 1, "temperature": 0.0, "logprobs": 0,
            "logprob_token_ids": ids, "return_tokens_as_token_ids": True, "add_special_tokens": False,
        }  # fmt: skip
        parts = [prompts[i : i + PROMPTS_PER_REQUEST] for i in range(0, len(prompts), PROMPTS_PER_REQUEST)]
        posts = (
            Post(part, fixed | {"prompt": [before + p + after for p in part]},
                 partial(_read_many, ids=ids, count=len(part)), "completions")
            for part in parts
        )  # fmt: skip
        found: dict[str, list[float] | None] = {}
        refused: list[Request] = []
        for part, rows in self.backend.client.run(posts):
            if not isinstance(rows, RequestError):
                found.update(zip(part, rows, strict=True))
                continue
            found.update(dict.fromkeys(part))
            if rows.kind == "refused":  # the list is at fault
                refused += [unique[prompt] for prompt in part]
        if refused:
            plain = super().letter_logprobs(refused, letters)
            found.update(zip((r.prompt for r in refused), plain, strict=True))
        return found

    def _usable(self, requests: Sequence[Request]) -> bool:
        if self._checked is None and requests:
            self._checked = self._same_as_plain(requests[:4])
            if self._checked is False:
                log.warning(
                    "%s: prompts in one request differ from separate ones; asking one by one",
                    self.backend.name,
                )
        same_start = all(r.prefill == requests[0].prefill and r.image is None for r in requests)
        return bool(self._checked) and same_start

    def _same_as_plain(self, requests: Sequence[Request]) -> bool | None:
        """None when the server did not answer both ways: nothing is known yet."""
        plain = super().letter_logprobs(requests, "AB")
        try:
            self._frame = frame(self.backend, requests[0])
        except RequestError:
            return None
        if self._frame is None:
            return False
        listed = self._ask({r.prompt: r for r in requests}, "AB")
        if None in plain or None in listed.values():
            return None
        return all(
            max(abs(a - b) for a, b in zip(listed[r.prompt], row, strict=True)) < _TOLERANCE
            for r, row in zip(requests, plain, strict=True)
        )


def frame(backend: EndpointBackend, request: Request) -> tuple[str, str] | None:
    """What the server's chat template puts before and after a prompt, the prefill included; None when it cannot be
    told (no vLLM server, or a template that changes the prompt). Raises RequestError when no server answers.
    """
    messages = [{"role": "user", "content": request.prompt}]
    body: dict[str, Any] = {"model": backend.served, "messages": messages}
    if request.prefill:
        messages.append({"role": "assistant", "content": request.prefill})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    try:
        ids = backend.client.ask("/tokenize", body)["tokens"]
        text = backend.client.ask("/detokenize", {"model": backend.served, "tokens": ids})["prompt"]
        again = {"model": backend.served, "prompt": text, "add_special_tokens": False}
        if backend.client.ask("/tokenize", again)["tokens"] != ids:
            return None
    except RequestError as error:
        if error.kind == "refused":  # no vLLM server
            return None
        raise
    before, found, after = text.partition(request.prompt)
    return (before, after) if found else None


def stray(logprobs: Sequence[float], temperature: float) -> float:
    """The most that tokens other than the letters can have together at a temperature, relative to the letters.

    logprobs: of the letters at temperature 1, which leaves 1 - sum p to the others. Their sum of p^(1/T) is largest
    when one of them has it all. Above temperature 1 it depends on how many they are: infinite.
    """
    if temperature > 1:
        return math.inf
    letters = sum(math.exp(value / temperature) for value in logprobs)
    rest = max(0.0, 1 - sum(map(math.exp, logprobs)))
    return rest ** (1 / temperature) / letters if letters else math.inf


def _drawn(logprobs: Sequence[float], request: Request, temperature: float) -> str:
    """A letter by inverting the distribution at the request's own random number."""
    return f" {ANSWERS[draw(logprobs, temperature, uniforms(0, request.id, 0, 1)[0])]}"


def _read_many(answer: dict[str, Any], ids: Sequence[int], count: int) -> list[list[float]]:
    rows: list[list[float]] = [[] for _ in range(count)]
    for choice in answer["choices"]:
        top = choice["logprobs"]["top_logprobs"][0]
        rows[choice["index"]] = [float(top[f"token_id:{token}"]) for token in ids]
    if not all(rows):
        raise KeyError("a prompt without an answer")
    return rows
