"""Notebook 01, whole, with the settings of the sizes that need GPUs: zoo models write and filter."""

import subprocess
import sys

import pytest

from caprl_utils import paths
from caprl_utils.curation.keep import QA_FILE
from caprl_utils.registry import drawn_source

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
IMAGES = 20


@pytest.mark.parametrize("name", ["one_gpu", "paper"])
def test_the_notebook_runs_to_its_checks(name, real_profile, runs_folder, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(IMAGES):
        image_id, image, *_ = drawn_source("mini-world").image_at("rl", number, None, 0)
        image.save(folder / f"{image_id}.png")
    file = real_profile(
        name,
        models={"question_writer": {"path": "zoo:strong"}, "question_filter": {"path": "zoo:base"}},
        prompts="short",  # the words that zoo models know
        images={"source": str(folder), "num_images": IMAGES},
        curation={"max_tokens": 160},
    )
    command = [sys.executable, "-m", "caprl_utils", "run", "01_qa_curation", "-p", f"profile={file}"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert (runs_folder / file.stem / "curation" / "main" / QA_FILE).is_file()
