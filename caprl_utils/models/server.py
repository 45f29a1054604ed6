"""Start and stop a vLLM server for one model; it ends with this process however that ends.

On a machine without GPU the CPU build serves the small models. `caprl serve MODEL` does the same until Ctrl-C.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from caprl_utils import paths, processes
from caprl_utils.errors import UserError
from caprl_utils.models.base import GENERAL_TOKENIZERS, check_folder
from caprl_utils.models.endpoint import api_key
from caprl_utils.processes import visible_gpus
from caprl_utils.schema import ModelConfig

HOST = "127.0.0.1"
READY_SEC = float(os.environ.get("CAPRL_READY_SEC") or 900)  # a 72B model loads for minutes
_LINE_SEC = 10.0  # between progress lines
CPU_MEMORY_SHARE = 0.2  # on CPU this flag is a share of the machine's memory, and its default of 0.92 fails
WEIGHTS_SHARE = 0.6  # ours: of the GPUs' memory for a model's weights; the rest is for its prompts
_REMEDIES = {
    r"desired GPU memory utilization|No available memory for the cache|free memory on|MemoryError|out of memory":
        "there is too little free memory: stop other programs, or give fewer tokens (--max-model-len)",
    r"max_model_len|max model len": "the model takes fewer tokens: lower --max-model-len",
    r"RepositoryNotFound|Repository Not Found|offline mode|LocalEntryNotFound|couldn't connect":
        "the model is no folder here and the hub did not give it: check its name and the connection",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How vLLM is started. max_model_len: tokens, the model's own limit by default. gpus: that share the model, as few
    as hold it by default. copies: each on GPUs of its own. more: options of `vllm serve --help=all`, which win.
    """

    host: str = HOST
    max_model_len: int | None = None
    gpus: int | None = None
    copies: int = 1
    more: tuple[str, ...] = ()


class Server(NamedTuple):
    """A running server, and the model's config that reaches it."""

    url: str
    config: ModelConfig
    log: Path
    process: subprocess.Popen


@contextmanager
def serve(
    model: ModelConfig, port: int | None = None, options: Options = Options(), log: Path | None = None
) -> Iterator[Server]:
    """Run a vLLM server for `model` as long as the block lasts. Raises UserError for a missing model, too few GPUs, a
    port in use, or a server that does not come up (with its log).
    """
    folder = paths.resolve_model(model.path)
    check_folder(folder, model.path)
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed in this environment; run `make setup`, or `pip install vllm`")
    port = port or free_port()
    with socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET) as probe:
        try:
            probe.bind((options.host, port))
        except OSError as error:
            told = f"port {port} on {options.host} cannot be used ({error.strerror})"
            raise UserError(f"{told}; stop what listens there or choose another") from None
    log = log or paths.RUNS / "servers" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', model.path)}-{port}.log"
    line = command(model, port, options, tokenizer_folder(Path(folder), log.with_suffix(".tokenizer")))
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    if Path(folder).is_dir():
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if key := api_key(model):
        env["VLLM_API_KEY"] = key  # everybody can read a command line
    process = processes.popen(line, log, env, guarded=True)
    url = f"http://{HOST if options.host in ('0.0.0.0', '::') else options.host}:{port}/v1"
    try:
        _wait_until_ready(process, url, model.path, log)
        config = model.model_copy(update={"backend": "endpoint", "base_urls": [url]})
        yield Server(url, config, log, process)
    finally:
        processes.stop(process)


