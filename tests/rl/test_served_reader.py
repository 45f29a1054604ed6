"""Many prompts in one request: the same numbers, single failures stay single, and a plain way out."""

import asyncio
import math
import threading

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from caprl_utils.backends.base import Request
from caprl_utils.backends.client import Limits
from caprl_utils.backends.endpoint import EndpointBackend
from caprl_utils.rl.reader import BackendReader
from caprl_utils.rl.served import ServedReader, stray
from caprl_utils.schema import ModelConfig

BEFORE, MIDDLE = "<user>", "</user><assistant>"
PREFILL = "The answer is"


class Server:
    """A server whose letters depend on the prompt alone; tokens are characters. `lists_differ`: by another number."""

    def __init__(self, lists_differ: bool = False, longest: int = 10_000, unsure: bool = False):
        self.lists_differ, self.longest, self.unsure, self.calls = lists_differ, longest, unsure, []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.start(), self.loop).result()
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def start(self):
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        for path, answer in (
            ("/tokenize", self.tokenize), ("/detokenize", self.detokenize),
            ("/v1/chat/completions", self.chat), ("/v1/completions", self.complete),
        ):  # fmt: skip
            app.router.add_post(path, answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/v1"

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


def backend(server: Server) -> EndpointBackend:
    config = ModelConfig(path="m", backend="endpoint", base_urls=[server.url])
    return EndpointBackend(config, Limits(attempts=1, first_wait_sec=0.01))


def requests(count: int = 130) -> list[Request]:
    return [Request(f"r{i}", f"Question {i % 100}?", prefill=PREFILL) for i in range(count)]


def test_same_numbers_in_few_requests():
    with Server() as server:
        served, plain = ServedReader(backend(server)), BackendReader(backend(server))
        found = served.letter_logprobs(requests(), "ABC")
        asked = [call for call in server.calls if call != "chat"]
        assert asked == [4, 64, 36] or asked == [4, 36, 64]  # the check, then 100 different prompts
        for row, wanted in zip(found, plain.letter_logprobs(requests(), "ABC"), strict=True):
            assert row == pytest.approx(wanted)


def test_a_server_whose_lists_differ_is_asked_one_by_one(caplog):
    with Server(lists_differ=True) as server:
        served = ServedReader(backend(server))
        rows = served.letter_logprobs(requests(8), "ABC")
        assert rows == [
            pytest.approx(r) for r in BackendReader(backend(server)).letter_logprobs(requests(8), "ABC")
        ]
        assert server.calls.count(4) == 1 and "asking one by one" in caplog.text


def test_a_prompt_that_is_too_long_fails_alone():
    with Server(longest=200) as server:
        served = ServedReader(backend(server))
        rows = served.letter_logprobs([*requests(5), Request("long", "x" * 300, prefill=PREFILL)], "AB")
        assert rows[5] is None and all(row is not None for row in rows[:5])


def test_a_dead_server_gives_none_and_is_asked_again_when_it_is_back():
    with Server() as server:
        reader = ServedReader(backend(server))
        first = reader.letter_logprobs(requests(4), "AB")
        server.longest, ok = -1, server.longest
        assert reader.letter_logprobs(requests(4), "AB") == [None] * 4
        server.longest = ok
        assert reader.letter_logprobs(requests(4), "AB") == first


def test_answers_are_drawn_here_as_often_as_the_letters_say():
    with Server() as server:
        reader = ServedReader(backend(server))
        many = [Request(f"draw{i}", "Question 0?", prefill=PREFILL) for i in range(3000)]
        texts = reader.answers(many, temperature=1.0)
        assert texts == reader.answers(many, temperature=1.0)
        best = "ABC"[sum(map(ord, BEFORE + "Question 0?" + MIDDLE + PREFILL)) % 3]
        assert sum(text == f" {best}" for text in texts) / 3000 == pytest.approx(0.9, abs=0.03)


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=30), st.integers(1, 9), st.floats(0.1, 1))
def test_other_tokens_never_have_more_than_the_bound_says(weights, letters, temperature):
    chances = [w / sum(weights) for w in weights]
    warm = [p ** (1 / temperature) for p in chances]
    cut = min(letters, len(chances) - 1)
    others = sum(warm[cut:]) / sum(warm[:cut])
    assert others <= stray([math.log(p) for p in chances[:cut]], temperature) * (1 + 1e-6) + 1e-9
    assert stray([-0.001], 1.5) == math.inf


def test_unsure_letters_are_sampled_by_the_server():
    with Server(unsure=True) as server:
        reader = ServedReader(backend(server))
        texts = reader.answers(requests(3), temperature=0.6)
        assert texts == [" Z Z"] * 3  # no letter of an answer in the first token, so more are asked for
