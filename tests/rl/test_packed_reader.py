import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_utils.models.base import Request
from caprl_utils.models.local import LocalBackend
from caprl_utils.rl.packed import PackedReader, batches, pack, tensors
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


def test_answers_after_probabilities_cost_no_second_pass(backend, requests, monkeypatch):
    packed = PackedReader(backend)
    packed.letter_logprobs(requests, "ABC")
    first = packed._first_tokens(requests[:2], 1.0)
    monkeypatch.setattr(packed, "_pass", lambda packs: pytest.fail("computed again"))
    assert packed._first_tokens(requests[:2], 1.0) == first
    with pytest.raises(pytest.fail.Exception):
        packed.letter_logprobs([Request("new", "What else?", prefill="The answer is")], "ABC")


def test_whole_answers_are_the_backends_own(backend, requests):
    """A random reader hardly ever says a letter first, so most answers are continued."""
    packed, plain = PackedReader(backend), BackendReader(backend)
    packed.letter_logprobs(requests, "ABC")
    many = [Request(f"{n}/{r.id}", r.prompt, prefill=r.prefill) for n in range(4) for r in requests]
    rest = packed._generate(many, 0.6, 9)
    assert rest == plain._generate(many, 0.6, 9)
    assert max(map(len, rest)) > 9 and packed.answers(many, 0.6) == packed.answers(many, 0.6)
    long = Request("long", "Caption: " + "The topic is sales. " * 600, prefill="The answer is")
    assert packed._generate([long, many[0]], 0.6, 9) == [None, rest[0]]


def test_too_long_prompt_fails_alone(backend, requests):
    long = Request("long", "Caption: " + "The topic is sales. " * 600, prefill="The answer is")
    rows = PackedReader(backend).letter_logprobs([requests[0], long, requests[1]], "AB")
    assert rows[1] is None and rows[0] is not None and rows[2] is not None


def test_packs_are_trees_of_tokens():
    prompts = [[1, 2, 3, 4, 9], [1, 2, 3, 4, 8, 8], [5, 6], [1, 2, 3, 4, 9], [1, 2, 7]]
    (tree,) = pack(prompts, max_tokens=100)
    assert tree.ids == [1, 2, 3, 4, 8, 8, 9, 7, 5, 6]
    assert tree.positions == [0, 1, 2, 3, 4, 5, 4, 2, 0, 1]
    assert [tree.ids[end] for end in tree.ends] == [prompts[row][-1] for row in tree.rows]
    *_, scores, ends = tensors([tree])
    sees = scores[0, 0] == 0
    told = [tree.ids[place] for place in sees[6].nonzero().flatten()]
    assert told == [1, 2, 3, 4, 9] and ends.tolist() == [[0, end] for end in tree.ends]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(1, 20)
)
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


def test_batches_stay_below_the_limit():
    packs = pack([[i] * (5 + i) for i in range(20)], max_tokens=50)
    made = list(batches(packs, 60))
    assert sum(map(len, made)) == len(packs)
    assert all(len(b) == 1 or len(b) * max(len(p.ids) for p in b) <= 60 for b in made)


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
