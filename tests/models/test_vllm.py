"""A real vLLM server on this machine answers as the same model does in this process."""

import pytest

from caprl_utils import prompts
from caprl_utils.config import load_profile
from caprl_utils.image_sources import open_images
from caprl_utils.models import server
from caprl_utils.models.base import Request, Sampling, open_backend
from caprl_utils.models.endpoint import EndpointBackend

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3000)]

LETTERS = [" A", " B", " C", " D"]


@pytest.fixture
def profile():
    return load_profile("smoke", {"images.num_images": 6})


def test_letters_and_greedy_completions_are_the_same_and_sampling_is_repeatable(profile, tmp_path):
    """Captions and questions, with and without image, with and without the start of an answer."""
    items = list(open_images(profile))
    key, value = next(iter(items[0].meta["facts"].items()))
    asked = prompts.look_question(f"What is the {key}?", [value, "42", "17", "red"])
    mixed = [
        *(Request(f"caption {item.id}", prompts.CAPTION, item.image) for item in items),
        Request("seen", asked, items[0].image, prompts.ANSWER_PREFILL),
        Request("blind", asked, None, prompts.ANSWER_PREFILL),
        Request("long", prompts.look_question("What is the value of Rome? " * 4), items[1].image),
    ]
    model = profile.models.policy.model_copy(update={"batch_size": 8})
    local, greedy = open_backend(model, profile), Sampling(max_tokens=48)
    sampling = Sampling(max_tokens=24, temperature=1.5, repetition_penalty=1.1, n=2, seed=3)
    with server.serve(model, log=tmp_path / "server.log") as running:
        served = EndpointBackend(running.config)
        for row, expected in zip(
            served.choice_logprobs(mixed, LETTERS), local.choice_logprobs(mixed, LETTERS), strict=True
        ):
            assert row == pytest.approx(expected, abs=2e-3)
        assert served.generate(mixed, greedy) == local.generate(mixed, greedy)
        first = served.generate(mixed, sampling)
        assert served.generate(mixed, sampling) == first
    assert len({completion.text for completion in first}) > len(mixed)


def test_a_text_reader_keeps_its_tokenizer(profile, tmp_path):
    """AutoTokenizer would split the words of a mini reader differently; see `server.tokenizer_folder`."""
    model = profile.models.reward_reader
    asked = prompts.read_question("The value of Rome is 42. The topic is sales.", "What is the value of Rome?",
                                  ["17", "42", "sales", "23"])  # fmt: skip
    requests = [Request("x", asked, None, prompts.ANSWER_PREFILL)]
    expected = open_backend(model, profile).choice_logprobs(requests, LETTERS)
    with server.serve(model, log=tmp_path / "server.log") as found:
        served = EndpointBackend(found.config).choice_logprobs(requests, LETTERS)
    assert served[0] == pytest.approx(expected[0], abs=2e-3)
