"""Our client against others on one running vLLM server, side by side.

1. vLLM's own load generator (`vllm.benchmarks.serve`) with as many requests in flight: what a client can reach.
2. Our client, but sending a batch of 100 and waiting for all of it, as simple scripts do.

All send chats of the same output lengths (the model's own end is ignored), spread as captions are.
"""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import harness

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.endpoint import Client, Post, RequestError
from caprl_utils.models.server import Options, serve
from caprl_utils.schema import ModelConfig

VLLM_GOAL, BATCH_GOAL = 0.95, 1.0
IN_FLIGHT = BATCH = 100
COUNT = 600
SHORTEST, LONGEST = 8, 160  # output tokens; ours: a caption's length varies by half of its mean
_GENERATOR = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\nadd_cli_args(parser)\nmain(parser.parse_args())"
)
Chat = tuple[str, int]  # prompt, output tokens


def rows() -> list[dict[str, Any]]:
    """Output tokens per second of the three on one server. Raises UserError when the server does not start."""
    model = load_profile("mini").models.policy.model_copy(update={"path": "zoo:base"})
    with serve(model, options=Options(max_model_len=512)) as server:
        served = server.config
        ways = {"ours": partial(ours, served, COUNT), "vllm": partial(load_generator, served),
                "batches": partial(ours, served, BATCH)}  # fmt: skip
        ours(served, COUNT, chats(IN_FLIGHT, 0, -1))  # warm
        found = harness.side_by_side(ways, lambda turn, number: chats(COUNT, turn, number))
    compared = {"vllm": ("of vLLM's load generator", VLLM_GOAL),
                "batches": (f"against waiting for batches of {BATCH}", BATCH_GOAL)}  # fmt: skip
    return [
        harness.row(f"client, {what}", found["ours"], found[way], goal, "output tokens/s", COUNT * harness.ROUNDS)
        for way, (what, goal) in compared.items()
    ]


def chats(count: int, lengths_seed: int, prompts_seed: int) -> list[Chat]:
    """Chats with lengths drawn evenly. Other prompts for each call: the server's prefix cache must not answer."""
    lengths, words = random.Random(lengths_seed), random.Random(f"prompts {prompts_seed}")
    prompts = (" ".join(str(words.randint(10, 99)) for _ in range(4)) for _ in range(count))
    return [(f"What is the value of {prompt}", lengths.randint(SHORTEST, LONGEST)) for prompt in prompts]


def ours(served: ModelConfig, at_once: int, asked: Sequence[Chat]) -> float:
    """Tokens per second of this project's client; it gets `at_once` chats and waits for all before the next."""
    client, start, tokens = Client(served.base_urls, IN_FLIGHT), perf_counter(), 0
    fixed = {"model": served.path, "temperature": 0, "ignore_eos": True}
    bodies = [fixed | {"messages": [{"role": "user", "content": p}], "max_tokens": n} for p, n in asked]
    posts = [Post(None, body, lambda answer: answer["usage"]["completion_tokens"]) for body in bodies]
    for first in range(0, len(asked), at_once):
        for _, done in client.run(posts[first : first + at_once]):
            if isinstance(done, RequestError):
                raise UserError(f"a request of the bench failed: {done}")
            tokens += done
    return tokens / (perf_counter() - start)


def load_generator(served: ModelConfig, asked: Sequence[Chat]) -> float:
    """Tokens per second that `vllm.benchmarks.serve` reports for the same chats."""
    with TemporaryDirectory() as name:
        data, result = Path(name) / "chats.jsonl", Path(name) / "result.json"
        data.write_text("".join(json.dumps({"prompt": p, "output_tokens": n}) + "\n" for p, n in asked))
        subprocess.run(
            [
                sys.executable, "-c", _GENERATOR, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
                "--base-url", served.base_urls[0].removesuffix("/v1"), "--model", served.path,
                "--served-model-name", served.path, "--tokenizer", paths.resolve_model(served.path),
                "--dataset-name", "custom", "--dataset-path", str(data), "--custom-output-len", "-1",
                "--skip-chat-template", "--num-prompts", str(len(asked)), "--max-concurrency", str(IN_FLIGHT),
                "--ignore-eos", "--temperature", "0", "--disable-tqdm", "--save-result", "--result-dir", name,
                "--result-filename", result.name,
            ],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        found = json.loads(result.read_text())
    if found["completed"] != len(asked):
        raise UserError(f"vLLM's load generator finished {found['completed']} of {len(asked)} requests")
    return float(found["output_throughput"])
