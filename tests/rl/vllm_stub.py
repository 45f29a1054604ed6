"""A small stand-in for a vLLM server: what the reward asks of one, with numbers that are known."""

import asyncio
import math
import threading

from aiohttp import web

BEFORE, MIDDLE = "<user>", "</user><assistant>"


class Server:
    """A server whose letters depend on the prompt alone; tokens are characters. `lists_differ`: by another number.

    `stop` and `start` end and open it at the same address.
    """

    def __init__(self, lists_differ: bool = False, longest: int = 10_000, unsure: bool = False):
        self.lists_differ, self.longest, self.unsure, self.calls = lists_differ, longest, unsure, []
        self.port = 0  # any, at the first start
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        self.start()
        return self

    def start(self):
        asyncio.run_coroutine_threadsafe(self.listen(), self.loop).result()

    def stop(self):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result()

    def __exit__(self, *_):
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def listen(self):
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        for path, answer in (
            ("/tokenize", self.tokenize), ("/detokenize", self.detokenize),
            ("/v1/chat/completions", self.chat), ("/v1/completions", self.complete),
        ):  # fmt: skip
            app.router.add_post(path, answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self.runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def logprobs(self, text: str, ids: list[int], extra: float = 0.0) -> dict[str, float]:
        right = sum(map(ord, text)) % 3
        mass = 0.5 if self.unsure else 1.0
        rest = mass * 0.1 / max(1, len(ids) - 1)
        shares = [mass * 0.9 if i == right else rest for i in range(len(ids))]
        return {f"token_id:{token}": math.log(p) + extra for token, p in zip(ids, shares, strict=True)}

    async def models(self, request):
        return web.json_response({"data": [{"id": "m"}]})

    async def tokenize(self, request):
        body = await request.json()
        text = body.get("prompt")
        if text is None:
            text = self.templated(body)
        tokens = [ord(c) for c in text]
        return web.json_response({"tokens": tokens[-1:] if text.startswith(" ") else tokens})

    def templated(self, body):
        last = body["messages"][-1]["content"] if len(body["messages"]) > 1 else ""
        return BEFORE + body["messages"][0]["content"] + MIDDLE + last

    async def detokenize(self, request):
        return web.json_response({"prompt": "".join(map(chr, (await request.json())["tokens"]))})

    async def chat(self, request):
        body = await request.json()
        self.calls.append("chat")
        text = self.templated(body)
        if len(text) > self.longest:
            return web.json_response({"error": "too long"}, status=400)
        choice = {"finish_reason": "length", "message": {"content": " Z"}}
        if body.get("logprobs"):
            top = self.logprobs(text, body["logprob_token_ids"])
            entries = [{"token": token, "logprob": value} for token, value in top.items()]
            choice["logprobs"] = {"content": [{"top_logprobs": entries}]}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 1}})

    async def complete(self, request):
        body = await request.json()
        self.calls.append(len(body["prompt"]))
        if any(len(text) > self.longest for text in body["prompt"]):
            return web.json_response({"error": "too long"}, status=400)
        extra = 0.5 if self.lists_differ else 0.0
        choices = [
            {
                "index": i,
                "logprobs": {"top_logprobs": [self.logprobs(text, body["logprob_token_ids"], extra)]},
            }
            for i, text in enumerate(body["prompt"])
        ]
        return web.json_response({"choices": choices[::-1]})
