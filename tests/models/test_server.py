"""The server manager: its command line, and what a user is told when it cannot start."""

import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from caprl_utils import prompts
from caprl_utils.__main__ import app
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.models import server
from caprl_utils.models.base import Request, open_backend
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.models.local import load_tokenizer
from caprl_utils.schema import ModelConfig


@pytest.fixture
def model(reader_folder):
    return ModelConfig(path=str(reader_folder))


def refused(model: ModelConfig, message: str, **options) -> None:
    with pytest.raises(UserError, match=message), server.serve(model, **options):
        pass


def flag(line: list[str], name: str) -> str | None:
    return line[line.index(name) + 1] if name in line else None


def test_the_command_line(model, monkeypatch):
    """On GPUs no cap on sequences; a 72B is spread over as many as hold it; vLLM's own options come last."""
    monkeypatch.setattr(server, "visible_gpus", list)
    line = " ".join(server.command(model, 8123, server.Options(max_model_len=512)))
    for part in ("--host 127.0.0.1 --port 8123", "--generation-config vllm", "--max-model-len 512",
                 "--dtype float32", "--enforce-eager", "--gpu-memory-utilization 0.2",
                 "--no-enable-chunked-prefill"):  # fmt: skip
        assert part in line and "--trust-remote-code" not in line
    monkeypatch.setattr(server, "visible_gpus", lambda: ["0", "1", "2", "3", "4", "5"])
    monkeypatch.setattr(server.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="81559\n81559\n"))
    line = server.command(model, 8123, server.Options("0.0.0.0", more=("--enable-sleep-mode",)))
    assert not {"--enforce-eager", "--max-num-seqs"} & {*line} and line[-1] == "--enable-sleep-mode"
    assert flag(line, "--tensor-parallel-size") == "1" and flag(line, "--host") == "0.0.0.0"
    for name, gpus in (("Qwen/Qwen2.5-VL-72B-Instruct", "4"), ("Qwen/Qwen2.5-VL-7B-Instruct", "1")):
        assert flag(server.command(ModelConfig(path=name), 8123), "--tensor-parallel-size") == gpus
    given = server.command(model, 8123, server.Options(gpus=2, copies=3))
    assert [flag(given, f"--{kind}-parallel-size") for kind in ("tensor", "data")] == ["2", "3"]
    with pytest.raises(UserError, match="4 x 2 GPUs are asked for, 6 can be seen here"):
        server.command(model, 8123, server.Options(gpus=2, copies=4))


def test_options_of_vllms_own_are_passed_on(monkeypatch):
    seen = []
    monkeypatch.setattr(server, "serve_until_stopped", lambda *given: seen.append(given))
    line = "serve zoo:base --host 0.0.0.0 --port 8001 --max-pixels 4096 -- --enable-sleep-mode --max-num-seqs 8"
    app(line.split(), standalone_mode=False)
    ((config, port, options),) = seen
    assert (config.path, port, options.host) == ("zoo:base", 8001, "0.0.0.0")
    assert options.more == ("--mm-processor-kwargs", '{"max_pixels": 4096}', "--enable-sleep-mode",
                            "--max-num-seqs", "8")  # fmt: skip


def test_the_key_is_not_on_the_command_line(model, monkeypatch):
    def popen(line, log, env, guarded):
        assert env["VLLM_API_KEY"] == "secret" and env["HF_HUB_OFFLINE"] == "1" and "secret" not in " ".join(line)
        raise UserError("seen")

    model = model.model_copy(update={"api_key_env": "MY_KEY"})
    monkeypatch.setattr(server.processes, "popen", popen)
    refused(model, "MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret")
    refused(model, "seen")


def test_a_text_model_keeps_its_tokenizer(reader_folder, vlm_folder, tmp_path):
    """AutoTokenizer, which vLLM uses, reads the copy as the tokenizer is, and the model's own folder not."""
    from transformers import AutoTokenizer

    text = "This is a chart. The value of Rome is 40."
    own = load_tokenizer(str(reader_folder))
    copied = AutoTokenizer.from_pretrained(server.tokenizer_folder(reader_folder, tmp_path / "copy"))
    assert copied(text)["input_ids"] == own(text)["input_ids"]
    assert copied.decode(copied(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "What is the topic?"}]
    assert copied.apply_chat_template(chat, tokenize=False) == own.apply_chat_template(chat, tokenize=False)
    assert AutoTokenizer.from_pretrained(reader_folder)(text)["input_ids"] != own(text)["input_ids"]
    assert server.tokenizer_folder(vlm_folder, tmp_path / "none") is None


def test_what_cannot_start_is_refused_at_once(model, tmp_path, monkeypatch):
    refused(ModelConfig(path=str(tmp_path)), r"config\.json is missing")
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        port = taken.getsockname()[1]
        refused(model, str(port), port=port)
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    refused(model, "vLLM is not installed")


def test_a_server_that_dies_shows_the_end_of_its_log_and_the_likely_cause(model, tmp_path, monkeypatch):
    line = "ValueError: Free memory on device is less than desired GPU memory utilization"
    script, log = f"print('loading'); raise SystemExit({line!r})", tmp_path / "log"
    monkeypatch.setattr(server, "command", lambda *_: [sys.executable, "-c", script])
    refused(model, r"status 1\. Likely: .*too little(?s:.*)loading", log=log)
    for line, likely in (
        ("ValueError: User-specified max_model_len (9) is greater than the derived", "Likely: .*lower --max-model-len"),
        ("RepositoryNotFoundError: 404", "Likely: .*check its name"), ("ValueError: all is well otherwise", "The end"),
    ):  # fmt: skip
        log.write_text(f"loading\n{line}\n")
        assert re.search(rf"status 1\. ?{likely}(?s:.*)loading", server._why_ended(1, "m", log))


def test_the_command_serves_until_it_is_stopped(reader_folder, tmp_path):
    """`caprl serve` with a stand-in for vLLM's program: SIGTERM ends both, without an error."""
    (tmp_path / "health").touch()
    line = f"[sys.executable, *'-m http.server --directory {tmp_path}'.split(), str(port)]"
    script = (
        f"import sys; from caprl_utils.models import server; server.command = lambda model, port, *_: {line}; "
        "from caprl_utils.__main__ import main; main()"
    )
    command = [sys.executable, "-c", script, "serve", str(reader_folder), "--port", str(server.free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert line.startswith(f"{reader_folder} at http://127.0.0.1:") and "Ctrl-C stops it" in line
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_a_text_reader_keeps_its_tokenizer_in_vllm(tmp_path):
    """AutoTokenizer would split the words of a mini reader differently; see `server.tokenizer_folder`."""
    profile = load_profile("smoke")
    model, letters = profile.models.reward_reader, [" A", " B", " C", " D"]
    asked = prompts.read_question("The value of Rome is 42. The topic is sales.", "What is the value of Rome?",
                                  ["17", "42", "sales", "23"])  # fmt: skip
    requests = [Request("x", asked, None, prompts.ANSWER_PREFILL)]
    expected = open_backend(model, profile).choice_logprobs(requests, letters)
    with server.serve(model) as found:
        served = EndpointBackend(found.config).choice_logprobs(requests, letters)
    assert served[0] == pytest.approx(expected[0], abs=2e-3)
