"""A small stand-in for a vLLM server: what the reward asks of one, with numbers that are known."""

import math

from aiohttp import web

from tests.models.fake_server import FakeServer

BEFORE, MIDDLE = "<user>", "</user><assistant>"


def templated(body: dict) -> str:
    """The messages of a body in the chat template."""
    last = body["messages"][-1]["content"] if len(body["messages"]) > 1 else ""
    return BEFORE + body["messages"][0]["content"] + MIDDLE + last


class Server(FakeServer):
    """A server whose letters depend on the prompt alone; tokens are characters. lists_differ: by another number.

    unsure: its letters hold half of the probability. longest: characters of a prompt that it takes. calls: "chat", or
    how many prompts a list had.
    """

    def __init__(self, lists_differ: bool = False, longest: int = 10_000, unsure: bool = False):
        super().__init__(models=("m",))
        self.lists_differ, self.longest, self.unsure, self.calls = lists_differ, longest, unsure, []

    def _routes(self):
        lists = web.post("/v1/completions", self._complete)
        return [*super()._routes(), web.post("/detokenize", self._detokenize), lists]

    def _logprobs(self, text: str, ids: list[int], extra: float = 0.0) -> dict[str, float]:
        right = sum(map(ord, text)) % 3
        mass = 0.5 if self.unsure else 1.0
        rest = mass * 0.1 / max(1, len(ids) - 1)
        shares = [mass * 0.9 if i == right else rest for i in range(len(ids))]
        return {f"token_id:{token}": math.log(p) + extra for token, p in zip(ids, shares, strict=True)}

    async def _tokenize(self, request):
        body = await request.json()
        text = body.get("prompt")
        tokens = [ord(c) for c in (templated(body) if text is None else text)]
        return web.json_response({"tokens": tokens[-1:] if text and text.startswith(" ") else tokens})

    async def _detokenize(self, request):
        return web.json_response({"prompt": "".join(map(chr, (await request.json())["tokens"]))})

    async def _chat(self, request):
        body = await request.json()
        self.calls.append("chat")
        text = templated(body)
        if len(text) > self.longest:
            return web.json_response({"error": "too long"}, status=400)
        choice = {"finish_reason": "length", "message": {"content": " Z"}}
        if body.get("logprobs"):
            top = self._logprobs(text, body["logprob_token_ids"])
            entries = [{"token": token, "logprob": value} for token, value in top.items()]
            choice["logprobs"] = {"content": [{"top_logprobs": entries}]}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 1}})

    async def _complete(self, request):
        body = await request.json()
        self.calls.append(len(body["prompt"]))
        if any(len(text) > self.longest for text in body["prompt"]):
            return web.json_response({"error": "too long"}, status=400)
        ids, extra = body["logprob_token_ids"], 0.5 if self.lists_differ else 0.0
        choices = [
            {"index": i, "logprobs": {"top_logprobs": [self._logprobs(text, ids, extra)]}}
            for i, text in enumerate(body["prompt"])
        ]
        return web.json_response({"choices": choices[::-1]})
