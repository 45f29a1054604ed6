"""Readers: the same numbers whichever way they ask, single failures stay single, and a plain way out."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from caprl_utils.config import load_profile
from caprl_utils.models.base import Request
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.models.local import LocalBackend
from caprl_utils.rl import readers
from caprl_utils.rl.readers import ListedPrompts, PackedPrompts, Reader, batches, open_reader, pack, tensors
from caprl_utils.schema import ModelConfig
from tests.models.fake_server import FakeServer

CAPTIONS = ["The value of Rome is 42. The topic is sales.", "The value of Oslo is 7. The topic is sales.", ""]
QUESTIONS = [
    "What is the topic?\nA) sales\nB) rain", "What is the value of Rome?\nA) 42\nB) 17\nC) 5", "What?"
]  # fmt: skip
PREFILL = "The answer is"


@pytest.fixture(autouse=True)
def without_certificates(quick_client, monkeypatch):
    """To read them, for every client anew, takes longer than all else."""
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *unused, **unread: None)


@pytest.fixture(scope="module")
def backend(models):
    return LocalBackend(ModelConfig(path=str(models["reader"])))


@pytest.fixture
def requests():
    texts = [f"Caption: {c}\nQuestion: {q}" for c in CAPTIONS for q in QUESTIONS]
    return [Request(f"r{i}", t, prefill=PREFILL) for i, t in enumerate([*texts, texts[0]])]


@pytest.fixture
def packed(backend) -> Reader:
    return Reader(backend, PackedPrompts(backend))


@pytest.mark.parametrize("real", [False, True], ids=["mini", "qwen2.5"])  # tokenizers
def test_same_numbers_as_plain_requests(real, backend, requests, request):
    if real:
        backend = LocalBackend(ModelConfig(path=str(request.getfixturevalue("qwen_reader"))))
    packed, plain = Reader(backend, PackedPrompts(backend)), Reader(backend)
    a, b = packed.letter_logprobs(requests, "ABC"), plain.letter_logprobs(requests, "ABC")
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert packed._same is True
    rows = packed._fast._next_logprobs(requests)  # all tokens, for answers that are sampled
    ids = backend.loaded.choice_ids([" A", " B", " C"])
    np.testing.assert_allclose([row[ids] for row in rows], b, atol=1e-5)


def test_sampled_answers_repeat_and_follow_the_probabilities(packed, requests):
    many = [Request(f"draw{i}", requests[0].prompt, prefill=PREFILL) for i in range(1000)]
    first, again = (list(packed._fast.first_tokens(many, 1.0).values()) for _ in range(2))
    assert first == again
    chance = np.exp(packed.letter_logprobs(requests[:1], "A")[0][0])
    share = sum(text == " A" for text in first) / len(first)
    assert share == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / len(first)) + 1e-9)


PROMPTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12)


@given(PROMPTS, st.integers(1, 20))
def test_every_prompt_sees_exactly_its_own_tokens(prompts, max_tokens):
    packs = pack(prompts, max_tokens)
    ids, positions, scores, ends = tensors(packs)
    rows = [row for one in packs for row in one.rows]
    assert sorted(rows) == list(range(len(prompts)))
    for row, (number, end) in zip(rows, ends.tolist(), strict=True):
        seen = (scores[number, 0, end] == 0).nonzero().flatten()
        assert ids[number, seen].tolist() == prompts[row]
        assert positions[number, seen].tolist() == list(range(len(prompts[row])))
    assert all(len(p.ids) <= max(max_tokens, *map(len, prompts)) for p in packs)
    made = list(batches(packs, 3 * max_tokens))
    assert sum(map(len, made)) == len(packs)
    assert all(len(b) == 1 or len(b) * max(len(p.ids) for p in b) <= 3 * max_tokens for b in made)


def test_too_long_prompt_fails_alone_and_a_model_that_refuses_packs_is_asked_plainly(
    backend, packed, requests, monkeypatch
):
    long = Request("long", "Caption: " + "The topic is sales. " * 600, prefill=PREFILL)
    assert [row is None for row in packed.letter_logprobs([requests[0], long, requests[1]], "AB")] == [0, 1, 0]
    packed._same = None
    monkeypatch.setattr(packed._fast, "_pass", Mock(side_effect=ValueError("no such mask")))
    plain = Reader(backend).letter_logprobs(requests, "AB")
    np.testing.assert_allclose(packed.letter_logprobs(requests, "AB"), plain, atol=1e-5)
    assert packed._same is False


# A small stand-in for a vLLM server: what the reward asks of one, with numbers that are known

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


def endpoint(server: Server, copies: int = 1) -> EndpointBackend:
    return EndpointBackend(ModelConfig(path="m", backend="endpoint", base_urls=[server.url] * copies))


def listed(server: Server, copies: int = 1) -> Reader:
    return Reader(backend := endpoint(server, copies), ListedPrompts(backend))


def asked(count: int = 130) -> list[Request]:
    return [Request(f"r{i}", f"Question {i % 100}?", prefill=PREFILL) for i in range(count)]


@pytest.mark.parametrize(("differ", "count", "calls"), [(False, 130, [4, 36, 64]), (True, 8, [4])])
def test_same_numbers_in_few_requests_and_one_by_one_where_lists_differ(differ, count, calls, caplog):
    """The check, then 100 different prompts."""
    with Server(lists_differ=differ) as server:
        found = listed(server).letter_logprobs(asked(count), "ABC")
        assert sorted(call for call in server.calls if call != "chat") == calls
        assert found == [pytest.approx(r) for r in Reader(endpoint(server)).letter_logprobs(asked(count), "ABC")]
        assert ("asking one by one" in caplog.text) is differ


def test_answers_are_drawn_here_as_often_as_the_letters_say_and_unsure_ones_by_the_server():
    with Server() as server, Server(unsure=True) as unsure:
        reader = listed(server)
        many = [Request(f"draw{i}", "Question 0?", prefill=PREFILL) for i in range(1000)]
        texts = reader.answers(many, temperature=1.0)
        assert texts[:100] == reader.answers(many[:100], temperature=1.0)
        best = "ABC"[sum(map(ord, BEFORE + "Question 0?" + MIDDLE + PREFILL)) % 3]
        assert sum(text == f" {best}" for text in texts) / 1000 == pytest.approx(0.9, abs=0.03)
        # no letter of an answer in the first token, so more are asked for
        assert listed(unsure).answers(asked(3), temperature=0.6) == [" Z Z"] * 3


@given(st.lists(st.floats(1e-5, 1), min_size=2, max_size=30), st.integers(1, 9), st.floats(0.1, 1))
def test_other_tokens_never_have_more_than_a_sure_letter_allows(weights, letters, temperature):
    chances = [w / sum(weights) for w in weights]
    warm = [p ** (1 / temperature) for p in chances]
    cut = min(letters, len(chances) - 1)
    if readers.surely_a_letter([math.log(p) for p in chances[:cut]], temperature):
        assert sum(warm[cut:]) <= readers.MAX_STRAY * sum(warm[:cut]) * (1 + 1e-6) + 1e-9
    assert readers.surely_a_letter([-1e-4], temperature) and not readers.surely_a_letter([-1e-4], 1.5)


def test_a_server_that_fails_gives_none_and_does_not_mean_that_lists_differ(caplog):
    """Before anything is known of it, and later; it is asked again when it is back."""
    with Server(longest=-1) as server:
        reader = listed(server)
        for longest in (-1, 10_000, -1, 10_000):
            server.longest = longest
            rows = reader.letter_logprobs(asked(70), "AB")
            assert (None in rows) is (longest == -1)
        assert 64 in server.calls and "asking one by one" not in caplog.text


def test_processes_start_with_different_servers_and_lists_reach_them_all(monkeypatch):
    urls = [f"http://127.0.0.1:{port}/v1" for port in range(9000, 9008)]
    model = ModelConfig(path="m", backend="endpoint", base_urls=urls)
    first = []
    for rank in ("0", "3", "9"):
        monkeypatch.setenv("RANK", rank)
        first.append(open_reader(model, load_profile("smoke")).backend.config.base_urls[0])
    assert first == [urls[0], urls[3], urls[1]]
    with Server() as server:
        listed(server, 4).letter_logprobs(asked(100), "AB")
        assert sorted(call for call in server.calls if call != "chat") == [4, 25, 25, 25, 25]
