"""Memory and time of curation by the number of images, on synthetic answers, for `make bench`.

    CAPRL_RUNS=EMPTY_FOLDER python -m caprl_utils.curation.bench 10000    one size, in this process: seconds and memory

A writer and a filter model that answer at once stand in for the models, so what is measured is our own work:
requests, extraction, letters, verdicts and the rows on disk. Images are one blank picture; their checks are left out.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.curation import pipeline
from caprl_utils.curation.images import ImageItem
from caprl_utils.errors import UserError
from caprl_utils.models import Completion, Request, Sampling
from caprl_utils.records import CheckedImage

QUESTIONS = 5  # of each image
SIZES = (2_000, 20_000, 200_000)  # images: 10,000, 100,000 and 1,000,000 questions
MEMORY_GOAL_GB = 1.0
LINEAR_GOAL = 0.8  # ours: time of a row at the smallest size by that at the largest; 1 is exactly linear
_TEXT = "\n".join(
    f"**{n}. Question {n}?**\nA) yes\nB) no\nC) maybe\nD) never\n**Answer:** A) yes"
    for n in range(1, QUESTIONS + 1)
)


class Writer:
    """Writes the same five questions about every image."""

    name = model_hash = "writer"

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Backend.stream`."""
        for request in requests:
            yield Completion(request.id, 0, _TEXT, 99, "stop")


class Reader:
    """Knows the answer when it sees an image."""

    name = model_hash = "reader"

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Backend.stream`."""
        for request in requests:
            place = request.prompt.find(") yes")
            letter = request.prompt[place - 1] if place > 0 else "yes"
            answer = "unknown" if request.image is None else letter
            yield Completion(request.id, 0, f" {answer}", 2, "stop")


def measure_here(count: int) -> dict[str, float]:
    """CPU seconds and memory (GB) of write, extract, answer and filter over `count` images, in CAPRL_RUNS."""
    blank = Image.new("RGB", (56, 56))

    def images(*_: Any) -> Iterator[ImageItem]:
        return (ImageItem(f"image-{i:08d}", blank, data=b"png") for i in range(count))

    pipeline.open_images = images
    pipeline.open_backend = lambda model, _: Writer() if model.path == "writer" else Reader()
    job = pipeline.open_job(load_profile("smoke", {"models.question_writer.path": "writer"}))
    checked = job.rows(pipeline.CHECKED)
    for item in images():
        checked.append(CheckedImage(id=item.id, kind=None, width=56, height=56, phash=None, reason=None))
    start, before = time.process_time(), _peak_gb()
    pipeline.write_questions(job)
    pipeline.extract_questions(job)
    pipeline.answer_questions(job)
    values = pipeline.filter_questions(job)["values"]
    if values["questions_kept"] != QUESTIONS * count:
        raise UserError(f"the filter kept {values['questions_kept']} of {QUESTIONS * count} sound questions")
    return {"seconds": time.process_time() - start, "before_gb": before, "peak_gb": _peak_gb()}


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(count: int) -> dict[str, float]:
    """`measure_here` in a process of its own, with its runs in a folder that is removed."""
    with TemporaryDirectory(prefix="caprl-bench-") as folder:
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(count)], env=os.environ | {"CAPRL_RUNS": folder},
            capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise UserError(f"the bench of {count} images failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bench_scale(sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """Memory at the largest size against 1 GB, and how linear the time is in the rows (questions)."""
    found = {count: measure(count) for count in sizes}
    small, large = min(sizes), max(sizes)
    each = {count: figures["seconds"] / count / QUESTIONS for count, figures in found.items()}
    rows, detail = large * QUESTIONS, {str(count * QUESTIONS): figures for count, figures in found.items()}
    return [
        {
            "name": "curation, peak memory", "ours": found[large]["peak_gb"], "baseline": MEMORY_GOAL_GB,
            "ratio": MEMORY_GOAL_GB / found[large]["peak_gb"], "goal": 1.0, "unit": "GB", "n": rows, "all": detail,
        },
        {
            "name": "curation, CPU time of a row, most rows against fewest", "ours": 1e6 * each[large],
            "baseline": 1e6 * each[small], "ratio": each[small] / each[large], "goal": LINEAR_GOAL,
            "unit": "us/row", "n": rows,
        },
    ]  # fmt: skip


if __name__ == "__main__":
    if not os.environ.get("CAPRL_RUNS"):
        sys.exit("set CAPRL_RUNS to an empty folder: the made-up rows would stand among the real runs")
    print(json.dumps(measure_here(int(sys.argv[1]))))
