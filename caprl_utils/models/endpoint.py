"""A model behind OpenAI-compatible servers (vLLM here or elsewhere; several at once).

1. One request per completion, each with a seed derived from (seed, id, index): a retry, a restart or another
   server changes nothing but the last bits.
2. As soon as one request ends, the next one starts; nothing waits for a batch. The openai library sends them, over
   aiohttp, and repeats what a server answered badly or too late.
3. Letters are read with `logprob_token_ids`, a vLLM extension, from one new token.
4. The server must run with `--generation-config vllm`, or the model's own sampling defaults leak in; `server`
   starts it so.
5. A server on this machine is asked directly, whatever proxy the environment names.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from PIL.Image import Image

from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed
from caprl_utils.images import encode, fit
from caprl_utils.models.base import Completion, Request, Sampling
from caprl_utils.models.weights import model_hash
from caprl_utils.schema import ModelConfig

if TYPE_CHECKING:
    import openai

log = logging.getLogger(__name__)

# How patient the client is; the values are ours.
REQUEST_SEC = 900.0  # one attempt; one that is late so often as the library tries is not tried again
CONNECT_SEC = 30.0
RETRIES = 5  # the library's own, after 0.5 s, 1 s, 2 s, ... or when the server says
ROUNDS = 4  # all of that again, with another server where there is one: about a minute in all
SILENT_SEC = 300.0  # how long servers that take no connection are waited for; vLLM starts in minutes
GIVE_UP_AFTER = 100  # requests that failed in a row: the servers are gone
IN_FLIGHT = 256  # requests at a server at once; vLLM queues what it has no room for
_WAITING = 16  # more that are made ready for it
_AWAY = (502, 503, 504)  # what a gateway answers when the server behind it takes no connection
_IMAGES_KEPT = 16  # encoded images at hand: requests about one image come close together


class RequestError(Exception):
    """A request that has no answer. kind: "refused" (the request is at fault), "silent" (no server took it for
    SILENT_SEC), "late" or "failed" in every attempt.
    """

    def __init__(self, reason: str, kind: str = "failed") -> None:
        super().__init__(reason)
        self.kind = kind


class Post(NamedTuple):
    """A JSON body to be posted (a RequestError where there is none), and how its answer is read.

    key: comes back with the result. read: takes the parsed JSON; its KeyError, IndexError, TypeError or ValueError
    means that the answer is broken. path: below the server's /v1, or beside it when it starts with "/".
    """

    key: Any
    body: dict[str, Any] | RequestError
    read: Callable[[Any], Any]
    path: str = "chat/completions"


@dataclass
class _Server:
    url: str
    api: openai.AsyncOpenAI
    slots: asyncio.Semaphore
    waiting: int = 0  # requests, those under way included
    failing: bool = False  # its last answer was none


class Client:
    """Keeps the servers at `base_urls` full, the least busy one first, and loses nothing.

    Requests run on an event loop in a thread of its own, so it works inside Jupyter, whose own loop is running.
    """

    def __init__(self, base_urls: Sequence[str], in_flight: int, api_key: str | None = None) -> None:
        """in_flight: requests that a server works on at once. Raises UserError for a proxy that cannot be used."""
        self.base_urls, self.in_flight, self.api_key = [*base_urls], in_flight, api_key or "none"
        for url in base_urls:
            _check_proxy(url)
        self._told = False  # that servers are silent

    def run(self, posts: Iterable[Post]) -> Iterator[tuple[Any, Any]]:
        """(key, what was read or a RequestError) of each post as it ends, in any order.

        Posts are taken as there is room.
        """
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._told, pending = False, 0
        with self._loop() as (loop, servers):
            for post in posts:
                future = asyncio.run_coroutine_threadsafe(self._result(servers, post), loop)
                future.add_done_callback(done.put)
                pending += 1
                while pending == (self.in_flight + _WAITING) * len(servers) or not done.empty():
                    yield done.get().result()
                    pending -= 1
            for _ in range(pending):
                yield done.get().result()

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """The parsed answer to one post. Raises RequestError."""
        ((_, found),) = self.run([Post(None, body, lambda answer: answer, path)])
        if isinstance(found, RequestError):
            raise found
        return found

    @contextmanager
    def _loop(self) -> Iterator[tuple[asyncio.AbstractEventLoop, list[_Server]]]:
        servers = [_Server(url, self._api(url), asyncio.Semaphore(self.in_flight)) for url in self.base_urls]
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="caprl-client", daemon=True)
        thread.start()
        try:
            yield loop, servers
        finally:
            asyncio.run_coroutine_threadsafe(_close(servers), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def _api(self, url: str) -> openai.AsyncOpenAI:
        import openai

        # a redirect would send a GET without body
        http = openai.DefaultAioHttpClient(follow_redirects=False, trust_env=not is_here(url))
        timeout = openai.Timeout(REQUEST_SEC, connect=CONNECT_SEC)
        options = {"api_key": self.api_key, "max_retries": RETRIES, "timeout": timeout, "http_client": http}
        return openai.AsyncOpenAI(base_url=url, **options)

    async def _result(self, servers: list[_Server], post: Post) -> tuple[Any, Any]:
        """One post with all its attempts."""
        if isinstance(post.body, RequestError):
            return post.key, post.body
        rounds, silent_since = 0, None
        while True:
            # a server that failed last time counts as full, so it is tried again only when the others are
            server = min(servers, key=lambda s: s.waiting + self.in_flight * s.failing)
            server.waiting += 1
            try:
                async with server.slots:
                    found = await _attempt(server, post)
                server.failing = False
                return post.key, found
            except RequestError as error:
                failure = error
            finally:
                server.waiting -= 1
            if failure.kind == "refused":
                return post.key, failure
            server.failing = True
            if failure.kind == "silent":
                silent_since = silent_since or time.monotonic()
                self._tell(failure, servers)
            else:
                rounds += 1
            late = silent_since is not None and time.monotonic() - silent_since >= SILENT_SEC
            if failure.kind == "late" or rounds == ROUNDS or (failure.kind == "silent" and late):
                return post.key, failure

    def _tell(self, failure: RequestError, servers: Sequence[_Server]) -> None:
        """Say once that servers are waited for: a training or a notebook would seem to hang."""
        if not self._told and all(server.failing for server in servers):
            self._told = True
            log.warning("no server: %s; waiting up to %g s for it to come back", failure, SILENT_SEC)


async def _attempt(server: _Server, post: Post) -> Any:
    """One post with the library's retries. Raises RequestError."""
    import aiohttp
    import openai

    beside = server.url.rstrip("/").removesuffix("/v1") if post.path.startswith("/") else ""
    try:
        return post.read(await server.api.post(beside + post.path, body=post.body, cast_to=object))
    except openai.APIStatusError as error:
        status = error.status_code
        refused = status < 500 and status not in (408, 409, 429)  # these the library repeats
        kind = "refused" if refused else "silent" if status in _AWAY else "failed"
        raise RequestError(f"HTTP {status}: {error.response.text[:300]} ({server.url})", kind) from None
    except openai.APIConnectionError as error:
        cause = error.__cause__ and (error.__cause__.__cause__ or error.__cause__)
        silent = isinstance(cause, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError))
        kind = "silent" if silent else "late" if isinstance(cause, TimeoutError) else "failed"
        raise RequestError(f"{type(cause).__name__}: {cause} ({server.url})", kind) from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RequestError(f"broken answer ({type(error).__name__}: {error})") from None


