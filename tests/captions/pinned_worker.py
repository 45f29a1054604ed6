"""A worker on one core: load the model, say so, wait for the word, work; prints when it was done, and its seconds of
CPU until the word and for the work.

python pinned_worker.py FOLDER CORE READY GO
"""

import os
import sys
import time
from pathlib import Path

from PIL import Image

from caprl_utils.captions.engines import open_engine
from caprl_utils.captions.job import Job, read_job
from caprl_utils.captions.manifest import Manifest
from caprl_utils.captions.work import Worker
from caprl_utils.models.base import Request, Sampling


def main(folder: Path, core: int, ready: Path, go: Path) -> None:
    os.sched_setaffinity(0, {core})
    job = Job(**read_job(folder)["job"])
    captioner = open_engine(job)
    captioner.generate([Request("warm", job.prompt, Image.new("RGB", (140, 140)))], Sampling(max_tokens=4))
    ready.touch()
    while not go.exists():
        time.sleep(0.01)
    before = time.process_time()
    Worker(Manifest(folder), job.task(), captioner).run()
    print(f"done {time.monotonic()} cpu {before} {time.process_time() - before}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
