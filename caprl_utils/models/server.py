"""Start and stop a vLLM server for one model.

    with serve(profile.models.policy) as server:
        backend = EndpointBackend(server.config)

It listens on 127.0.0.1 at a free port, logs to a file, and ends with this process however that ends. On a
machine without GPU the CPU build serves the small models. `caprl serve MODEL` does the same until Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

from caprl_utils import paths, processes
from caprl_utils.errors import UserError
from caprl_utils.models.endpoint import api_key
from caprl_utils.models.weights import check_folder, misread_tokenizer
from caprl_utils.provenance import gpu_names
from caprl_utils.schema import ModelConfig

HOST = "127.0.0.1"
READY_SEC = float(os.environ.get("CAPRL_READY_SEC") or 900)  # a 72B model loads for minutes
_POLL_SEC = 1.0
_LINE_SEC = 10.0  # between progress lines
CPU_MEMORY_SHARE = 0.2  # on CPU this flag is a share of the machine's memory, and its default of 0.92 fails


@dataclass(frozen=True)
class Server:
    """A running server: where it is, and the model's config that reaches it."""

    url: str
    config: ModelConfig
    log: Path
    process: subprocess.Popen


@contextmanager
def serve(
    model: ModelConfig, port: int | None = None, max_model_len: int | None = None, log: Path | None = None,
    gpus: int = 1,
) -> Iterator[Server]:  # fmt: skip
    """Run a vLLM server for `model` as long as the block lasts.

    port: a free one by default. max_model_len: tokens of prompt and completion; the model's own limit by
    default. gpus: that share the model. Raises UserError for a missing model, a port in use, or a server
    that does not come up, with the end of its log.
    """
    folder = paths.resolve_model(model.path)
    check_folder(folder, model.path)
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed in this environment; run `make setup`, or `pip install vllm`")
    port = port or free_port()
    check_port(port)
    log = log or paths.RUNS / "servers" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', model.path)}-{port}.log"
    tokenizer = tokenizer_folder(Path(folder), log.with_suffix(".tokenizer"))
    line = command(model, port, max_model_len, tokenizer, gpus)
    process = processes.popen(line, log, environment(model), guarded=True)
    url = f"http://{HOST}:{port}/v1"
    try:
        _wait_until_ready(process, url, model.path, log)
        served = model.model_dump() | {"backend": "endpoint", "base_urls": [url]}
        yield Server(url, ModelConfig(**served), log, process)
    finally:
        processes.stop(process)


def serve_until_stopped(model: ModelConfig, port: int, max_model_len: int | None) -> None:
    """Serve a model until Ctrl-C or SIGTERM. Raises UserError as `serve`, and when the server ends by itself."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, the server included
    try:
        with serve(model, port, max_model_len) as server:
            log = paths.shown(server.log)
            print(f"{model.path} at {server.url}, log in {log}; Ctrl-C stops it", flush=True)
            raise UserError(_why_ended(server.process.wait(), model.path, server.log))
    except KeyboardInterrupt:
        return


def command(
    model: ModelConfig,
    port: int,
    max_model_len: int | None = None,
    tokenizer: Path | None = None,
    gpus: int = 1,
) -> list[str]:
    """The command line of the server. vLLM's own program is run as a module: it works with both builds."""
    arguments = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", paths.resolve_model(model.path), "--served-model-name", model.path,
        "--host", HOST, "--port", str(port),
        "--generation-config", "vllm",  # the model's own sampling defaults stay out
        "--seed", "0",
    ]  # fmt: skip
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    if model.revision is not None:
        arguments += ["--revision", model.revision]
    if tokenizer is not None:
        arguments += ["--tokenizer", str(tokenizer)]
    if model.max_pixels is not None:
        arguments += ["--mm-processor-kwargs", json.dumps({"max_pixels": model.max_pixels})]
    if gpu_names():
        arguments += ["--tensor-parallel-size", str(gpus)] if gpus > 1 else []
        return [*arguments, "--dtype", model.dtype, "--max-num-seqs", str(model.batch_size)]
    dtype = "float32" if model.dtype == "auto" else model.dtype
    return [
        *arguments, "--dtype", dtype, "--enforce-eager",
        "--gpu-memory-utilization", str(CPU_MEMORY_SHARE),
        # on a CPU a prompt that is split over two steps ends the engine when its request has a seed, as ours have
        # ("CPU Generator does not use offset", vLLM 0.31)
        "--no-enable-chunked-prefill",
    ]  # fmt: skip


