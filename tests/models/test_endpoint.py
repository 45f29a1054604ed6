"""The client against a server that misbehaves: same rows, none lost, none twice, and the server kept full."""

import asyncio
import base64
import io
import itertools
import os
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from caprl_utils.errors import UserError
from caprl_utils.models import endpoint
from caprl_utils.models.base import Request, Sampling
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.runs import RowStore
from caprl_utils.schema import ModelConfig
from tests.models.fake_server import FAULTS, FakeServer

pytestmark = pytest.mark.usefixtures("quick_client")
GREEDY = Sampling(max_tokens=9)


def backend(*servers: FakeServer, **settings) -> EndpointBackend:
    urls = [server.url for server in servers] or ["http://127.0.0.1:9/v1"]
    given = {"backend": "endpoint", "base_urls": urls, "batch_size": 16} | settings
    return EndpointBackend(ModelConfig(path="fake", **given))


def requests(count: int, prefix: str = "") -> list[Request]:
    return [Request(f"r{i}", f"{prefix}prompt {i}") for i in range(count)]


def test_completions_come_in_the_order_asked_and_a_faulty_way_gives_the_same():
    sampling = Sampling(max_tokens=9, n=2)
    with FakeServer() as server, FakeServer(share=0.3) as faulty:
        expected = backend(server).generate(requests(50), sampling)
        found = list(backend(faulty).stream(requests(50), sampling))
    assert [(c.id, c.index) for c in expected] == [(f"r{i}", k) for i in range(50) for k in range(2)]
    assert all(c.error is None and c.num_tokens == 12 and c.finish_reason == "stop" for c in expected)
    assert len({c.text for c in expected}) == 100
    assert set(faulty.faults) == {*FAULTS, None} and faulty.faults[None] == len(found) == 100
    assert {(c.id, c.index, c.text) for c in found} == {(c.id, c.index, c.text) for c in expected}
    with pytest.raises(ValueError, match="same id"):
        backend(server).generate(2 * requests(1), GREEDY)


def test_the_server_is_kept_full_and_never_overfull(monkeypatch):
    monkeypatch.setattr(endpoint, "REQUEST_SEC", 60.0)
    with FakeServer() as server:
        server.hold_until = 16  # however slowly a busy machine sends them
        backend(server).generate(requests(40), GREEDY)
        assert server.most_busy == 16


def test_two_servers_share_the_work_and_one_may_go_down():
    with FakeServer(delay_sec=0.01) as first, FakeServer(delay_sec=0.01) as second:
        second.down = True
        assert all(c.error is None for c in backend(first, second).generate(requests(30), GREEDY))
        second.down = False
        backend(first, second).generate(requests(50, "more "), GREEDY)
        assert len(second.attempts) > 15


def test_a_server_that_restarts_is_waited_for_and_one_that_fails_or_stays_away_stops_the_run(monkeypatch, caplog):
    monkeypatch.setattr(endpoint, "SILENT_SEC", 20.0)
    monkeypatch.setattr(endpoint, "GIVE_UP_AFTER", 5)
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    with FakeServer() as server:
        client = backend(server)
        expected = client.generate(requests(5), GREEDY)
        server.close()
        threading.Timer(0.5, server.open).start()
        assert client.generate(requests(5), GREEDY) == expected
        assert caplog.text.count("waiting up to 20 s") == 1
        server.down = True
        with pytest.raises(UserError, match=r"last 5 requests to http.* all failed: HTTP 500.*run again"):
            client.generate(requests(40), GREEDY)
        server.close()
        monkeypatch.setattr(endpoint, "SILENT_SEC", 0.3)
        with pytest.raises(UserError, match=r"requests to http://127.*start it again"):
            client.generate(requests(5), GREEDY)
        assert client.choice_logprobs(requests(1), []) == [None]
        server.open()


def test_requests_are_taken_as_there_is_room_also_inside_a_running_loop_as_in_jupyter():
    taken = itertools.count()

    async def cell():
        stream = backend(server).stream((Request(f"r{i}", f"prompt {i}") for i in taken), GREEDY)
        assert len([next(stream) for _ in range(50)]) == 50
        stream.close()

    with FakeServer() as server:
        asyncio.run(cell())
    assert next(taken) <= 50 + 2 * 16 + 1


def test_letters_by_probability():
    with FakeServer() as server:
        scores = backend(server).choice_logprobs([*requests(2), Request("x", "refuse")], [" A", " B"])
        assert scores == [[-65.0, -66.0]] * 2 + [None]
        with pytest.raises(UserError, match="one"):
            backend(server).choice_logprobs(requests(1), [" AB"])


