"""A captioner without a model, and small images to caption."""

from __future__ import annotations

import numpy as np
from PIL import Image

from caprl_utils.models.base import Completion

LOOP = "The sign says stop. " * 12


class Scripted:
    """Writes the request's id and the seed. bad: row or image id -> texts of its attempts, by turn."""

    name, model_hash = "scripted", "f00"

    def __init__(self, broken=(), bad=None, die_after=None):
        self.broken, self.bad, self.asked, self.die_after = set(broken), bad or {}, [], die_after

    def generate(self, requests, sampling, progress=None):
        return [self._one(r, i, sampling) for r in requests for i in range(sampling.n)]

    def stream(self, requests, sampling):
        for request in requests:
            if self.die_after is not None and len(self.asked) >= self.die_after:
                raise KeyboardInterrupt
            yield from (self._one(request, index, sampling) for index in range(sampling.n))

    def _one(self, request, index, sampling):
        self.asked.append(request.id)
        assert request.image.mode == "RGB"
        name = request.id.partition("#")[0]
        if name in self.broken:
            return Completion(request.id, index, None, 0, "error", "server said no")
        if self.bad.get(name):
            text, reason = self.bad[name].pop(0)
            return Completion(request.id, index, text, 7, reason)
        return Completion(request.id, index, f" {request.id} {index} {sampling.seed} ", 5, "stop")


def picture(seed: int) -> Image.Image:
    """A small image, another one for each seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8))


def fill(folder, count):
    """`count` images p000.png, p001.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"p{number:03d}.png")
    return folder
