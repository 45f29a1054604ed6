"""vLLM in this process, without a server: one process per GPU, each on the shards it claims.

The engine gets the arguments that our server gets (`backends.server`), read by vLLM's own parser, so a misspelt
or refused one stops the work before any weights are loaded. Each caption is a request with a seed of its own,
as behind a server.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.models import server
from caprl_utils.models.base import Completion, Request, Sampling
from caprl_utils.models.endpoint import request_seed
from caprl_utils.models.weights import model_hash
from caprl_utils.schema import ModelConfig

if TYPE_CHECKING:
    from vllm import SamplingParams

ENGINE_BATCHES = 8  # ours: as many batches are in the engine at a time; more hold more images in memory
_SERVER_ONLY = ("--served-model-name", "--host", "--port")


class VllmBackend:
    """A model of vLLM's engine; it is loaded at the first request. See `Backend`; letters are left to servers."""

    def __init__(self, config: ModelConfig, max_model_len: int | None = None) -> None:
        self.name, self.config, self.max_model_len = config.path, config, max_model_len
        self.model_hash = model_hash(config)
        self._running: dict[str, tuple[Request, int]] = {}  # by the number that the engine gave
        self._ready: deque[Completion] = deque()  # finished while `generate` waited for others

    @cached_property
    def _engine(self) -> Any:
        options = engine_options(self.config, self.max_model_len)
        os.environ.update(server.environment(self.config))
        from vllm import LLM

        return LLM.from_engine_args(options)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: str | None = None
    ) -> list[Completion]:
        """See `Backend.generate`. What `stream` has in the engine goes on meanwhile."""
        wanted = [self._submit(request, index, sampling) for request, index in _each(requests, sampling)]
        done: dict[str, Completion] = {}
        while len(done) < len(wanted):
            for number, completion in self._step():
                if number in wanted:
                    done[number] = completion
                else:
                    self._ready.append(completion)
        return [done[number] for number in wanted]

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Backend.stream`. The engine is filled up after every step, so it does not drain between shards."""
        waiting = _each(requests, sampling)
        while True:
            room = ENGINE_BATCHES * self.config.batch_size - len(self._running)
            for request, index in islice(waiting, max(room, 0)):
                self._submit(request, index, sampling)
            if self._running and not self._ready:
                self._ready.extend(completion for _, completion in self._step())
            if not self._running and not self._ready:
                return
            while self._ready:
                yield self._ready.popleft()

    def _submit(self, request: Request, index: int, sampling: Sampling) -> str:
        """Put one caption's request into the engine; returns its number there."""
        (name,) = self._engine.enqueue_chat(
            [_chat(request)], [_parameters(request, index, sampling)], use_tqdm=False
        )
        number = name.partition("-")[0]  # vLLM adds a random part, which its outputs leave out
        self._running[number] = (request, index)
        return number

    def _step(self) -> list[tuple[str, Completion]]:
        """One step of the engine: (number, completion) of what it finished."""
        outputs = [output for output in self._engine.llm_engine.step() if output.finished]
        return [(o.request_id, _completion(*self._running.pop(o.request_id), o)) for o in outputs]

    def choice_logprobs(
        self, requests: Sequence[Request], choices: Sequence[str], progress: str | None = None
    ) -> list[list[float] | None]:
        """Not for this backend: captioning asks for none."""
        raise UserError(f"{self.name}: letters are read through a server (`make serve MODEL=...`)")


def engine_arguments(model: ModelConfig, max_model_len: int | None = None) -> list[str]:
    """The server's arguments without those of its own: what the engine gets."""
    copied = Path(gettempdir()) / f"caprl-tokenizer-{os.getpid()}"
    tokenizer = server.tokenizer_folder(Path(paths.resolve_model(model.path)), copied)
    arguments = server.command(model, 0, max_model_len, tokenizer)
    arguments = arguments[arguments.index("--model") :]
    for name in _SERVER_ONLY:
        place = arguments.index(name)
        del arguments[place : place + 2]
    return arguments


def engine_options(model: ModelConfig, max_model_len: int | None = None) -> Any:
    """`engine_arguments` as vLLM's own parser reads them. Raises UserError for one that it refuses."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = engine_arguments(model, max_model_len)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    try:
        known, unknown = parser.parse_known_args(arguments)
    except Exception as error:  # argparse's and vLLM's own
        raise UserError(f"vLLM refuses {' '.join(arguments)}: {error}") from None
    if unknown:
        raise UserError(f"vLLM knows no {' '.join(unknown)}")
    options = EngineArgs.from_cli_args(known)
    options.limit_mm_per_prompt = {"image": 1}
    return options


def _each(requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[Request, int]]:
    """Each caption to be made, requests one by one."""
    return ((request, index) for request in requests for index in range(sampling.n))


def _parameters(request: Request, index: int, sampling: Sampling) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty, seed=request_seed(sampling.seed, request.id, index),
    )  # fmt: skip


def _chat(request: Request) -> list[dict[str, Any]]:
    image = {"type": "image_pil", "image_pil": request.image.convert("RGB")}
    return [{"role": "user", "content": [image, {"type": "text", "text": request.prompt}]}]


def _completion(request: Request, index: int, output: Any) -> Completion:
    made = output.outputs[0]
    if made.finish_reason not in ("stop", "length"):
        return Completion(request.id, index, None, 0, "error", f"vLLM ended: {made.finish_reason}")
    return Completion(request.id, index, made.text, len(made.token_ids), made.finish_reason)
