"""The server of this process: the plain client, our client, and what it refuses."""

import base64
import io

import openai
import pytest
from test_local import image

from caprl_utils import prompts
from caprl_utils.models import Request, Sampling, open_backend
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.models.local_server import read_request, serve_here
from caprl_utils.schema import ModelConfig


@pytest.fixture(scope="module")
def running(vlm_folder, profile):
    with serve_here(ModelConfig(path=str(vlm_folder), batch_size=8), profile) as server:
        yield server


def data_url(shown) -> str:
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_the_plain_client_gets_what_the_model_says(running, vlm_folder, profile):
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image(0))}},
        {"type": "text", "text": prompts.CAPTION},
    ]
    with openai.OpenAI(base_url=running.url, api_key="none") as client:
        answer = client.chat.completions.create(
            model=str(vlm_folder),
            messages=[{"role": "user", "content": content}],
            max_tokens=6,
            temperature=0,
        )
    backend = open_backend(ModelConfig(path=str(vlm_folder)), profile)
    (expected,) = backend.generate([Request("0", prompts.CAPTION, image(0))], Sampling(max_tokens=6))
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == expected.num_tokens


def test_company_changes_no_answer(running):
    endpoint = EndpointBackend(running.config)
    sampling = Sampling(max_tokens=6, temperature=1.0, n=2)
    requests = [Request(f"r{i}", prompts.look_question(f"What is {i}?"), image(i % 2)) for i in range(4)]
    together = endpoint.generate(requests, sampling)
    alone = [found for request in requests for found in endpoint.generate([request], sampling)]
    assert together == alone
    assert len({found.text for found in together}) == 8


def test_what_it_cannot_do_is_an_error_of_that_request(running, vlm_folder):
    endpoint = EndpointBackend(running.config)
    long, fine = endpoint.generate(
        [Request("long", "red " * 2000), Request("x", "red")], Sampling(max_tokens=2)
    )
    assert "tokens" in long.error and fine.error is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"n": 2}, "one whole completion"),
        ({"stream": True}, "one whole completion"),
        ({"messages": [{"role": "system", "content": "x"}]}, "one user turn"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}]}, "nothing is fetched"),
    ],
)  # fmt: skip
def test_requests_beyond_it_are_refused(change, problem):
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]} | change
    with pytest.raises(ValueError, match=problem):
        read_request(body)