def tokenizer_folder(model: Path, target: Path) -> Path | None:
    """A copy of a model's tokenizer that vLLM loads as it is, or None where the model's own folder will do.

    vLLM asks AutoTokenizer (see `weights.GENERAL_TOKENIZERS`), which takes the class that the tokenizer names when
    the config beside it says nothing.
    """
    if not misread_tokenizer(model):
        return None
    target.mkdir(parents=True, exist_ok=True)
    for file in (*model.glob("*token*.json"), *model.glob("chat_template.*")):
        shutil.copy(file, target)
    (target / "config.json").write_text("{}")
    return target


def environment(model: ModelConfig) -> dict[str, str]:
    """Variables for the server's process: no telemetry, no hub for a local model, the API key if any."""
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    if Path(paths.resolve_model(model.path)).is_dir():
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if key := api_key(model):
        env["VLLM_API_KEY"] = key  # everybody can read a command line
    return env


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Raises UserError when somebody listens on the port already."""
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            raise UserError(
                f"port {port} on {HOST} is in use; stop what listens there or choose another"
            ) from None


def _wait_until_ready(process: subprocess.Popen, url: str, name: str, log: Path) -> None:
    start = time.monotonic()
    next_line = start + _LINE_SEC
    while not _healthy(url):
        waited = time.monotonic() - start
        if process.poll() is not None:
            raise UserError(_why_ended(process.returncode, name, log))
        if waited > READY_SEC:
            raise UserError(
                f"the server for {name} was not ready after {READY_SEC:.0f} s (CAPRL_READY_SEC gives it more); the "
                f"end of {paths.shown(log)}:\n{processes.tail(log)}"
            )
        if time.monotonic() >= next_line:
            print(f"starting {name}: {waited:.0f} s, log in {paths.shown(log)}", file=sys.stderr, flush=True)
            next_line += _LINE_SEC
        time.sleep(_POLL_SEC)
    seconds = time.monotonic() - start
    print(f"{name} is served at {url} after {seconds:.0f} s", file=sys.stderr, flush=True)


def _healthy(url: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(url.removesuffix("/v1") + "/health", timeout=5.0) as answer:
            return answer.status == 200
    except OSError:  # not up yet
        return False


_REMEDIES = {
    r"desired GPU memory utilization|No available memory for the cache|free memory on|MemoryError|out of memory": (
        "there is too little free memory: stop other programs, or give fewer tokens (--max-model-len)"
    ),
    r"max_model_len|max model len": "the model takes fewer tokens: lower --max-model-len",
    r"not recognize this architecture|architectures .* (?:are|is) not supported": (
        "this vLLM does not know the model's architecture"
    ),
    r"RepositoryNotFound|Repository Not Found|offline mode|LocalEntryNotFound|couldn't connect": (
        "the model is no folder here and the hub did not give it: check its name and the connection"
    ),
    r"Illegal instruction|SIGILL": "this processor lacks instructions that this build of vLLM uses",
}


def _why_ended(status: int, name: str, log: Path) -> str:
    """What a user reads when the server is gone: status, the likely cause, and the end of its log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    errors = "\n".join(line for line in text.splitlines() if re.search(r"Error|ERROR|error:|Illegal", line))
    causes = [remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, errors)]
    likely = f" Likely: {causes[0]}." if causes else ""
    return (
        f"the server for {name} ended with status {status}.{likely} The end of {paths.shown(log)}:\n"
        f"{processes.tail(log)}"
    )