def test_images_and_prefill_are_sent_as_vllm_takes_them():
    """No image is larger than the limit, and transparent places are white, as in every stage."""
    client = backend(max_pixels=10_000)
    client.served = "fake"  # as a server would say
    body = client.chat_body(Request("a", "What?", Image.new("RGBA", (400, 200)), "The answer is"), Sampling(5, 0.6))
    user, assistant = body["messages"]
    head, _, data = user["content"][0]["image_url"]["url"].partition(",")
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/png;base64" and sent.size == (141, 70) and sent.getpixel((9, 9)) == (255, 255, 255)
    assert user["content"][1]["text"] == "What?"
    assert assistant == {"role": "assistant", "content": "The answer is"}
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert "repetition_penalty" not in body
    assert body["seed"] != client.chat_body(Request("b", "What?"), Sampling(5))["seed"]
    assert client.chat_body(Request("r1", "What?", seed=3), Sampling(5), 2)["seed"] == 483350808


def test_what_is_refused_has_no_text_or_cannot_be_read_fails_alone_and_once(tmp_path):
    file = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 80).save(file)
    file.write_bytes(file.read_bytes()[:-900])
    bad = [Request("cut", "What?", Image.open(file)), Request("null", "say nothing"), Request("no", "refuse me")]
    odd = [Request("list", "say a list"), Request("half", "say half")]
    with FakeServer() as server:
        *found, first, second = backend(server).generate([*bad, *requests(2)], GREEDY)
        assert max(server.attempts.values()) == 1
        found += backend(server).generate(odd, GREEDY)
        assert backend(server).choice_logprobs([bad[0], *requests(1)], [" A"]) == [None, [-65.0]]
    assert first.error is second.error is None
    assert [(c.text, c.finish_reason) for c in found] == [(None, "error")] * 5
    reasons = "image cannot be read", "gave no text", "prompt too long", "content is list, no text", "surrogates"
    for done, said in zip(found, reasons, strict=True):
        assert said in done.error


def test_a_server_here_is_asked_directly_whatever_proxy_is_named(monkeypatch):
    for proxy in ("http://127.0.0.1:9", "socks5://127.0.0.1:9"):
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        with FakeServer() as server:
            assert backend(server).generate(requests(1), GREEDY)[0].error is None
    with pytest.raises(UserError, match=r"SOCKS proxy socks5://.*NO_PROXY"):
        endpoint.Client(["http://a.example/v1"], 1)
    script = "import caprl_utils, os, urllib.request as u; print(u.proxy_bypass('127.0.0.1'), os.environ['NO_PROXY'])"
    env = {name: value for name, value in os.environ.items() if name != "no_proxy"} | {"NO_PROXY": "example.org"}
    told = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", "example.org,localhost,127.0.0.1,::1"]


def test_keys_come_from_the_environment(monkeypatch):
    with FakeServer(key="secret") as server:
        with pytest.raises(UserError, match="MY_KEY"):
            backend(server, api_key_env="MY_KEY")
        monkeypatch.setenv("MY_KEY", "secret")
        assert backend(server, api_key_env="MY_KEY").generate(requests(1), GREEDY)[0].error is None


def test_wrong_or_absent_servers_say_what_to_do():
    with FakeServer(models=("another",)) as server, pytest.raises(UserError, match="does not serve 'fake'"):
        backend(server).generate(requests(1), GREEDY)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1.*make serve"):
        backend().generate(requests(1), GREEDY)
    for odd in ((), "page"):
        with (
            FakeServer(models=odd) as server,
            pytest.raises(UserError, match=r"answers as no model server.*ends in /v1"),
        ):
            backend(server).generate(requests(1), GREEDY)
    with FakeServer() as server:
        server.url = server.url.removesuffix("/v1")
        with pytest.raises(UserError, match="ends in /v1"):
            backend(server).generate(requests(1), GREEDY)


WORKER = """
import sys
from pathlib import Path
from caprl_utils.models.base import Request, Sampling
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.runs import RowStore
from caprl_utils.schema import ModelConfig

url, file, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
config = ModelConfig(path="fake", backend="endpoint", base_urls=[url], batch_size=8)
store = RowStore(file)
todo = (Request(f"r{i}", f"prompt {i}") for i in range(count) if f"r{i}" not in store)
for done in EndpointBackend(config).stream(todo, Sampling(max_tokens=9)):
    store.append({"id": done.id, "text": done.text})
"""


@pytest.mark.integration
def test_killed_no_row_is_lost_or_twice(tmp_path):
    rows, count = tmp_path / "rows.jsonl", 600
    with FakeServer(delay_sec=0.01) as server:
        command = [sys.executable, "-c", WORKER, server.url, str(rows), str(count)]
        for stop_after in (1, 250):  # rows on disk when it is killed
            process = subprocess.Popen(command)
            while process.poll() is None and (not rows.exists() or rows.stat().st_size < 35 * stop_after):
                time.sleep(0.005)
            assert process.poll() is None
            process.kill()
            process.wait()
        subprocess.run(command, check=True)
        found = [(row["id"], row["text"]) for row in RowStore(rows).read()]
        expected = backend(server).generate(requests(count), GREEDY)
    assert sorted(found) == sorted((c.id, c.text) for c in expected)
