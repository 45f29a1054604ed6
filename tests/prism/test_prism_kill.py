"""Prism and direct VQA survive `kill -9` at any moment and a server that fails: the scores stay the same."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caprl_utils import paths
from caprl_utils.prism.scores import read_samples

WORKER = Path(__file__).parent / "prism_worker.py"
CHUNK = 8  # questions and images per call: many places to be killed at
pytestmark = pytest.mark.integration


def start(runs: Path, **env: str) -> subprocess.Popen:
    environment = (
        os.environ | {"CAPRL_RUNS": str(runs), "PYTHONPATH": str(paths.ROOT), "CHUNK": str(CHUNK)} | env
    )
    return subprocess.Popen(
        [sys.executable, str(WORKER)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(runs: Path) -> dict:
    found = {}
    for folder in (runs / "smoke" / "prism" / "m", runs / "smoke" / "vqa" / "m"):
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        rows = read_samples(folder)
        kept = {key: record[key] for key in ("values", "intervals", "n", "unparsed", "key")}
        found[folder.parent.name] = (kept, rows)
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
    codes = []
    for attempt in range(40):
        process = start(tmp_path, PAUSE_SEC="0", FAIL_SHARE="0.03", FAIL_SEED=str(attempt))
        _, message = process.communicate(timeout=280)
        codes.append(process.returncode)
        if process.returncode == 0:
            break
        assert "the finished rows are kept" in message.lower(), message
    assert codes[-1] == 0 and len(codes) > 1 and results(tmp_path) == whole
