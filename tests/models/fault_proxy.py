"""A proxy between client and server that spoils a share of the answers, each in the next way of FAULTS."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter

import aiohttp
from aiohttp import web

FAULTS = ("500", "429", "refused", "cut", "truncated", "hang")
"""HTTP 500; 429 with Retry-After; connection closed before the answer, and in its middle; half of the JSON as if
it were all; no answer for longer than the client waits. The server has done its work in the last three."""


class FaultProxy:
    """Runs in a thread; passes everything on to the server at `upstream` (".../v1").

    share: how many of the POSTs are spoiled, drawn by hash from the body and how often it came, so that a test
    repeats itself.
    """

    def __init__(self, upstream: str, share: float, hang_sec: float = 30.0) -> None:
        self.upstream, self.share, self.hang_sec = upstream.removesuffix("/v1"), share, hang_sec
        self.faults: Counter[str] = Counter()
        self.posts = 0
        self._seen: Counter[bytes] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _end(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    def _fault(self, body: bytes) -> str | None:
        self.posts += 1
        self._seen[body] += 1
        draw = hashlib.sha256(body + str(self._seen[body]).encode()).digest()
        if draw[0] >= 256 * self.share:
            return None
        fault = FAULTS[draw[1] % len(FAULTS)]
        self.faults[fault] += 1
        return fault

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = self._fault(body) if request.method == "POST" else None
        if fault == "500":
            return web.Response(status=500, text="something broke")
        if fault == "429":
            return web.Response(status=429, headers={"Retry-After": "0.02"})
        if fault == "refused":
            request.transport.abort()
            return web.Response()
        url, headers = f"{self.upstream}/{request.match_info['path']}", {"Content-Type": "application/json"}
        async with self._session.request(request.method, url, data=body, headers=headers) as answer:
            data, status = await answer.read(), answer.status
        if fault == "hang":
            await asyncio.sleep(self.hang_sec)
        if fault == "cut":
            return await self._cut(request, data)
        if fault == "truncated":
            data = data[: len(data) // 2]
        return web.Response(body=data, status=status, content_type="application/json")

    async def _cut(self, request: web.Request, data: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        request.transport.abort()
        return response
