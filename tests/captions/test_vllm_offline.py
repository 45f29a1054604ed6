"""How requests go through vLLM's engine, with a scripted one; the real one is asked in test_scale."""

from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace

import pytest
from scripted_captioner import picture

from caprl_utils.captions import vllm_offline
from caprl_utils.models.base import Request, Sampling
from caprl_utils.schema import ModelConfig


@dataclass
class Engine:
    """Finishes the request that waits longest, one a step; notes how many were in it at each step."""

    waiting: list = field(default_factory=list)
    filled: list = field(default_factory=list)
    numbers: count = field(default_factory=count)

    def enqueue_chat(self, chats, parameters, use_tqdm):
        number = next(self.numbers)
        self.waiting.append((str(number), chats[0][0]["content"][1]["text"], parameters[0]))
        return [f"{number}-0a1b2c3d"]

    @property
    def llm_engine(self):
        return self

    def step(self):
        self.filled.append(len(self.waiting))
        number, text, said = self.waiting.pop(0)
        made = SimpleNamespace(text=f"{text} {said}", token_ids=[1, 2], finish_reason="stop")
        still = SimpleNamespace(request_id="still running", finished=False)
        return [still, SimpleNamespace(request_id=number, finished=True, outputs=[made])]


@pytest.fixture
def backend(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_offline, "ENGINE_BATCHES", 2)
    monkeypatch.setattr(vllm_offline, "_parameters", lambda request, index, sampling: (index, sampling.seed))
    new = vllm_offline.VllmBackend(ModelConfig(path="fake", batch_size=2))
    new.__dict__["_engine"] = Engine()
    return new


def requests(*names):
    return [Request(name, f"say {name}", picture(0)) for name in names]


def test_generate_answers_in_order(backend):
    found = backend.generate(requests("a", "b"), Sampling(8, n=2, seed=5))
    assert [(c.id, c.index, c.text) for c in found] == [
        ("a", 0, "say a (0, 5)"), ("a", 1, "say a (1, 5)"), ("b", 0, "say b (0, 5)"), ("b", 1, "say b (1, 5)"),
    ]  # fmt: skip
    assert not backend._running and not backend._ready and backend.generate([], Sampling(8)) == []


def test_the_engine_is_filled_up_after_every_step(backend):
    found = list(backend.stream(iter(requests(*"abcdefgh")), Sampling(8)))
    assert [c.id for c in found] == list("abcdefgh")
    assert backend._engine.filled == [4, 4, 4, 4, 4, 3, 2, 1]


def test_a_second_attempt_in_the_middle_loses_nothing_and_does_not_empty_the_engine(backend):
    """What `work.Worker` does with a loop: generate while the stream is read."""
    seen = []
    for completion in backend.stream(iter(requests(*"abcdef")), Sampling(8)):
        seen.append(completion.id)
        if completion.id == "b":
            (again,) = backend.generate(requests("b"), Sampling(8, seed=9))
            assert again.text == "say b (0, 9)"
    assert seen == list("abcdef")
    assert min(backend._engine.filled[:-3]) >= 3
