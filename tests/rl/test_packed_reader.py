import numpy as np
import pytest

from caprl_utils.backends.base import Request
from caprl_utils.backends.local import LocalBackend
from caprl_utils.rl.packed import PackedReader, batches, pack
from caprl_utils.rl.reader import BackendReader
from caprl_utils.schema import ModelConfig

CAPTIONS = ["The value of Rome is 42. The topic is sales.", "The value of Oslo is 7. The topic is sales.", ""]
QUESTIONS = [
    "What is the topic?\nA) sales\nB) rain",
    "What is the value of Rome?\nA) 42\nB) 17\nC) 5",
    "What?",
]


@pytest.fixture(scope="module")
def backend(models):
    return LocalBackend(ModelConfig(path=str(models["reader"])))


@pytest.fixture
def requests():
    texts = [f"Caption: {c}\nQuestion: {q}" for c in CAPTIONS for q in QUESTIONS]
    return [Request(f"r{i}", t, prefill="The answer is") for i, t in enumerate([*texts, texts[0]])]


def test_same_numbers_as_plain_requests(backend, requests):
    packed, plain = PackedReader(backend), BackendReader(backend)
    a, b = packed.letter_logprobs(requests, "ABC"), plain.letter_logprobs(requests, "ABC")
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert packed._checked is True


def test_sampled_answers_repeat_and_follow_the_probabilities(backend, requests):
    packed = PackedReader(backend)
    many = [Request(f"draw{i}", requests[0].prompt, prefill="The answer is") for i in range(2000)]
    first = packed._first_tokens(many, 1.0)
    assert first == packed._first_tokens(many, 1.0)
    chance = np.exp(packed.letter_logprobs(requests[:1], "A")[0][0])
    share = sum(text == " A" for text in first) / len(first)
    assert share == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / len(first)) + 1e-9)


def test_too_long_prompt_fails_alone(backend, requests):
    long = Request("long", "Caption: " + "The topic is sales. " * 600, prefill="The answer is")
    rows = PackedReader(backend).letter_logprobs([requests[0], long, requests[1]], "AB")
    assert rows[1] is None and rows[0] is not None and rows[2] is not None


def test_packs_share_starts_and_keep_every_prompt():
    prompts = [[1, 2, 3, 4, 9], [1, 2, 3, 4, 8, 8], [5, 6], [1, 2, 3, 4, 9], [7]]
    packs = pack(prompts, max_tokens=100)
    assert sorted(row for p in packs for row in p.rows) == [0, 1, 2, 3, 4]
    shared = next(p for p in packs if 0 in p.rows)
    assert sorted(shared.rows) == [0, 1, 3] and shared.shared == 4 and shared.length == 4 + 1 + 2 + 1
    assert all(p.shared < min(map(len, p.ids)) for p in packs)
    assert [len(p.rows) for p in pack(prompts[:2], max_tokens=6)] == [1, 1]


def test_batches_stay_below_the_limit():
    packs = pack([[i] * (5 + i) for i in range(20)], max_tokens=50)
    made = list(batches(packs, 60))
    assert sum(map(len, made)) == len(packs)
    assert all(len(b) == 1 or len(b) * max(p.length for p in b) <= 60 for b in made)


def test_model_that_refuses_packed_prompts_is_asked_plainly(backend, requests, monkeypatch):
    packed = PackedReader(backend)

    def refuse(packs):
        raise ValueError("no such mask")

    monkeypatch.setattr(packed, "_pass", refuse)
    np.testing.assert_allclose(
        packed.letter_logprobs(requests, "AB"),
        BackendReader(backend).letter_logprobs(requests, "AB"),
        atol=1e-5,
    )
    assert packed._checked is False
