"""An OpenAI-compatible server that answers from the request alone, and spoils a share of its answers when told to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import Counter

from aiohttp import web

FAULTS = ("500", "429", "refused", "cut", "truncated", "hang")
"""HTTP 500; 429 with Retry-After; connection closed before the answer, and in its middle; half of the JSON as if
it were all; no answer for longer than the client waits. The server has done its work in the last three."""


def answer_of(body: dict) -> str:
    """What the server says: a function of prompt and seed, so that a retry says the same."""
    content = body["messages"][0]["content"]
    prompt = content if isinstance(content, str) else content[-1]["text"]
    return hashlib.sha256(f"{prompt}/{body['seed']}".encode()).hexdigest()[:12]


class FakeServer:
    """Runs in a thread. ``down``: answers every request with HTTP 500. ``hold_until``: the first answers wait (30 s at
    most) until so many requests are there. ``share``: how many answers are spoiled, each in the next way of FAULTS,
    drawn by hash from the request and how often it came, so that a test repeats itself.
    """

    def __init__(self, delay_sec: float = 0.0, models=("fake",), key=None, share: float = 0.0) -> None:
        self.delay_sec, self.models, self.key, self.share = delay_sec, models, key, share
        self.attempts, self.faults = Counter(), Counter()  # the first by prompt and seed
        self.busy = self.most_busy = self.hold_until = 0
        self.down, self._port = False, 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def _do(self, work) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

        async def cancel() -> None:  # answers that hang would outlive the loop
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._do(cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def close(self) -> None:
        """Take no connection until `open`."""
        self._do(self._runner.cleanup())

    def open(self) -> None:
        """Listen, after `close` again at the same address."""

        async def start() -> None:
            app = web.Application(client_max_size=2**26)
            app.add_routes(self._routes())
            self._runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
            self._port = self._runner.addresses[0][1]
            self.url = f"http://127.0.0.1:{self._port}/v1"

        self._do(start())

    def _routes(self) -> list[web.RouteDef]:
        posts = {"/v1/chat/completions": self._chat, "/tokenize": self._tokenize}
        return [web.get("/v1/models", self._list), *(web.post(*pair) for pair in posts.items())]

    async def _list(self, request: web.Request) -> web.Response:
        if self.models == "page":
            return web.Response(text="<html>hello</html>", content_type="text/html")
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": [ord(c) for c in (await request.json())["prompt"].strip()]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "wrong key"}, status=401)
        body = await request.json()
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            self.attempts[answer_of(body)] += 1
            if self.down:
                return web.Response(status=500, text="something broke")
            await asyncio.sleep(self.delay_sec)
            for _ in range(3000):
                if self.most_busy >= self.hold_until:
                    break
                await asyncio.sleep(0.01)
            if "refuse" in str(body["messages"]):
                return web.json_response({"error": {"message": "prompt too long"}}, status=400)
            return await self._spoiled(request, body)
        finally:
            self.busy -= 1

    async def _spoiled(self, request: web.Request, body: dict) -> web.StreamResponse:
        text = answer_of(body)
        draw = hashlib.sha256(f"{text}{self.attempts[text]}".encode()).digest()
        fault = FAULTS[draw[1] % len(FAULTS)] if draw[0] < 256 * self.share else None
        self.faults[fault] += 1
        if fault == "500":
            return web.Response(status=500, text="something broke")
        if fault == "429":
            return web.Response(status=429, headers={"Retry-After": "0.02"})
        if fault == "refused":
            request.transport.abort()
        if fault == "hang":
            await asyncio.sleep(30)
        odd = {"say nothing": None, "say a list": [text], "say half": "\ud83d"}  # of a character
        content = next((said for asked, said in odd.items() if asked in str(body["messages"])), text)
        choice = {"message": {"content": content}, "finish_reason": "stop", "index": 0}
        if ids := body.get("logprob_token_ids"):
            top = [{"token": f"token_id:{i}", "logprob": -float(i)} for i in [*ids, 7]]
            choice["logprobs"] = {"content": [{"top_logprobs": top}]}
        data = json.dumps({"choices": [choice], "usage": {"completion_tokens": len(text)}}).encode()
        half = data[: len(data) // 2]
        if fault == "cut":
            response = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(half)
            request.transport.abort()
            return response
        return web.Response(body=half if fault == "truncated" else data, content_type="application/json")
