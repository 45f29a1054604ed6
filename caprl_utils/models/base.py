"""What every model looks like to the rest of the project: requests in, completions out, in the same order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from caprl_utils.schema import ModelConfig, Profile

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Request:
    """One user turn. prefill: starts the assistant's turn, is not repeated. seed: in the place of the sampling's."""

    id: str
    prompt: str
    image: Image | None = None
    prefill: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How to decode: ``temperature`` 0 is greedy; ``n`` completions per request; ``seed`` for repeating."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    n: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One answer to a request: ``text`` is None when ``error`` says why there is none."""

    id: str
    index: int
    text: str | None
    num_tokens: int
    finish_reason: str  # "stop" | "length" | "error"
    error: str | None = None


Scores = list[list[float] | None]


class Backend(Protocol):
    """A model that completes chats."""

    name: str
    model_hash: str

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """``sampling.n`` completions per request, in the order given; of one that fails they have ``error`` set."""

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """As `generate`, for any number of requests, taken as there is room; completions come as they are ready."""

    def choice_logprobs(self, requests: Sequence[Request], choices: Sequence[str]) -> Scores:
        """Log-probability of each choice (one token) as the next token; None for a request without an answer."""


def open_backend(model: ModelConfig, profile: Profile) -> Backend:
    """The backend asked for, loaded at the first request. Raises UserError for a local folder without a model."""
    if model.backend == "endpoint":
        from caprl_utils.models.endpoint import EndpointBackend

        return EndpointBackend(model)
    from caprl_utils.models.local import LocalBackend

    return LocalBackend(model, torch_threads=profile.torch_threads)
