"""What every model looks like: requests in, completions out, in the same order; and what makes a model folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.hashing import file_hash, value_hash
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
    """A model that completes chats. config: which one, of those that are no stand-ins."""

    name: str
    config: ModelConfig

    @cached_property
    def model_hash(self) -> str:
        """See the function."""
        return model_hash(self.config)

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """``sampling.n`` completions per request as they are ready; of one that fails they have ``error`` set. Of
        requests that are no list as many are taken as there is room for.
        """

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """All completions, in the order given. Raises ValueError for two requests with the same id."""
        order = {request.id: place for place, request in enumerate(requests)}
        if len(order) < len(requests):
            raise ValueError("two requests have the same id")
        return sorted(self.stream(requests, sampling), key=lambda done: (order[done.id], done.index))

    def choice_logprobs(self, requests: Sequence[Request], choices: Sequence[str]) -> Scores:
        """Log-probability of each choice (one token) as the next token; None for a request without an answer."""


def open_backend(model: ModelConfig, profile: Profile | None = None) -> Backend:
    """The backend asked for, loaded at the first request. Raises UserError for a local folder without a model."""
    if model.backend == "endpoint":
        from caprl_utils.models.endpoint import EndpointBackend

        return EndpointBackend(model)
    from caprl_utils.models.local import LocalBackend

    return LocalBackend(model, profile.torch_threads if profile else None)


# What makes a model folder: weights, config, tokenizer and processor

MODEL_FILES = (
    "*.safetensors*", "config.json", "generation_config.json", "*token*.json", "vocab.json", "merges.txt",
    "*processor*.json", "chat_template.*",
)  # fmt: skip


def model_hash(model: ModelConfig | Path) -> str:
    """Hash of a folder's weights, config, tokenizer and processor alone; of name and revision for the hub's models."""
    folder = model if isinstance(model, Path) else Path(paths.resolve_model(model.path))
    if not folder.is_dir():
        return value_hash([model.path, model.revision])
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    return value_hash({file.name: file_hash(file) for file in files})


GENERAL_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes that take tokenizer.json as it is. Beside a Qwen2 model AutoTokenizer puts Qwen2Tokenizer in their place,
which splits words differently, without a word (transformers 5.17)."""


def check_folder(path: str, name: str) -> None:
    """Raises UserError for a path that looks like a folder and is no model; hub ids pass."""
    folder = Path(path)
    looks_local = folder.is_absolute() or path.startswith((".", "~")) or folder.is_dir()
    if looks_local and not (folder / "config.json").is_file():
        raise UserError(f"no model at {paths.shown(folder)} (models path {name!r}): config.json is missing")


# Parts of a vision-language model, by their names in Qwen2.5-VL, Qwen3-VL, InternVL and LLaVA.
PARTS = ("vision_tower", "projector", "language_model")


def part_of(name: str) -> str:
    """The one of PARTS that a tensor belongs to, in any of the layouts that transformers writes."""
    if re.search(r"\b(visual\.merger|visual\.deepstack_merger_list|multi_modal_projector)(\.|$)", name):
        return "projector"
    return "vision_tower" if re.search(r"\b(visual|vision_tower)(\.|$)", name) else "language_model"
