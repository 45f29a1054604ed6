"""An OpenAI-compatible server that answers from the request alone, and a list of ways to fail on the way."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter

from aiohttp import web

FAULTS = ("500", "429", "cut", "truncated", "hang")


def answer_of(body: dict) -> str:
    """What the server says: a function of prompt and seed, so that a retry says the same."""
    content = body["messages"][0]["content"]
    prompt = content if isinstance(content, str) else content[-1]["text"]
    return hashlib.sha256(f"{prompt}/{body['seed']}".encode()).hexdigest()[:12]


class FakeServer:
    """Runs in a thread. ``fault_share``: how many attempts fail, each in the next way of FAULTS."""

    def __init__(self, fault_share: float = 0.0, delay_sec: float = 0.0, models=("fake",), key=None) -> None:
        self.fault_share, self.delay_sec, self.models, self.key = fault_share, delay_sec, models, key
        self.attempts: Counter[str] = Counter()  # by prompt and seed
        self.faults: Counter[str] = Counter()
        self.busy = self.most_busy = 0
        self.down = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/tokenize", self._tokenize)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": [ord(c) for c in body["prompt"].strip()]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "wrong key"}, status=401)
        body = await request.json()
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            fault = self._fault(answer_of(body))
            if fault is not None:
                return await self._fail(request, fault)
            await asyncio.sleep(self.delay_sec)
            return self._answer(body)
        finally:
            self.busy -= 1

    def _fault(self, key: str) -> str | None:
        self.attempts[key] += 1
        if self.down:
            return "500"
        draw = hashlib.sha256(f"{key}/{self.attempts[key]}".encode()).digest()
        if draw[0] >= 256 * self.fault_share:
            return None
        fault = FAULTS[draw[1] % len(FAULTS)]
        self.faults[fault] += 1
        return fault

    async def _fail(self, request: web.Request, fault: str) -> web.StreamResponse:
        if fault == "500":
            return web.Response(status=500, text="something broke")
        if fault == "429":
            return web.Response(status=429, headers={"Retry-After": "0.02"})
        if fault == "hang":
            await asyncio.sleep(30)
        if fault == "cut":
            request.transport.close()
            return web.Response()
        return web.Response(text='{"choices": [{"message": {"cont', content_type="application/json")

    def _answer(self, body: dict) -> web.Response:
        text = answer_of(body)
        if "refuse" in str(body["messages"]):
            return web.json_response({"error": {"message": "prompt too long"}}, status=400)
        choice = {"message": {"content": text}, "finish_reason": "stop", "index": 0}
        if ids := body.get("logprob_token_ids"):
            top = [{"token": f"token_id:{i}", "logprob": -float(i)} for i in [*ids, 7]]
            choice["logprobs"] = {"content": [{"top_logprobs": top}]}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": len(text)}})
