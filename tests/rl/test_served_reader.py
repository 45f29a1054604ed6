"""Many prompts in one request: the same numbers, single failures stay single, and a plain way out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_utils.models.base import Request
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.rl.reader import BackendReader
from caprl_utils.rl.served import ServedReader, stray
from caprl_utils.schema import ModelConfig
from tests.rl.vllm_stub import BEFORE, MIDDLE, Server

PREFILL = "The answer is"
pytestmark = pytest.mark.usefixtures("quick_client")


def backend(server: Server) -> EndpointBackend:
    config = ModelConfig(path="m", backend="endpoint", base_urls=[server.url])
    return EndpointBackend(config)


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


def test_a_list_that_fails_once_does_not_mean_that_lists_differ(caplog, monkeypatch):
    """The first call meets a server that goes away in the middle: nothing is known yet, and nothing is said."""
    with Server() as server:
        reader = ServedReader(backend(server))
        monkeypatch.setattr(server, "longest", -1)
        assert reader.letter_logprobs(requests(4), "AB") == [None] * 4
        monkeypatch.setattr(server, "longest", 10_000)
        reader.letter_logprobs(requests(70), "AB")
        assert 64 in server.calls and "asking one by one" not in caplog.text


def test_letters_are_looked_up_once_and_any_server_will_do():
    with Server() as first, Server() as second:
        config = ModelConfig(path="m", backend="endpoint", base_urls=[first.url, second.url])
        endpoint = EndpointBackend(config)
        assert endpoint.served == "m"
        first.stop()
        assert endpoint.choice_ids((" A", " B")) == [65, 66]
        second.stop()
        assert endpoint.choice_ids((" A", " B")) == [65, 66]
        first.start()
        second.start()
