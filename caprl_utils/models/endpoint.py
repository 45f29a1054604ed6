"""A model behind OpenAI-compatible servers (vLLM here or elsewhere; several at once), asked by the openai library.

One request per completion, with a seed of its own: a retry, a restart or another server changes only the last bits.
Servers must run with `--generation-config vllm` (`server` does), or the model's own sampling defaults leak in.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import operator
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from PIL.Image import Image

from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed
from caprl_utils.images import encode, fit
from caprl_utils.models.base import Backend, Completion, Request, Sampling, Scores
from caprl_utils.schema import ModelConfig

if TYPE_CHECKING:
    import ssl

    import openai

log = logging.getLogger(__name__)

# How patient the client is (ours).
REQUEST_SEC = 900.0  # one attempt; one that is late so often as the library tries is not tried again
CONNECT_SEC = 30.0
RETRIES = 5  # the library's own, after 0.5 s, 1 s, 2 s, ... or when the server says
ROUNDS = 4  # all of that again, with another server where there is one: about a minute in all
SILENT_SEC = 300.0  # how long servers that take no connection are waited for; vLLM starts in minutes
GIVE_UP_AFTER = 100  # requests that failed in a row: the servers are gone
IN_FLIGHT = 256  # requests at a server at once; vLLM queues what it has no room for
_WAITING = 16  # more that are made ready for it
_ADDRESS = "such an address ends in /v1, as in http://127.0.0.1:8000/v1"
_AWAY = (502, 503, 504)  # what a gateway answers when the server behind it takes no connection
_IMAGES_KEPT = 16  # encoded images at hand: requests about one image come close together


class RequestError(Exception):
    """A request without answer. kind: "refused" (it is at fault), "silent" (no server took it), "late" or "failed"."""

    def __init__(self, reason: str, kind: str = "failed") -> None:
        super().__init__(reason)
        self.kind = kind


class Post(NamedTuple):
    """A JSON body (or why there is none), and how its parsed answer is read; key: comes back with it. A KeyError,
    IndexError, TypeError or ValueError of `read` means a broken answer. path: below /v1, or beside it with a "/" first.
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
    """Keeps the servers at `base_urls` full, the least busy one first; its loop has a thread, as Jupyter needs it."""

    def __init__(self, base_urls: Sequence[str], in_flight: int, api_key: str | None = None) -> None:
        """in_flight: requests that a server works on at once. Raises UserError for a proxy that cannot be used."""
        self.base_urls, self.in_flight, self.api_key = [*base_urls], in_flight, api_key or "none"
        for url in map(urlsplit, base_urls):
            host, proxies = url.hostname or "", getproxies()
            proxy = proxies.get(url.scheme) or proxies.get("all") or ""
            if proxy.startswith("socks") and not proxy_bypass(host):  # this machine is in NO_PROXY since the import
                told = f"the environment names the SOCKS proxy {proxy}, through which model servers cannot be asked"
                raise UserError(f"{told}: set an http:// proxy (HTTPS_PROXY), or put {host} into NO_PROXY")

    def run(self, posts: Iterable[Post]) -> Iterator[tuple[Any, Any]]:
        """(key, what was read or a RequestError) of each post as it ends; posts are taken as there is room."""
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._told, pending = False, 0  # told: that servers are silent
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
        import openai

        options = {"timeout": openai.Timeout(REQUEST_SEC, connect=CONNECT_SEC), "max_retries": RETRIES}
        servers = []
        for url in self.base_urls:
            # a redirect would be followed by a GET without body
            http = openai.DefaultAioHttpClient(follow_redirects=False, verify=_certificates())
            api = openai.AsyncOpenAI(base_url=url, api_key=self.api_key, http_client=http, **options)
            servers.append(_Server(url, api, asyncio.Semaphore(self.in_flight)))
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="caprl-client", daemon=True)
        thread.start()

        async def close() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for server in servers:
                await server.api.close()

        try:
            yield loop, servers
        finally:
            asyncio.run_coroutine_threadsafe(close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

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
            except RequestError as error:
                found = error
            finally:
                server.waiting -= 1
            server.failing = isinstance(found, RequestError) and found.kind != "refused"
            if not server.failing:
                return post.key, found
            if found.kind == "silent":
                silent_since = silent_since or time.monotonic()
                over = time.monotonic() - silent_since >= SILENT_SEC
                if not self._told and all(server.failing for server in servers):  # it would seem to hang
                    self._told = True
                    log.warning("no server: %s; waiting up to %g s for it to come back", found, SILENT_SEC)
            else:
                rounds += 1
                over = found.kind == "late" or rounds == ROUNDS
            if over:
                return post.key, found


@cache
def _certificates() -> ssl.SSLContext:
    """Those that a server may show; to read them takes 50 ms, and each reward is asked for by a client of its own."""
    import httpx

    return httpx.create_ssl_context()


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
    except (AttributeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RequestError(f"broken answer ({type(error).__name__}: {error})") from None


class EndpointBackend(Backend):
    """The model that `config.path` names, served at `config.base_urls`."""

    def __init__(self, config: ModelConfig) -> None:
        """Raises UserError when the API key's variable is not set. Servers are asked at the first request."""
        self.name, self.config = config.path, config
        self._images: dict[int, tuple[Image, str]] = {}
        self._choice_ids: dict[tuple[str, ...], list[int]] = {}
        self.client = Client(config.base_urls, config.batch_size or IN_FLIGHT, api_key(config))

    @cached_property
    def served(self) -> str:
        """The model's name, once every server has said that it serves it."""
        for url in self.config.base_urls:
            if self.config.path not in (names := self.models_at(url)):
                told = f"the server at {url} does not serve {self.config.path!r} but {', '.join(names)}; start it with"
                raise UserError(f"{told} that name (`make serve MODEL=...`) or change the model's path in the profile")
        return self.config.path

    @property
    def context(self) -> int | None:
        """Tokens of prompt and completion that all servers take; None where none tells (only vLLM does)."""
        told = (self.models_at(url).get(self.served) for url in self.config.base_urls)
        return min(filter(None, told), default=None)

    def models_at(self, url: str) -> dict[str, int | None]:
        """The models that a server has, each with its context where it tells."""
        import openai

        options = {"max_retries": 0, "http_client": openai.DefaultHttpxClient(timeout=10, verify=_certificates())}
        try:
            with openai.OpenAI(base_url=url, api_key=self.client.api_key, **options) as api:
                found = {model.id: getattr(model, "max_model_len", None) for model in api.models.list()}
            if not found:
                raise ValueError("it lists no model")
            return found
        except (AttributeError, TypeError, ValueError) as error:  # a page, or JSON of another kind
            raise UserError(f"{url} answers as no model server does ({error}): {_ADDRESS}") from None
        except openai.NotFoundError:
            raise UserError(f"{url} is no address of a model server (HTTP 404): {_ADDRESS}") from None
        except openai.OpenAIError as error:
            told = f"no model server answers at {url} ({error}). Start one (`make serve MODEL=...`), or set base_urls"
            raise UserError(f"{told} of this model in the profile.") from None

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Backend.stream`. The servers stay full while there are requests. Raises UserError when they are gone."""

        def read(answer: dict[str, Any]) -> tuple[str | None, int, str, str | None]:
            (choice,) = answer["choices"]
            text, ended = choice["message"].get("content"), choice["finish_reason"]
            if not isinstance(text, str | None):
                raise TypeError(f"content is {type(text).__name__}, no text")
            (text or "").encode()  # half a character could not be written
            problem = None if ended in ("stop", "length") else f"the server ended: {ended}"
            if text is None:  # a reasoning model that never came to its answer, or a call of a tool
                problem = problem or f"the server gave no text (finish reason {ended})"
            tokens = int(answer["usage"]["completion_tokens"])
            return (None, tokens, "error", problem) if problem else (text, tokens, ended, None)

        jobs = ((request, index) for request in requests for index in range(sampling.n))
        posts = (Post((r.id, index), self.chat_body(r, sampling, index), read) for r, index in jobs)
        failed_in_row = 0
        for (request_id, index), found in self.client.run(posts):
            if not isinstance(found, RequestError):
                failed_in_row = 0
                yield Completion(request_id, index, *found)
                continue
            failed_in_row += found.kind != "refused"
            if found.kind == "silent" or failed_in_row >= GIVE_UP_AFTER:
                told = f"the last {failed_in_row} requests to {', '.join(self.config.base_urls)} all failed: {found}"
                advice = "Look at the server's log, start it again; what was finished is kept, run again."
                raise UserError(f"{told}. {advice}")
            yield Completion(request_id, index, None, 0, "error", str(found))

    def choice_logprobs(self, requests: Sequence[Request], choices: Sequence[str]) -> Scores:
        """See `Backend.choice_logprobs`. Raises UserError for a choice that is not one token."""
        ids = self.choice_ids(tuple(choices))
        extra = {"logprobs": True, "logprob_token_ids": ids, "return_tokens_as_token_ids": True}

        def read(answer: dict[str, Any]) -> list[float]:
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found = {entry["token"]: float(entry["logprob"]) for entry in top}
            return [found[f"token_id:{token}"] for token in ids]

        one = Sampling(max_tokens=1)
        found = dict(self.client.run(Post(i, self.chat_body(r, one, **extra), read) for i, r in enumerate(requests)))
        rows = (found[place] for place in range(len(requests)))
        return [None if isinstance(row, RequestError) else row for row in rows]

    def choice_ids(self, choices: tuple[str, ...]) -> list[int]:
        """Token id of each choice, from the servers' own tokenizer; asked once. Raises UserError."""
        if choices not in self._choice_ids:
            body = {"model": self.served, "add_special_tokens": False}
            read = operator.itemgetter("tokens")
            found = dict(self.client.run(Post(c, body | {"prompt": c}, read, "/tokenize") for c in choices))
            for choice, tokens in found.items():
                if isinstance(tokens, RequestError):
                    raise UserError(f"no token ids ({tokens}); letters by probability need a vLLM server")
                if len(tokens) != 1:
                    raise UserError(f"{choice!r} is {len(tokens)} tokens of {self.name}; a choice must be one")
            self._choice_ids[choices] = [found[choice][0] for choice in choices]
        return self._choice_ids[choices]

    def chat_body(
        self, request: Request, sampling: Sampling, index: int = 0, **more: Any
    ) -> dict[str, Any] | RequestError:
        """What is posted for one completion, with `more` in it; a RequestError for an image that cannot be read."""
        content: Any = request.prompt
        if request.image is not None:
            try:
                image = {"type": "image_url", "image_url": {"url": self._data_url(request.image)}}
            except Exception as error:  # decoders raise what they like on broken files
                return RequestError(f"the image cannot be read ({error})", "refused")
            content = [image, {"type": "text", "text": request.prompt}]
        messages = [{"role": "user", "content": content}]
        seed = sampling.seed if request.seed is None else request.seed
        body = {
            "model": self.served, "messages": messages, "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p,
            "seed": derive_seed(seed, index, request.id, bits=31),
        }  # fmt: skip
        if sampling.repetition_penalty != 1:  # not part of OpenAI's own interface
            body["repetition_penalty"] = sampling.repetition_penalty
        if request.prefill:
            messages.append({"role": "assistant", "content": request.prefill})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body | more

    def _data_url(self, image: Image) -> str:
        """The image within max_pixels as a data URL, its own file where that shows it; each object is encoded once."""
        if id(image) not in self._images:
            data, kind = encode(fit(image, self.config.max_pixels))
            url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
            self._images[id(image)] = (image, url)  # holds the image, so that its id stays its own
            if len(self._images) > _IMAGES_KEPT:
                del self._images[next(iter(self._images))]
        return self._images[id(image)][1]


def api_key(model: ModelConfig) -> str | None:
    """The key that `api_key_env` names; None where a model needs none. Raises UserError when it is not set."""
    key = os.environ.get(model.api_key_env or "")
    if model.api_key_env and not key:
        raise UserError(f"{model.path}: set the environment variable {model.api_key_env} to the API key")
    return key
