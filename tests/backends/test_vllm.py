"""A real vLLM server on this machine answers as the same model does in this process."""

import pytest
from test_local import LETTERS, mixed_requests

from caprl_utils.backends import Sampling, open_backend, server
from caprl_utils.backends.endpoint import EndpointBackend
from caprl_utils.schema import ModelConfig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def backends(vlm_folder, profile, tmp_path_factory):
    model = ModelConfig(path=str(vlm_folder), batch_size=8)
    log = tmp_path_factory.mktemp("server") / "server.log"
    with server.serve(model, max_model_len=1024, log=log) as running:
        yield EndpointBackend(running.config), open_backend(model, profile)


def test_letters_have_the_same_probabilities(backends):
    endpoint, local = backends
    served = endpoint.choice_logprobs(mixed_requests(), LETTERS)
    for row, expected in zip(served, local.choice_logprobs(mixed_requests(), LETTERS), strict=True):
        assert row == pytest.approx(expected, abs=1e-3)


def test_greedy_completions_are_the_same(backends):
    endpoint, local = backends
    sampling = Sampling(max_tokens=12)
    assert endpoint.generate(mixed_requests(), sampling) == local.generate(mixed_requests(), sampling)


def test_sampling_is_repeatable(backends):
    endpoint, _ = backends
    sampling = Sampling(max_tokens=12, temperature=1.0, repetition_penalty=1.1, n=2, seed=3)
    first = endpoint.generate(mixed_requests(), sampling)
    assert endpoint.generate(mixed_requests(), sampling) == first
    assert len({completion.text for completion in first}) > len(mixed_requests())