def is_here(url: str) -> bool:
    """Whether a URL names this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _check_proxy(url: str) -> None:
    host, proxies = urlsplit(url).hostname or "", getproxies()
    proxy = proxies.get(urlsplit(url).scheme) or proxies.get("all") or ""
    if proxy.startswith("socks") and not is_here(url) and not proxy_bypass(host):
        raise UserError(
            f"the environment names the SOCKS proxy {proxy}, through which model servers cannot be asked: set an "
            f"http:// proxy (HTTPS_PROXY), or put {host} into NO_PROXY"
        )


async def _close(servers: Sequence[_Server]) -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for server in servers:
        await server.api.close()


class EndpointBackend:
    """The model that `config.path` names, served at `config.base_urls`."""

    def __init__(self, config: ModelConfig) -> None:
        """Raises UserError when the API key's variable is not set. Servers are asked at the first request."""
        self.name = config.path
        self.config = config
        self._images: OrderedDict[int, tuple[Image, str]] = OrderedDict()
        self._choice_ids: dict[tuple[str, ...], list[int]] = {}
        self.client = Client(config.base_urls, config.batch_size or IN_FLIGHT, api_key(config))

    @cached_property
    def model_hash(self) -> str:
        """See `weights.model_hash`."""
        return model_hash(self.config)

    @cached_property
    def served(self) -> str:
        """The model's name, once every server has said that it serves it."""
        for url in self.config.base_urls:
            if self.config.path not in (names := self._models_at(url)):
                raise UserError(
                    f"the server at {url} does not serve {self.config.path!r} but {', '.join(names)}; start it with "
                    "that name (`make serve MODEL=...`) or change the model's path in the profile"
                )
        return self.config.path

    @property
    def context(self) -> int | None:
        """Tokens of prompt and completion that all servers take; None where none tells (only vLLM does)."""
        told = (self._models_at(url).get(self.served) for url in self.config.base_urls)
        return min(filter(None, told), default=None)

    def _models_at(self, url: str) -> dict[str, int | None]:
        """The models that a server has, each with its context where it tells."""
        import openai

        http = openai.DefaultHttpxClient(trust_env=not is_here(url), timeout=10)
        options = {"api_key": self.client.api_key, "max_retries": 0, "http_client": http}
        try:
            with openai.OpenAI(base_url=url, **options) as api:
                return {model.id: getattr(model, "max_model_len", None) for model in api.models.list()}
        except openai.NotFoundError:
            raise UserError(
                f"{url} is no address of a model server (HTTP 404): such an address ends in /v1, as in "
                "http://127.0.0.1:8000/v1"
            ) from None
        except openai.OpenAIError as error:
            raise UserError(
                f"no model server answers at {url} ({error}). Start one (`make serve MODEL=...`), or set "
                "base_urls of this model in the profile."
            ) from None

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Backend.generate`."""
        order = {request.id: place for place, request in enumerate(requests)}
        if len(order) < len(requests):
            raise ValueError("two requests have the same id")
        found = self.stream(requests, sampling)
        return sorted(found, key=lambda completion: (order[completion.id], completion.index))

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Backend.stream`. The servers stay full as long as there are requests.

        Raises UserError when the servers are gone.
        """
        posts = (
            Post((request.id, index), self._body(request, sampling, index), _read_completion)
            for request in requests
            for index in range(sampling.n)
        )
        failed_in_row = 0
        for (request_id, index), found in self.client.run(posts):
            if not isinstance(found, RequestError):
                failed_in_row = 0
                yield Completion(request_id, index, *found)
                continue
            failed_in_row += found.kind != "refused"
            if found.kind == "silent" or failed_in_row >= GIVE_UP_AFTER:
                raise UserError(
                    f"the last {failed_in_row} requests to {', '.join(self.config.base_urls)} all failed: {found}. "
                    "Look at the server's log, start it again; what was finished is kept, run again."
                )
            yield Completion(request_id, index, None, 0, "error", str(found))

    def choice_logprobs(
        self, requests: Sequence[Request], choices: Sequence[str]
    ) -> list[list[float] | None]:
        """See `Backend.choice_logprobs`. Raises UserError for a choice that is not one token."""
        ids = self.choice_ids(tuple(choices))
        extra = {"logprobs": True, "logprob_token_ids": ids, "return_tokens_as_token_ids": True}
        sampling = Sampling(max_tokens=1)

        def read(answer: dict[str, Any]) -> list[float]:
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found = {entry["token"]: float(entry["logprob"]) for entry in top}
            return [found[f"token_id:{token}"] for token in ids]

        posts = (Post(place, self._body(r, sampling, **extra), read) for place, r in enumerate(requests))
        found = dict(self.client.run(posts))
        rows = (found[place] for place in range(len(requests)))
        return [None if isinstance(row, RequestError) else row for row in rows]

    def choice_ids(self, choices: tuple[str, ...]) -> list[int]:
        """Token id of each choice, from the servers' own tokenizer; asked once. Raises UserError."""
        if choices not in self._choice_ids:
            bodies = [{"model": self.served, "prompt": c, "add_special_tokens": False} for c in choices]
            posts = (Post(i, body, lambda a: a["tokens"], "/tokenize") for i, body in enumerate(bodies))
            found = dict(self.client.run(posts))
            for place, choice in enumerate(choices):
                tokens = found[place]
                if isinstance(tokens, RequestError):
                    raise UserError(f"no token ids ({tokens}); letters by probability need a vLLM server")
                if len(tokens) != 1:
                    raise UserError(
                        f"{choice!r} is {len(tokens)} tokens of {self.name}; a choice must be one"
                    )
            self._choice_ids[choices] = [found[place][0] for place in range(len(choices))]
        return self._choice_ids[choices]

    def _body(self, request: Request, sampling: Sampling, index: int = 0, **more: Any) -> dict | RequestError:
        """`chat_body` with more in it, or why there is none: one bad image is one failed request."""
        try:
            return self.chat_body(request, sampling, index) | more
        except RequestError as error:
            return error

    def chat_body(self, request: Request, sampling: Sampling, index: int = 0) -> dict[str, Any]:
        """What is posted for one completion of a request. Raises RequestError for an image that cannot be read."""
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
        """The image within max_pixels as a data URL, its own file where that shows it; each object is encoded once."""
        if id(image) not in self._images:
            try:
                data, kind = encode(fit(image, self.config.max_pixels))
            except Exception as error:  # decoders raise what they like on broken files
                raise RequestError(f"the image cannot be read ({error})", "refused") from None
            url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
            self._images[id(image)] = (image, url)  # holds the image, so that its id stays its own
            if len(self._images) > _IMAGES_KEPT:
                self._images.popitem(last=False)
        return self._images[id(image)][1]


def request_seed(seed: int, request_id: str, index: int) -> int:
    """A 31-bit seed for one completion, the same on every machine."""
    return derive_seed(seed, index, request_id, bits=31)


def api_key(model: ModelConfig) -> str | None:
    """The key that `api_key_env` names; None where a model needs none. Raises UserError when it is not set."""
    if model.api_key_env is None:
        return None
    if not os.environ.get(model.api_key_env):
        raise UserError(f"{model.path}: set the environment variable {model.api_key_env} to the API key")
    return os.environ[model.api_key_env]


def _read_completion(answer: dict[str, Any]) -> tuple[str | None, int, str, str | None]:
    """A Completion's fields after its id and index."""
    (choice,) = answer["choices"]
    tokens, ended = int(answer["usage"]["completion_tokens"]), choice["finish_reason"]
    if ended not in ("stop", "length"):
        return None, tokens, "error", f"the server ended: {ended}"
    text = choice["message"]["content"]
    if text is None:  # a reasoning model that never came to its answer, or a call of a tool
        return None, tokens, "error", f"the server gave no text (finish reason {ended})"
    return text, tokens, ended, None
