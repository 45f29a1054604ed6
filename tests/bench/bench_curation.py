"""Memory and time of curation by the number of images, on synthetic answers.

    CAPRL_RUNS=EMPTY_FOLDER python tests/bench/bench_curation.py 10000    one size, in this process: seconds and memory

A writer and a filter model that answer at once stand in for the models, so what is measured is our own work:
requests, extraction, letters, verdicts and the rows on disk. Images are one blank picture; their checks are left out.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from tempfile import TemporaryDirectory
from typing import Any

import harness
from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.curation import pipeline
from caprl_utils.errors import UserError
from caprl_utils.images import ImageItem
from caprl_utils.models.base import Completion, Request, Sampling

QUESTIONS = 5  # of each image
SMALL, LARGE = 2_000, 200_000  # images: 10,000 and 1,000,000 questions
MEMORY_GOAL_GB = 1.0
LINEAR_GOAL = 0.8  # ours: time of a row at the smaller size by that at the larger; 1 is exactly linear
_TEXT = "\n".join(
    f"**{n}. Question {n}?**\nA) yes\nB) no\nC) maybe\nD) never\n**Answer:** A) yes" for n in range(1, QUESTIONS + 1)
)


class Scripted:
    """Writes the same five questions about every image; answers one right when it sees an image."""

    name = model_hash = "scripted"

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            place = request.prompt.find(") yes")
            answer = request.prompt[place - 1] if request.image else "unknown"
            yield Completion(request.id, 0, f" {answer}" if place > 0 else _TEXT, 99, "stop")


def measure_here(count: int) -> dict[str, float]:
    """CPU seconds and memory (GB) of write, extract, answer and filter over `count` images, in CAPRL_RUNS."""
    blank = Image.new("RGB", (56, 56))
    pipeline.open_images = lambda *_, **__: (ImageItem(f"i{n:08d}", lambda: blank) for n in range(count))
    pipeline.open_backend = lambda *_: Scripted()
    job = pipeline.open_job(load_profile("smoke"))
    checked = job.rows(pipeline.CHECKED)
    for item in pipeline.open_images():
        checked.append({"id": item.id, "reason": None})
    start = time.process_time()
    pipeline.write_questions(job)
    pipeline.extract_questions(job)
    pipeline.answer_questions(job)
    kept = pipeline.filter_questions(job)["values"]["questions_kept"]
    if kept != QUESTIONS * count:
        raise UserError(f"the filter kept {kept} of {QUESTIONS * count} sound questions")
    return {"seconds": time.process_time() - start, "peak_gb": harness.peak_gb()}


def measure(count: int) -> dict[str, float]:
    """`measure_here` in a process of its own, with its runs in a folder that is removed."""
    with TemporaryDirectory(prefix="caprl-bench-") as folder:
        environment = os.environ | {"CAPRL_RUNS": folder}
        command = [sys.executable, __file__, str(count)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the bench of {count} images failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows() -> list[dict[str, Any]]:
    """Memory at the larger size against 1 GB, and how linear the time is in the rows (questions)."""
    small, large = measure(SMALL), measure(LARGE)
    few, many = (1e6 * found["seconds"] / n / QUESTIONS for found, n in ((small, SMALL), (large, LARGE)))
    n, name = LARGE * QUESTIONS, "curation, CPU time of a row, most rows against fewest"
    return [
        harness.row("curation, peak memory", large["peak_gb"], MEMORY_GOAL_GB, 1.0, "GB", n, lower=True, target=True),
        harness.row(name, many, few, LINEAR_GOAL, "us/row", n, lower=True),
    ]  # fmt: skip


if __name__ == "__main__":
    if not os.environ.get("CAPRL_RUNS"):
        sys.exit("set CAPRL_RUNS to an empty folder: the made-up rows would stand among the real runs")
    print(json.dumps(measure_here(int(sys.argv[1]))))
