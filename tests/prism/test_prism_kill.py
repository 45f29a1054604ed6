"""Prism and direct VQA survive `kill -9` at any moment and a server that fails: the scores stay the same.

Run as a script, this file is the process that is killed. PAUSE_SEC: of the models before each call. FAIL_SHARE: of
their calls that give no answer for a request, drawn with FAIL_SEED.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caprl_utils import paths, prompts
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.base import Completion
from caprl_utils.prism import evaluate as prism
from caprl_utils.prism.evaluate import evaluate, evaluate_vqa
from caprl_utils.prism.scores import read_samples
from tests.prism.test_prism import COLOURS, make_sample

CHUNK = 8  # questions per call, images per pause: many places to be killed at
PAUSE_SEC = float(os.environ.get("PAUSE_SEC", 0.02))
FAIL_SHARE = float(os.environ.get("FAIL_SHARE", 0))
failures = random.Random(os.environ.get("FAIL_SEED"))
pytestmark = pytest.mark.integration


class Model:
    """Captions, reads and looks; what it answers hangs on the call's seed and on what else is in the batch, what it
    captions on the request's own seed.
    """

    name, model_hash = "scripted", "s0"

    def generate(self, requests, sampling, progress=None):
        time.sleep(PAUSE_SEC)
        rng = random.Random(f"{sampling.seed}/{[r.id for r in requests]}")
        return [self._one(r, i, rng) for r in requests for i in range(sampling.n)]

    def stream(self, requests, sampling):
        for number, request in enumerate(requests):
            if number % CHUNK == 0:
                time.sleep(PAUSE_SEC)
            rng = random.Random(f"{request.seed}/{request.id}")
            yield from [self._one(request, index, rng) for index in range(sampling.n)]

    def _one(self, request, index, rng):
        right = COLOURS[request.image.getpixel((0, 0))[0] % 4] if request.image else rng.choice(COLOURS)
        colour = right if rng.random() < 0.7 else rng.choice(COLOURS)
        text = f"The sky is {colour}." if request.prompt == prompts.CAPTION else colour
        if failures.random() < FAIL_SHARE:
            return Completion(request.id, index, None, 0, "error", "connection lost")
        return Completion(request.id, index, text, 5, "stop")

    def choice_logprobs(self, requests, choices, progress=None):
        time.sleep(PAUSE_SEC)
        return [None if failures.random() < FAIL_SHARE else self._read(r, len(choices)) for r in requests]

    def _read(self, request, count):
        options = [line[3:] for line in request.prompt.splitlines()[-count:]]
        caption = request.prompt.partition("\nQuestion:")[0]
        return [math.log(0.9 if option in caption else 0.02 + 0.001 * i) for i, option in enumerate(options)]


def start(runs: Path, **env: str) -> subprocess.Popen:
    environment = os.environ | {"CAPRL_RUNS": str(runs), "PYTHONPATH": str(paths.ROOT)} | env
    command, off = [sys.executable, __file__], subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=off, stderr=subprocess.PIPE, text=True)


def results(runs: Path) -> dict:
    found = {}
    for folder in (runs / "smoke" / "prism" / "m", runs / "smoke" / "vqa" / "m"):
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        kept = {key: record[key] for key in ("values", "intervals", "n", "unparsed", "key")}
        found[folder.parent.name] = kept, read_samples(folder)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = tmp_path_factory.mktemp("whole")
    process = start(runs, PAUSE_SEC="0")
    assert process.wait(timeout=280) == 0, process.stderr.read()
    return results(runs)


def num_rows(runs: Path) -> int:
    return sum(len(file.read_bytes().splitlines()) for file in runs.rglob("*.jsonl"))


def test_killed_again_and_again(tmp_path, whole):
    rng, kills = random.Random(0), 0
    for _ in range(12):
        process, stop_at = start(tmp_path), num_rows(tmp_path) + rng.randrange(10, 90)
        while process.poll() is None and num_rows(tmp_path) < stop_at:
            time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            break
        process.kill()  # SIGKILL
        process.wait()
        kills += 1
    assert process.wait(timeout=280) == 0, process.stderr.read()
    assert kills >= 2 and results(tmp_path) == whole


def test_a_reader_that_fails_now_and_then_changes_nothing(tmp_path, whole):
    """What fails is asked again."""
    process = start(tmp_path, PAUSE_SEC="0", FAIL_SHARE="0.03", FAIL_SEED="0")
    _, message = process.communicate(timeout=280)
    assert process.returncode == 0, message
    assert results(tmp_path) == whole


def work():
    prism.CHUNK_QUESTIONS = CHUNK
    profile, samples = load_profile("smoke"), [make_sample(n) for n in range(40)]
    samples += [make_sample(n, "mini-document", options=False) for n in range(40)]
    evaluate(profile, "m", Model(), Model(), samples)
    evaluate_vqa(profile, "m", Model(), samples)


if __name__ == "__main__":
    try:
        work()
    except UserError as error:
        sys.exit(f"error: {error}")
