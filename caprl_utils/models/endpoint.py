"""A model behind OpenAI-compatible servers (vLLM here or elsewhere; several at once).

1. One request per completion, each with a seed derived from (seed, id, index): a retry, a restart or another
   server changes nothing but the last bits.
2. Letters are read with `logprob_token_ids`, a vLLM extension, from one new token.
3. The server must run with `--generation-config vllm`, or the model's own sampling defaults leak in; `server`
   starts it so.
"""

from __future__ import annotations

import base64
import io
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from PIL.Image import Image

from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed
from caprl_utils.models.base import Completion, Request, Sampling
from caprl_utils.models.client import Client, Limits, Post, RequestError
from caprl_utils.models.weights import model_hash
from caprl_utils.progress import Progress
from caprl_utils.schema import ModelConfig

CHAT, TOKENIZE = "chat/completions", "/tokenize"  # the second stands beside /v1 in vLLM
_IMAGES_KEPT = 16  # encoded images at hand: requests about one image come close together


class EndpointBackend:
    """The model that `config.path` names, served at `config.base_urls`."""

    def __init__(self, config: ModelConfig, limits: Limits | None = None) -> None:
        """Raises UserError when the API key's variable is not set. Servers are asked at the first request."""
        self.name = config.path
        self.config = config
        self._images: OrderedDict[int, tuple[Image, str]] = OrderedDict()
        self._choice_ids: dict[tuple[str, ...], list[int]] = {}
        self.client = Client(
            config.base_urls, _headers(config), limits or Limits(in_flight=config.batch_size)
        )

    @cached_property
    def model_hash(self) -> str:
        """See `weights.model_hash`."""
        return model_hash(self.config)

    @cached_property
    def served(self) -> str:
        """The model's name, once every server has said that it serves it."""
        for url, answer in self.client.get("models"):
            names = [model.get("id") for model in answer.get("data", [])]
            if self.config.path not in names:
                raise UserError(
                    f"the server at {url} does not serve {self.config.path!r} but "
                    f"{', '.join(map(str, names))}; start it with that name (`make serve MODEL=...`) or "
                    "change the model's path in the profile"
                )
        return self.config.path

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: str | None = None
    ) -> list[Completion]:
        """See `Backend.generate`."""
        order = {request.id: place for place, request in enumerate(requests)}
        if len(order) < len(requests):
            raise ValueError("two requests have the same id")
        found = self.stream(requests, sampling)
        if progress:
            found = _counted(found, progress, len(requests) * sampling.n)
        return sorted(found, key=lambda completion: (order[completion.id], completion.index))

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Backend.stream`. The servers stay full as long as there are requests."""
        jobs = (
            (request, index, self.chat_body(request, sampling, index))
            for request in requests
            for index in range(sampling.n)
        )
        failed_in_row = 0
        for completion in self.client.run(jobs, _complete):
            failed_in_row = 0 if completion.error is None else failed_in_row + 1
            if failed_in_row >= self.client.limits.give_up_after:
                raise UserError(
                    f"the last {failed_in_row} requests to {', '.join(self.config.base_urls)} all failed: "
                    f"{completion.error}. Look at the server's log; what was finished is kept, run again."
                )
            yield completion

    def choice_logprobs(
        self, requests: Sequence[Request], choices: Sequence[str], progress: str | None = None
    ) -> list[list[float] | None]:
        """See `Backend.choice_logprobs`. Raises UserError for a choice that is not one token."""
        ids = self.choice_ids(tuple(choices))
        extra = {"logprobs": True, "logprob_token_ids": ids, "return_tokens_as_token_ids": True}
        jobs = (
            (place, self.chat_body(request, Sampling(max_tokens=1)) | extra, ids)
            for place, request in enumerate(requests)
        )
        scores: list[list[float] | None] = [None] * len(requests)
        found = self.client.run(jobs, _choose)
        for place, values in _counted(found, progress, len(requests)) if progress else found:
            scores[place] = values
        return scores

    def choice_ids(self, choices: tuple[str, ...]) -> list[int]:
        """Token id of each choice, from the servers' own tokenizer; asked once."""
        if choices not in self._choice_ids:
            bodies = [{"model": self.served, "prompt": c, "add_special_tokens": False} for c in choices]
            found = dict(self.client.run(enumerate(bodies), _tokenize))
            for place, choice in enumerate(choices):
                if isinstance(found[place], RequestError):
                    raise UserError(
                        f"{', '.join(self.config.base_urls)}: no token ids ({found[place]}); reading letters by "
                        "probability needs a vLLM server"
                    )
                if len(found[place]) != 1:
                    raise UserError(
                        f"{choice!r} is {len(found[place])} tokens of {self.name}; a choice must be one"
                    )
            self._choice_ids[choices] = [found[place][0] for place in range(len(choices))]
        return self._choice_ids[choices]

    def chat_body(self, request: Request, sampling: Sampling, index: int = 0) -> dict[str, Any]:
        """What is posted for one completion of a request."""
        content: Any = request.prompt
        if request.image is not None:
            image = {"type": "image_url", "image_url": {"url": self._data_url(request.image)}}
            content = [image, {"type": "text", "text": request.prompt}]
        messages = [{"role": "user", "content": content}]
        body = {
            "model": self.served,
            "messages": messages,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request_seed(sampling.seed if request.seed is None else request.seed, request.id, index),
        }
        if sampling.repetition_penalty != 1:  # not part of OpenAI's own interface
            body["repetition_penalty"] = sampling.repetition_penalty
        if request.prefill:
            messages.append({"role": "assistant", "content": request.prefill})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body

    def _data_url(self, image: Image) -> str:
        """The image as a lossless data URL; the same object is encoded once."""
        if id(image) not in self._images:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="PNG")
            url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            self._images[id(image)] = (image, url)  # holds the image, so that its id stays its own
            if len(self._images) > _IMAGES_KEPT:
                self._images.popitem(last=False)
        return self._images[id(image)][1]


def request_seed(seed: int, request_id: str, index: int) -> int:
    """A 31-bit seed for one completion, the same on every machine."""
    return derive_seed(seed, index, request_id, bits=31)


def _headers(config: ModelConfig) -> dict[str, str]:
    if config.api_key_env is None:
        return {}
    key = os.environ.get(config.api_key_env)
    if not key:
        raise UserError(f"{config.path}: set the environment variable {config.api_key_env} to the API key")
    return {"Authorization": f"Bearer {key}"}


async def _complete(post: Post, job: tuple[Request, int, dict[str, Any]]) -> Completion:
    request, index, body = job
    try:
        text, num_tokens, finish_reason = await post(CHAT, body, _read_completion)
    except RequestError as error:
        return Completion(request.id, index, None, 0, "error", str(error))
    if finish_reason not in ("stop", "length"):
        return Completion(request.id, index, None, num_tokens, "error", f"the server ended: {finish_reason}")
    return Completion(request.id, index, text, num_tokens, finish_reason)


def _read_completion(answer: dict[str, Any]) -> tuple[str, int, str]:
    (choice,) = answer["choices"]
    text = choice["message"]["content"] or ""
    return text, int(answer["usage"]["completion_tokens"]), choice["finish_reason"]


async def _choose(post: Post, job: tuple[int, dict[str, Any], list[int]]) -> tuple[int, list[float] | None]:
    place, body, ids = job
    try:
        return place, await post(CHAT, body, lambda answer: _read_logprobs(answer, ids))
    except RequestError:
        return place, None


async def _tokenize(post: Post, job: tuple[int, dict[str, Any]]) -> tuple[int, list[int] | RequestError]:
    place, body = job
    try:
        return place, await post(TOKENIZE, body, lambda answer: answer["tokens"])
    except RequestError as error:
        return place, error


def _read_logprobs(answer: dict[str, Any], ids: Sequence[int]) -> list[float]:
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = {entry["token"]: float(entry["logprob"]) for entry in top}
    return [found[f"token_id:{token}"] for token in ids]


def _counted(found: Iterator[Any], label: str, total: int) -> Iterator[Any]:
    with Progress(label, total) as bar:
        for item in found:
            yield item
            bar.update()