def serve_until_stopped(model: ModelConfig, port: int, options: Options) -> None:
    """Serve a model until Ctrl-C or SIGTERM. Raises UserError as `serve`, and when the server ends by itself."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, the server included
    try:
        with serve(model, port, options) as server:
            log = paths.shown(server.log)
            print(f"{model.path} at {server.url}, log in {log}; Ctrl-C stops it", flush=True)
            raise UserError(_why_ended(server.process.wait(), model.path, server.log))
    except KeyboardInterrupt:
        return


def command(model: ModelConfig, port: int, options: Options = Options(), tokenizer: Path | None = None) -> list[str]:
    """The server's command line, the same for both builds of vLLM. Raises UserError for more GPUs than are visible."""
    arguments = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", paths.resolve_model(model.path), "--served-model-name", model.path,
        "--host", options.host, "--port", str(port),
        "--generation-config", "vllm",  # the model's own sampling defaults stay out
        "--seed", "0",
    ]  # fmt: skip
    there = len(visible_gpus())
    dtype = "float32" if model.dtype == "auto" and not there else model.dtype
    given = {"--max-model-len": options.max_model_len, "--revision": model.revision, "--tokenizer": tokenizer,
             "--dtype": dtype}  # fmt: skip
    if there:
        each = options.gpus or gpus_of(model, there // options.copies)
        if each * options.copies > there and not options.more:
            asked = f"{model.path}: {options.copies} x {each} GPUs are asked for"
            raise UserError(f"{asked}, {there} can be seen here (CUDA_VISIBLE_DEVICES)")
        given |= {"--tensor-parallel-size": each, "--data-parallel-size": options.copies}
    else:
        given["--gpu-memory-utilization"] = CPU_MEMORY_SHARE
        # on a CPU a prompt that is split over two steps ends the engine when its request has a seed, as ours have
        # ("CPU Generator does not use offset", vLLM 0.31)
        arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
    for name, value in given.items():
        arguments += [] if value is None else [name, str(value)]
    return [*arguments, *options.more]


def gpus_of(model: ModelConfig, most: int) -> int:
    """The least power of two of GPUs (up to `most`) of which the weights take WEIGHTS_SHARE; of a hub's model 2 bytes
    for each of the parameters that its name tells ("-72B-").
    """
    folder = Path(paths.resolve_model(model.path))
    weights = float(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    if not weights and (told := re.search(r"(\d+(?:\.\d+)?)B(?![a-z])", model.path, re.IGNORECASE)):
        weights = 2e9 * float(told[1])
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()
    memory = float(found[0]) * 2**20 if found and found[0].isdigit() else 80e9
    gpus = 1
    while 2 * gpus <= most and weights > WEIGHTS_SHARE * memory * gpus:
        gpus *= 2
    return gpus


def tokenizer_folder(model: Path, target: Path) -> Path | None:
    """A copy of a text model's tokenizer that vLLM's AutoTokenizer takes as it is, having no config beside it; None
    where the model's own folder will do (see `base.GENERAL_TOKENIZERS`).
    """
    files = (model / "config.json", model / "tokenizer_config.json")
    if not all(file.is_file() for file in files):
        return None
    config, tokenizer = (json.loads(file.read_text()) for file in files)
    if "vision_config" in config or tokenizer.get("tokenizer_class") not in GENERAL_TOKENIZERS:
        return None
    target.mkdir(parents=True, exist_ok=True)
    for file in (*model.glob("*token*.json"), *model.glob("chat_template.*")):
        shutil.copy(file, target)
    (target / "config.json").write_text("{}")
    return target


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _wait_until_ready(process: subprocess.Popen, url: str, name: str, log: Path) -> None:
    start, told = time.monotonic(), 0.0
    while True:
        with suppress(OSError), urlopen(url.removesuffix("/v1") + "/health", timeout=5.0):
            break
        waited = time.monotonic() - start
        if process.poll() is not None:
            raise UserError(_why_ended(process.returncode, name, log))
        if waited > READY_SEC:
            late = f"the server for {name} was not ready after {READY_SEC:.0f} s (CAPRL_READY_SEC gives it more)"
            raise UserError(f"{late}; the end of {paths.shown(log)}:\n{processes.tail(log)}")
        if waited >= told + _LINE_SEC:
            print(f"starting {name}: {waited:.0f} s, log in {paths.shown(log)}", file=sys.stderr, flush=True)
            told = waited
        time.sleep(1.0)
    print(f"{name} is served at {url} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _why_ended(status: int, name: str, log: Path) -> str:
    """What a user reads when the server is gone: status, the likely cause, and the end of its log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    errors = "\n".join(line for line in text.splitlines() if re.search(r"Error|ERROR|error:|Illegal", line))
    causes = [remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, errors)]
    likely = f" Likely: {causes[0]}." if causes else ""
    ended = f"the server for {name} ended with status {status}.{likely}"
    return f"{ended} The end of {paths.shown(log)}:\n{processes.tail(log)}"
