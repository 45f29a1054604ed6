"""Readers whose answers are known."""

import math
from collections.abc import Callable, Sequence

from caprl_utils.models.base import Request
from caprl_utils.models.local import draw, uniforms


def options_of(prompt: str) -> dict[str, str]:
    """{letter: option} of a question as the reader sees it."""
    return {line[0]: line[3:] for line in prompt.splitlines() if line[1:3] == ") "}


class ChanceReader:
    """Answers with given probabilities of the option texts; `None` from `chances` is a failure."""

    model_hash, words = "chances", "short"

    def __init__(self, chances: Callable[[Request, dict[str, str]], dict[str, float] | None]):
        self.chances, self.prompts = chances, []

    def _letters(self, request: Request) -> dict[str, float] | None:
        self.prompts.append(request.prompt)
        return self.chances(request, options_of(request.prompt))

    def letter_logprobs(self, requests: Sequence[Request], letters: str) -> list[list[float] | None]:
        rows = map(self._letters, requests)
        return [row if row is None else [math.log(row.get(x, 0.0) or 1e-12) for x in letters] for row in rows]

    def answers(self, requests: Sequence[Request], temperature: float) -> list[str | None]:
        return [self._drawn(r, temperature) for r in requests]

    def _drawn(self, request: Request, temperature: float) -> str | None:
        row = self._letters(request)
        known = {letter: math.log(p) for letter, p in (row or {}).items() if p}
        if not known:
            return None if row is None else " nothing"
        return f" {[*known][draw([*known.values()], temperature, uniforms(0, request.id, 0, 1)[0])]}"
