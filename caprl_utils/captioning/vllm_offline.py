"""vLLM in this process, without a server: one process per GPU, each on the shards it claims.

The engine gets the arguments that our server gets (`backends.server`), read by vLLM's own parser, so a misspelt
or refused one stops the work before any weights are loaded. Each caption is a request with a seed of its own,
as behind a server.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from caprl_utils import paths
from caprl_utils.backends import server
from caprl_utils.backends.base import Completion, Request, Sampling
from caprl_utils.backends.endpoint import request_seed
from caprl_utils.captioning.engines import model_hash
from caprl_utils.errors import UserError
from caprl_utils.schema import ModelConfig

GATHERED_BATCHES = 8  # ours: the engine drains once per so many batches; more hold more images in memory
_SERVER_ONLY = ("--served-model-name", "--host", "--port")


class VllmBackend:
    """A model of vLLM's engine; it is loaded at the first request. See `Backend`; letters are left to servers."""

    def __init__(self, config: ModelConfig, max_model_len: int | None = None) -> None:
        self.name, self.config, self.max_model_len = config.path, config, max_model_len
        self.model_hash = model_hash(config)

    @cached_property
    def _engine(self) -> Any:
        options = engine_options(self.config, self.max_model_len)
        os.environ.update(server.environment(self.config))
        from vllm import LLM

        return LLM.from_engine_args(options)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: str | None = None
    ) -> list[Completion]:
        """See `Backend.generate`."""
        from vllm import SamplingParams

        jobs = [(request, index) for request in requests for index in range(sampling.n)]
        parameters = [
            SamplingParams(
                max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                repetition_penalty=sampling.repetition_penalty,
                seed=request_seed(sampling.seed, request.id, index),
            )
            for request, index in jobs
        ]  # fmt: skip
        chats = [_chat(request) for request, _ in jobs]
        outputs = self._engine.chat(chats, parameters, use_tqdm=False) if jobs else []
        return [_completion(*job, output) for job, output in zip(jobs, outputs, strict=True)]

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Backend.stream`."""
        waiting = iter(requests)
        while some := list(islice(waiting, GATHERED_BATCHES * self.config.batch_size)):
            yield from self.generate(some, sampling)

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


def _chat(request: Request) -> list[dict[str, Any]]:
    image = {"type": "image_pil", "image_pil": request.image.convert("RGB")}
    return [{"role": "user", "content": [image, {"type": "text", "text": request.prompt}]}]


def _completion(request: Request, index: int, output: Any) -> Completion:
    made = output.outputs[0]
    if made.finish_reason not in ("stop", "length"):
        return Completion(request.id, index, None, 0, "error", f"vLLM ended: {made.finish_reason}")
    return Completion(request.id, index, made.text, len(made.token_ids), made.finish_reason)
