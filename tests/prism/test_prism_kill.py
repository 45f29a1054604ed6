"""Prism and direct VQA survive `kill -9` at any moment and a server that fails: the scores stay the same.

Run as a script, this file is the process that is killed.
"""

import json
import math
import os
import random
import subprocess
import sys
import time

import pytest

from caprl_utils import paths, prompts
from caprl_utils.config import load_profile
from caprl_utils.models.base import Completion
from caprl_utils.prism import evaluate as prism
from caprl_utils.prism.evaluate import evaluate, evaluate_vqa
from caprl_utils.prism.scores import read_samples
from tests.prism.test_prism import COLOURS, make_sample

CHUNK = 8  # questions a call: many places to be killed at
KILLED_AT = (30, 250, 360)  # rows: of 160 captions, 160 answers from them, 80 from images


class Model:
    """Captions, reads and looks, with a pause before each call; what it answers hangs on the call's seed and on what
    else is in the batch, what it captions on the request's own seed. fails: share of requests without an answer.
    calls: it is interrupted after so many.
    """

    name, model_hash = "scripted", "s0"

    def __init__(self, pause_sec=0.0, fails=0.0, calls=math.inf):
        self.pause_sec, self.fails, self.calls, self.failures = pause_sec, fails, calls, random.Random(0)

    def _pause(self):
        time.sleep(self.pause_sec)
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt

    def generate(self, requests, sampling, progress=None):
        self._pause()
        rng = random.Random(f"{sampling.seed}/{[r.id for r in requests]}")
        return [self._one(r, i, rng) for r in requests for i in range(sampling.n)]

    def stream(self, requests, sampling):
        for request in requests:
            self._pause()
            rng = random.Random(f"{request.seed}/{request.id}")
            yield from [self._one(request, index, rng) for index in range(sampling.n)]

    def _one(self, request, index, rng):
        right = COLOURS[request.image.getpixel((0, 0))[0] % 4] if request.image else rng.choice(COLOURS)
        colour = right if rng.random() < 0.7 else rng.choice(COLOURS)
        text = f"The sky is {colour}." if request.prompt == prompts.CAPTION else colour
        if self.failures.random() < self.fails:
            return Completion(request.id, index, None, 0, "error", "connection lost")
        return Completion(request.id, index, text, 5, "stop")

    def choice_logprobs(self, requests, choices, progress=None):
        self._pause()
        return [None if self.failures.random() < self.fails else self._read(r, len(choices)) for r in requests]

    def _read(self, request, count):
        options = [line[3:] for line in request.prompt.splitlines()[-count:]]
        caption = request.prompt.partition("\nQuestion:")[0]
        return [math.log(0.9 if option in caption else 0.02 + 0.001 * i) for i, option in enumerate(options)]


def work(model):
    """Both evaluations to their end; what they come to."""
    profile, samples = load_profile("smoke"), [make_sample(n) for n in range(40)]
    samples += [make_sample(n, "mini-document", options=False) for n in range(40)]
    records = evaluate(profile, "m", model, model, samples), evaluate_vqa(profile, "m", model, samples)
    kept = [{key: record[key] for key in ("values", "intervals", "n", "unparsed", "key")} for record in records]
    return json.dumps(kept), [read_samples(paths.RUNS / "smoke" / stage / "m") for stage in ("prism", "vqa")]


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """What an evaluation comes to that nothing disturbs, made in a folder of its own."""
    monkeypatch.setattr(prism, "CHUNK_QUESTIONS", CHUNK)
    with monkeypatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path / "whole")
        return work(Model())


def test_a_reader_that_fails_now_and_then_changes_nothing(whole):
    """What fails is asked again."""
    assert work(Model(fails=0.03)) == whole


@pytest.mark.parametrize("calls", [50, 100])
def test_what_is_interrupted_goes_on(calls, whole):
    with pytest.raises(KeyboardInterrupt):
        work(Model(calls=calls))
    assert work(Model()) == whole


@pytest.mark.integration
def test_killed_again_and_again(runs_folder, whole):
    for stop_at in KILLED_AT:
        process = subprocess.Popen([sys.executable, __file__], env=os.environ | {"PYTHONPATH": str(paths.ROOT)})
        rows = -1
        while process.poll() is None and rows < stop_at:
            rows = sum(len(file.read_bytes().splitlines()) for file in runs_folder.rglob("*.jsonl"))
            time.sleep(0.01)
        assert process.poll() is None, f"it ended with {process.returncode} before it had {stop_at} rows"
        process.kill()  # SIGKILL
        process.wait()
    assert work(Model()) == whole


if __name__ == "__main__":
    prism.CHUNK_QUESTIONS = CHUNK
    work(Model(pause_sec=0.05))
