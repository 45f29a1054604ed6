"""A small OpenAI-compatible server for a model of this process, for machines on which vLLM does not run.

    with serve_here(profile.models.policy, profile) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")

It answers chat completions of one user turn, with or without image, on 127.0.0.1. Requests that wait together are
answered in one batch; each has its own seed, so company changes no answer. Letters by probability need vLLM.
"""

from __future__ import annotations

import base64
import json
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from caprl_utils.images import open_image
from caprl_utils.models import open_backend
from caprl_utils.models.base import Backend, Completion, Request, Sampling
from caprl_utils.models.server import HOST, check_port, free_port
from caprl_utils.schema import ModelConfig, Profile

_GATHER_SEC = 0.02  # how long a batch waits for company
_DEFAULT_TOKENS = 512  # ours: of a request that gives no max_tokens


@dataclass(frozen=True)
class HereServer:
    """A running server: where it is, and the model's config that reaches it."""

    url: str
    config: ModelConfig


@contextmanager
def serve_here(model: ModelConfig, profile: Profile, port: int | None = None) -> Iterator[HereServer]:
    """Serve `model` from this process as long as the block lasts; the weights are loaded before it begins.

    Raises UserError for a missing or broken model and for a port in use.
    """
    port = port or free_port()
    check_port(port)
    backend = open_backend(model.model_copy(update={"backend": "local"}), profile)
    backend.generate([Request("first", "hello")], Sampling(max_tokens=1))  # loads it, or says why not
    batches = _Batches(backend)
    http = ThreadingHTTPServer((HOST, port), _handler(model.path, batches))
    threads = [threading.Thread(target=work, daemon=True) for work in (http.serve_forever, batches.work)]
    for thread in threads:
        thread.start()
    url = f"http://{HOST}:{port}/v1"
    try:
        yield HereServer(url, ModelConfig(**model.model_dump() | {"backend": "endpoint", "base_urls": [url]}))
    finally:
        http.shutdown()
        http.server_close()
        batches.waiting.put(None)
        for thread in threads:
            thread.join()


@dataclass
class _Batches:
    """Requests of all connections, answered by one thread."""

    backend: Backend
    waiting: queue.SimpleQueue[tuple[Request, Sampling, Future[Completion]] | None] = field(
        default_factory=queue.SimpleQueue
    )

    def ask(self, request: Request, sampling: Sampling) -> Completion:
        answer: Future[Completion] = Future()
        self.waiting.put((request, sampling, answer))
        return answer.result()

    def work(self) -> None:
        while (job := self.waiting.get()) is not None:
            time.sleep(_GATHER_SEC)
            jobs = [job]
            while not self.waiting.empty():
                jobs.append(self.waiting.get())
            if None in jobs:
                jobs.remove(None)
                self.waiting.put(None)
            for sampling in {sampling for _, sampling, _ in jobs}:
                self._answer([job for job in jobs if job[1] == sampling], sampling)

    def _answer(self, jobs: list[tuple[Request, Sampling, Future[Completion]]], sampling: Sampling) -> None:
        try:
            found = self.backend.generate([request for request, _, _ in jobs], sampling)
            for (_, _, answer), completion in zip(jobs, found, strict=True):
                answer.set_result(completion)
        except Exception as error:  # goes to the clients; the server lives on
            for _, _, answer in jobs:
                if not answer.done():
                    answer.set_exception(error)


def read_request(body: dict[str, Any]) -> tuple[Request, Sampling]:
    """A chat request's body as ours. Its seed becomes the row's id, so that one batch holds many seeds.

    Raises ValueError, KeyError or TypeError for what this server does not do.
    """
    user, *rest = body["messages"]
    if user["role"] != "user" or len(rest) > 1 or any(turn["role"] != "assistant" for turn in rest):
        raise ValueError("this server takes one user turn, and at most the start of the assistant's")
    if body.get("n", 1) != 1 or body.get("stream") or body.get("logprobs"):
        raise ValueError("this server gives one whole completion without log-probabilities; vLLM does more")
    parts = (
        [{"type": "text", "text": user["content"]}] if isinstance(user["content"], str) else user["content"]
    )
    texts = [part["text"] for part in parts if part["type"] == "text"]
    images = [_image(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
    if len(texts) != 1 or len(images) > 1:
        raise ValueError("one text and at most one image, please")
    seed, prefill = str(body.get("seed", 0)), rest[0]["content"] if rest else ""
    sampling = Sampling(
        max_tokens=int(body.get("max_tokens") or body.get("max_completion_tokens") or _DEFAULT_TOKENS),
        temperature=float(body.get("temperature", 1.0)),
        top_p=float(body.get("top_p", 1.0)),
        repetition_penalty=float(body.get("repetition_penalty", 1.0)),
    )
    return Request(seed, texts[0], images[0] if images else None, prefill), sampling


def _image(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    if not head.startswith("data:image") or not head.endswith(";base64"):
        raise ValueError("images come as data URLs (data:image/png;base64,...); nothing is fetched")
    return open_image(base64.b64decode(data, validate=True))


def _handler(name: str, batches: _Batches) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Requests are not logged."""

        def do_GET(self) -> None:
            known = {
                "/health": {},
                "/v1/models": {"object": "list", "data": [{"id": name, "object": "model"}]},
            }
            self._send(200 if self.path in known else 404, known.get(self.path, _error("no such path")))

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path != "/v1/chat/completions":
                self._send(404, _error("this server knows /v1/chat/completions only"))
                return
            self._send(*_chat(raw, name, batches))

        def _send(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def _chat(raw: bytes, name: str, batches: _Batches) -> tuple[int, dict[str, Any]]:
    """Status and answer of one chat request."""
    try:
        body = json.loads(raw)
        if body["model"] != name:
            return 404, _error(f"this server has {name!r}, not {body['model']!r}")
        request, sampling = read_request(body)
    except (ValueError, KeyError, TypeError, OSError) as error:  # OSError: an image that cannot be decoded
        return 400, _error(f"{type(error).__name__}: {error}")
    try:
        completion = batches.ask(request, sampling)
    except Exception as error:
        return 500, _error(f"{type(error).__name__}: {error}")
    if completion.error is not None:
        return 400, _error(completion.error)
    message = {"role": "assistant", "content": completion.text}
    choice = {"index": 0, "message": message, "finish_reason": completion.finish_reason}
    return 200, {
        "id": "chat", "object": "chat.completion", "created": int(time.time()), "model": name,
        "choices": [choice], "usage": {"completion_tokens": completion.num_tokens},
    }  # fmt: skip


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError"}}
