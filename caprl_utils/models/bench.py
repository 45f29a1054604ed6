"""Our client against others on one running vLLM server, side by side, for `make bench`.

1. vLLM's own load generator (`vllm.benchmarks.serve`) with as many requests in flight: what a client can reach.
2. A client that sends a batch of 100 and waits for all of it, as simple scripts do.

All send chats of the same output lengths (the model's own end is ignored), spread as captions are.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from caprl_utils import paths, processes
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.client import Client, Limits, Post, RequestError
from caprl_utils.models.endpoint import CHAT
from caprl_utils.models.server import serve
from caprl_utils.schema import ModelConfig

VLLM_GOAL, BATCH_GOAL = 0.95, 1.25
IN_FLIGHT = BATCH = 100
SHORTEST, LONGEST = 8, 160  # output tokens; ours: a caption's length varies by half of its mean
REPEATS = 3
MODEL = "zoo:vlm-3b"
_GENERATOR = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\nadd_cli_args(parser)\nmain(parser.parse_args())"
)


@dataclass(frozen=True)
class Chat:
    """One request of the bench."""

    prompt: str
    output_tokens: int


def chats(count: int, lengths_seed: int, prompts_seed: int) -> list[Chat]:
    """Chats with lengths drawn evenly. Other prompts for each client: the server's prefix cache must not answer."""
    lengths, words = random.Random(lengths_seed), random.Random(f"prompts {prompts_seed}")
    return [
        Chat(" ".join(["What is the value of", *(str(words.randint(10, 99)) for _ in range(4))]),
             lengths.randint(SHORTEST, LONGEST))
        for _ in range(count)
    ]  # fmt: skip


def bench_client(count: int = 600, repeats: int = REPEATS, model: str = MODEL) -> list[dict[str, Any]]:
    """Output tokens per second of the three clients on one server; the median of `repeats` rounds in turn.

    Raises UserError when the model is missing or the server does not start.
    """
    config = load_profile("mini").models.policy.model_copy(update={"path": model, "batch_size": IN_FLIGHT})
    with serve(config, max_model_len=512) as server:
        return compare(server.config, count, repeats)


def compare(served: ModelConfig, count: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of `bench_client` on a server that runs."""
    ways: dict[str, Callable[[Sequence[Chat]], float]] = {
        "ours": lambda asked: ours(served, asked),
        "vllm": lambda asked: load_generator(served, asked),
        "batches": lambda asked: batches(served, asked),
    }
    ours(served, chats(IN_FLIGHT, 0, -1))  # warm
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for number, (name, way) in enumerate(ways.items()):
            found[name].append(way(chats(count, repeat, repeat * len(ways) + number)))
    rates = {name: statistics.median(values) for name, values in found.items()}
    goals = {"vllm": ("client, of vLLM's load generator", VLLM_GOAL),
             "batches": (f"client, against waiting for batches of {BATCH}", BATCH_GOAL)}  # fmt: skip
    return [
        {
            "name": name, "ours": rates["ours"], "baseline": rates[key], "ratio": rates["ours"] / rates[key],
            "goal": goal, "unit": "output tokens/s", "n": count * repeats, "in_flight": IN_FLIGHT,
            "all": {"ours": found["ours"], "baseline": found[key]},
        }
        for key, (name, goal) in goals.items()
    ]  # fmt: skip


def ours(served: ModelConfig, asked: Sequence[Chat]) -> float:
    """Tokens per second of this project's client, kept full."""
    return _timed(served, [asked])


def batches(served: ModelConfig, asked: Sequence[Chat]) -> float:
    """The same client, but each batch of 100 waits for all of the one before."""
    return _timed(served, [asked[i : i + BATCH] for i in range(0, len(asked), BATCH)])


def _client(served: ModelConfig) -> Client:
    return Client(served.base_urls, {}, Limits(in_flight=IN_FLIGHT))


def _timed(served: ModelConfig, parts: Sequence[Sequence[Chat]]) -> float:
    client, start, tokens = _client(served), perf_counter(), 0
    for part in parts:
        bodies = (
            {
                "model": served.path, "messages": [{"role": "user", "content": chat.prompt}],
                "max_tokens": chat.output_tokens, "temperature": 0, "ignore_eos": True,
            }
            for chat in part
        )  # fmt: skip
        for done in client.run(bodies, _tokens):
            if isinstance(done, RequestError):
                raise UserError(f"a request of the bench failed: {done}")
            tokens += done
    return tokens / (perf_counter() - start)


async def _tokens(post: Post, body: dict[str, Any]) -> int | RequestError:
    try:
        return await post(CHAT, body, lambda answer: int(answer["usage"]["completion_tokens"]))
    except RequestError as error:
        return error


def load_generator(served: ModelConfig, asked: Sequence[Chat]) -> float:
    """Tokens per second that `vllm.benchmarks.serve` reports for the same chats."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"prompt": chat.prompt, "output_tokens": chat.output_tokens} for chat in asked]
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        url = served.base_urls[0].removesuffix("/v1")
        processes.run(
            [
                sys.executable, "-c", _GENERATOR, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
                "--base-url", url, "--model", served.path, "--served-model-name", served.path,
                "--tokenizer", paths.resolve_model(served.path), "--dataset-name", "custom",
                "--dataset-path", str(folder / "chats.jsonl"), "--custom-output-len", "-1", "--skip-chat-template",
                "--num-prompts", str(len(asked)), "--max-concurrency", str(IN_FLIGHT), "--ignore-eos",
                "--temperature", "0", "--disable-tqdm", "--save-result", "--result-dir", name,
                "--result-filename", "result.json",
            ],
            folder / "log",
        )  # fmt: skip
        result = json.loads((folder / "result.json").read_text())
    if result["completed"] != len(asked):
        raise UserError(f"vLLM's load generator finished {result['completed']} of {len(asked)} requests")
    return float(result["output_throughput"])
