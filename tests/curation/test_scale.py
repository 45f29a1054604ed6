"""Time is linear in the rows, and memory grows by the ids alone: a million images fit in one gigabyte."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys, time
from PIL import Image
from caprl_utils.backends import Completion
from caprl_utils.config import load_profile
from caprl_utils.curation import pipeline
from caprl_utils.curation.images import ImageItem
from caprl_utils.records import CheckedImage

count = int(sys.argv[1])
TEXT = "\\n".join(
    f"**{n}. Question {n}?**\\nA) yes\\nB) no\\nC) maybe\\nD) never\\n**Answer:** A) yes" for n in range(1, 6)
)

class Writer:
    name = model_hash = "writer"
    def stream(self, requests, sampling):
        for request in requests:
            yield Completion(request.id, 0, TEXT, 99, "stop")

class Reader:
    name = model_hash = "reader"
    def stream(self, requests, sampling):
        for request in requests:
            letter = request.prompt[request.prompt.index(") yes") - 1] if ") yes" in request.prompt else "yes"
            answer = "unknown" if request.image is None else letter
            yield Completion(request.id, 0, f" {answer}", 2, "stop")

blank = Image.new("RGB", (56, 56))
def images(profile, split):
    for i in range(count):
        yield ImageItem(f"image-{i:08d}", blank, data=b"png")

pipeline.open_images = images
pipeline.open_backend = lambda model, _: Writer() if "writer" in model.path else Reader()
job = pipeline.open_job(load_profile("smoke", {"models.question_writer.path": "writer"}))
checked = job.rows(pipeline.CHECKED)
for item in images(None, None):
    checked.append(CheckedImage(id=item.id, kind=None, width=56, height=56, phash=None, reason=None))
start = time.process_time()
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pipeline.write_questions(job)
pipeline.extract_questions(job)
pipeline.answer_questions(job)
record = pipeline.filter_questions(job)
assert record["values"]["questions_kept"] == 5 * count, record["values"]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.process_time() - start, memory, peak)
"""


def measure(count: int, folder: Path) -> tuple[float, int]:
    """CPU seconds of the stages and peak memory in KiB."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(count)]
    env = os.environ | {"CAPRL_RUNS": str(folder / str(count))}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    seconds, _, peak = done.stdout.split()[-3:]
    return float(seconds), int(peak)


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_time_is_linear_and_a_million_images_fit_in_a_gigabyte(runs_folder):
    small, large = 1000, 4000
    (seconds, memory), (more_seconds, more_memory) = (measure(n, runs_folder) for n in (small, large))
    assert more_seconds / seconds < 1.5 * large / small
    kib_per_image = max(0, more_memory - memory) / (large - small)
    assert memory + kib_per_image * 1_000_000 < 2**20, f"{kib_per_image:.2f} KiB an image"
