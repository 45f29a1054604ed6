"""Runs one Prism and one VQA evaluation with scripted models, for the tests that kill it.

CHUNK: questions and images per call. PAUSE_SEC: of the models before each call. FAIL_SHARE: of their calls that give
no answer for a request, drawn with FAIL_SEED.
"""

import math
import os
import random
import sys
import time

from PIL import Image

from caprl_utils import prompts
from caprl_utils.captions import rows
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.base import Completion
from caprl_utils.prism import answers
from caprl_utils.prism.evaluate import evaluate, evaluate_vqa
from caprl_utils.records import Sample

COLOURS = ["red", "blue", "green", "white"]
CHUNK = int(os.environ["CHUNK"])
PAUSE_SEC = float(os.environ.get("PAUSE_SEC", 0.02))
FAIL_SHARE = float(os.environ.get("FAIL_SHARE", 0))
failures = random.Random(os.environ.get("FAIL_SEED"))


class Model:
    """Captions, reads and looks; what it draws hangs on the call's seed and on what else is in the batch."""

    name, model_hash = "scripted", "s0"

    def generate(self, requests, sampling, progress=None):
        time.sleep(PAUSE_SEC)
        rng = random.Random(f"{sampling.seed}/{[r.id for r in requests]}")
        return [self._one(r, i, rng) for r in requests for i in range(sampling.n)]

    def _one(self, request, index, rng):
        right = COLOURS[request.image.getpixel((0, 0))[0] % 4] if request.image else rng.choice(COLOURS)
        colour = right if rng.random() < 0.7 else rng.choice(COLOURS)
        text = f"The colour is {colour}." if request.prompt == prompts.CAPTION else colour
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


def sample(number, benchmark, options):
    image, right = Image.new("RGB", (4, 4), (number, 0, 0)), COLOURS[number % 4]
    return Sample(
        id=f"s{number}", benchmark=benchmark, images=(lambda: image,), question="What is the colour?",
        options=tuple(options), gold=prompts.LETTERS[COLOURS.index(right)] if options else right,
        meta={"image_id": f"i{number}"},
    )  # fmt: skip


def main():
    answers.CHUNK_QUESTIONS = CHUNK
    rows._chunks.__defaults__ = (CHUNK,)
    profile = load_profile("smoke")
    samples = [sample(n, "mini-scene", COLOURS) for n in range(40)]
    samples += [sample(n, "mini-document", []) for n in range(40)]
    evaluate(profile, "m", Model(), Model(), samples)
    evaluate_vqa(profile, "m", Model(), samples)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
