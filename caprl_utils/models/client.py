"""An HTTP client that keeps servers full and loses nothing.

Requests run on an event loop in a thread of its own, so it works inside Jupyter, whose own loop is running.
As soon as one request ends, the next one starts; nothing waits for a batch. What can be retried is retried
with back-off.

aiohttp carries the requests: httpx's pool looks through all its connections for each idle one, which at 100 in
flight took 8 to 14 ms of CPU a request, more than a small model's server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import random
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.request import getproxies

from caprl_utils.errors import UserError

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """How patient the client is. The values are ours."""

    in_flight: int = 64  # requests a server works on at once
    attempts: int = 8  # of a request that a server answered badly or too late
    silent_sec: float = (
        300.0  # how long servers that take no connection are waited for; vLLM starts in minutes
    )
    request_sec: float = 300.0  # one attempt, from sending to the last byte
    total_sec: float = 1800.0  # all attempts of one request
    first_wait_sec: float = 0.5  # doubles with each attempt, with jitter
    longest_wait_sec: float = 30.0
    give_up_after: int = 100  # requests that failed in a row: the servers are gone


class RequestError(Exception):
    """A request that has no answer: refused by the server, or failed in every attempt."""


class _RetryableError(Exception):
    """This attempt failed in a way that another may not.

    wait_sec: what the server asked for. silent: there was no server to take the request.
    """

    def __init__(self, reason: str, wait_sec: float | None = None, silent: bool = False) -> None:
        super().__init__(reason)
        self.wait_sec, self.silent = wait_sec, silent


@dataclass
class _Server:
    url: str
    slots: asyncio.Semaphore
    busy: int = 0
    failures: int = 0  # in a row


@dataclass
class _State:
    http: aiohttp.ClientSession
    servers: list[_Server]
    retries: int = 0
    told: bool = False  # that servers are silent


@dataclass
class Client:
    """POSTs JSON to the OpenAI-compatible servers at `base_urls`; the least busy one comes next."""

    base_urls: Sequence[str]
    headers: dict[str, str]
    limits: Limits = field(default_factory=Limits)
    retries: int = 0  # over all calls, for reports

    def run(
        self,
        items: Iterable[Item],
        work: Callable[[Post, Item], Coroutine[Any, Any, Result]],
    ) -> Iterator[Result]:
        """Yield `work(post, item)` of every item as it ends, in any order; items are taken as there is room.

        `work` must not raise: it turns a RequestError into a result.
        """
        results: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
        room = 2 * self.limits.in_flight * len(self.base_urls)  # as many again wait to start at once
        with self._loop() as (loop, state):
            waiting, pending, more = iter(items), 0, True
            while more or pending:
                while more and pending < room:
                    try:
                        item = next(waiting)
                    except StopIteration:
                        more = False
                        break
                    task = asyncio.run_coroutine_threadsafe(work(self._poster(state), item), loop)
                    task.add_done_callback(results.put)
                    pending += 1
                    if not results.empty():
                        break
                if pending:
                    yield results.get().result()
                    pending -= 1

    @contextmanager
    def _loop(self) -> Iterator[tuple[asyncio.AbstractEventLoop, _State]]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="caprl-client", daemon=True)
        thread.start()
        state = asyncio.run_coroutine_threadsafe(self._open(), loop).result()
        try:
            yield loop, state
        finally:
            self.retries += state.retries
            asyncio.run_coroutine_threadsafe(self._close(state), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _open(self) -> _State:
        import aiohttp
        import httpx

        urls = [url.rstrip("/") for url in self.base_urls]
        secure = any(url.startswith("https") for url in urls)  # with the certificates that `get` trusts
        http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=httpx.create_ssl_context() if secure else True),
            headers=self.headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self.limits.request_sec),
            trust_env=bool(getproxies()),  # asked for each request in a thread, so only where there is one
        )
        return _State(http, [_Server(url, asyncio.Semaphore(self.limits.in_flight)) for url in urls])

    async def _close(self, state: _State) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await state.http.close()

    def _poster(self, state: _State) -> Post:
        async def post(path: str, body: dict[str, Any], read: Callable[[Any], Result]) -> Result:
            return await self._post(state, path, body, read)

        return post

    async def _post(
        self, state: _State, path: str, body: dict[str, Any], read: Callable[[Any], Result]
    ) -> Result:
        """One request with all its attempts. `read` takes the parsed JSON; its KeyError means broken."""
        import tenacity

        limits = self.limits
        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(_RetryableError),
                stop=lambda retry: (
                    self._given_up(retry) or tenacity.stop_before_delay(limits.total_sec)(retry)
                ),
                wait=self._wait,
                before_sleep=lambda retry: self._tell(state, retry),
                reraise=True,
            ):
                with attempt:
                    state.retries += attempt.retry_state.attempt_number > 1
                    return await self._attempt(state, path, body, read)
        except _RetryableError as error:
            raise RequestError(f"{error} (after {attempt.retry_state.attempt_number} attempts)") from None
        raise AssertionError("unreachable")

    def _given_up(self, retry_state: Any) -> bool:
        if retry_state.outcome.exception().silent:
            return retry_state.seconds_since_start >= self.limits.silent_sec
        return retry_state.attempt_number >= self.limits.attempts

    def _tell(self, state: _State, retry_state: Any) -> None:
        """Say once that servers are waited for: a training or a notebook would seem to hang."""
        error = retry_state.outcome.exception()
        if error.silent and not state.told and all(server.failures for server in state.servers):
            state.told = True
            log.warning(
                "no server: %s; waiting up to %g s for it to come back", error, self.limits.silent_sec
            )

    def _wait(self, retry_state: Any) -> float:
        """What the server asked for, or a wait that doubles each time; always a little random."""
        error = retry_state.outcome.exception()
        if error.wait_sec is not None:
            return min(error.wait_sec, self.limits.longest_wait_sec) * (1 + 0.1 * random.random())
        longest = self.limits.first_wait_sec * 2 ** (retry_state.attempt_number - 1)
        return min(longest, self.limits.longest_wait_sec) * (0.5 + 0.5 * random.random())

    async def _attempt(
        self, state: _State, path: str, body: dict[str, Any], read: Callable[[Any], Result]
    ) -> Result:
        import aiohttp

        # a server that failed last time counts as full, so it is tried again only when the others are
        server = min(state.servers, key=lambda s: s.busy + self.limits.in_flight * (s.failures > 0))
        server.busy += 1
        try:
            # a redirect would turn the POST into a GET without its body
            post = state.http.post(_address(server.url, path), json=body, allow_redirects=False)
            async with server.slots, post as response:
                data = await response.read()
            result = _result_of(response.status, response.headers, data, read)
        except TimeoutError:
            server.failures += 1
            raise _RetryableError(f"no answer within {self.limits.request_sec:g} s") from None
        except aiohttp.ClientError as error:
            server.failures += 1
            silent = isinstance(error, aiohttp.ClientConnectorError)
            raise _RetryableError(f"{type(error).__name__}: {error} ({server.url})", silent=silent) from None
        except ValueError as error:  # a password in ~/.netrc beside the API key: no retry mends it
            raise RequestError(f"{error} ({server.url})") from None
        except _RetryableError:
            server.failures += 1
            raise
        finally:
            server.busy -= 1
        server.failures = 0
        return result

    def get(self, path: str) -> list[tuple[str, Any]]:
        """(server, parsed JSON) of GET `path` from every server. Raises UserError when one is silent."""
        import httpx

        found = []
        for url in self.base_urls:
            try:
                response = httpx.get(f"{url.rstrip('/')}/{path}", headers=self.headers, timeout=10.0)
                response.raise_for_status()
                found.append((url, response.json()))
            except (httpx.HTTPError, ValueError) as error:
                raise UserError(
                    f"no model server answers at {url} ({error}). Start one (`make serve MODEL=...`), or set "
                    "base_urls of this model in the profile."
                ) from None
        return found


class Post(Protocol):
    """What `work` gets."""

    async def __call__(self, path: str, body: dict[str, Any], read: Callable[[Any], Result]) -> Result:
        """POST `body` to one of the servers; `read` of the parsed answer. Raises RequestError.

        path: below the server's /v1, or beside it when it starts with "/".
        """


def _address(url: str, path: str) -> str:
    return url.removesuffix("/v1") + path if path.startswith("/") else f"{url}/{path}"


def _result_of(status: int, headers: Mapping[str, str], data: bytes, read: Callable[[Any], Result]) -> Result:
    if status == 429 or status >= 500:
        raise _RetryableError(f"HTTP {status}: {_start(data)}", _retry_after(headers))
    if status >= 300:
        raise RequestError(f"HTTP {status}: {_start(data)}")
    try:
        return read(json.loads(data))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _RetryableError(f"broken answer ({type(error).__name__}: {error})") from None


def _start(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")[:300]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header; dates are left to the back-off."""
    try:
        return max(0.0, float(headers["Retry-After"]))
    except (KeyError, ValueError):
        return None
