"""What every model looks like to the rest of the project: requests in, completions out, in the same order.

backend = open_backend(profile.models.policy, profile)
completions = backend.generate([Request("1", prompts.CAPTION, image)], Sampling(max_tokens=128))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from caprl_utils.schema import ModelConfig, Profile

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Request:
    """One user turn.

    ``prefill`` starts the assistant's turn; the model continues it (the completion does not repeat it).
    ``seed`` stands for the sampling's where it is given.
    """

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


class Backend(Protocol):
    """A model that completes chats."""

    name: str
    model_hash: str

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """``sampling.n`` completions per request, grouped by request in the order given.

        A request that fails gives completions with ``error`` set; the others are not affected.
        """

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """As `generate`, for any number of requests: they are taken one by one as there is room for them.

        Completions come as they are ready, in any order; each request gets all of its own.
        """

    def choice_logprobs(
        self, requests: Sequence[Request], choices: Sequence[str]
    ) -> list[list[float] | None]:
        """Log-probability of each choice (one token each) as the next token, at temperature 1.

        None stands for a request that could not be answered; missing is not zero.
        """


def open_backend(model: ModelConfig, profile: Profile) -> Backend:
    """The backend that the profile asks for; weights are loaded at the first request, not here.

    Raises UserError when a local model's folder is missing or holds no model.
    """
    if model.backend == "endpoint":
        from caprl_utils.models.endpoint import EndpointBackend

        return EndpointBackend(model)
    from caprl_utils.models.local import LocalBackend

    return LocalBackend(model, torch_threads=profile.torch_threads)
