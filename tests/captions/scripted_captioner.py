"""A captioner without a model, and small images to caption."""

import os
import time

import numpy as np
from PIL import Image

from caprl_utils.models.base import Completion

LOOP = "The sign says stop. " * 12


class Scripted:
    """Writes the request's id, the index and the seed. said: image id -> (text, reason) instead. log: a file that
    gets a line for each request, after `sec` seconds.
    """

    name, model_hash = "scripted", "f00"

    def __init__(self, broken=(), said=None, log=None, sec=0.0):
        self.broken, self.said, self.log, self.sec = set(broken), said or {}, log, sec
        self.asked = []

    def stream(self, requests, sampling):
        for request in requests:
            yield from (self._one(request, index) for index in range(sampling.n))

    def _one(self, request, index):
        self.asked.append(request.id)
        assert request.image.mode == "RGB" and request.seed is not None
        if self.log:
            time.sleep(self.sec)
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {request.id}#{index}\n")
        if request.id in self.broken:
            return Completion(request.id, index, None, 0, "error", "server said no")
        if request.id in self.said:
            return Completion(request.id, index, self.said[request.id][0], 7, self.said[request.id][1])
        return Completion(request.id, index, f" {request.id} {index} {request.seed} ", 5, "stop")


class Timed:
    """A model of the zoo that notes in a file when each caption was there: process, seconds."""

    def __init__(self, path, log):
        self.name, self.model_hash, self.log, self.backend = path, "t0", str(log), None

    def stream(self, requests, sampling):
        from caprl_utils.models.local import LocalBackend
        from caprl_utils.schema import ModelConfig

        self.backend = self.backend or LocalBackend(ModelConfig(path=self.name, batch_size=8))
        for completion in self.backend.stream(requests, sampling):
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {time.monotonic()}\n")
            yield completion


def picture(seed: int) -> Image.Image:
    """A small image, another one for each seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8))


def fill(folder, count):
    """`count` images p000.png, p001.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"p{number:03d}.png")
    return folder


def asked(log):
    """What a captioner with this log was asked, as IMAGE#INDEX."""
    return [line.split()[1] for line in log.read_text().splitlines()] if log.exists() else []
