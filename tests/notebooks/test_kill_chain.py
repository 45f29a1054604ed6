"""`kill -9` of the whole chain at random moments, started again each time, changes nothing in its tables.

CAPRL_KILL_PROFILE and CAPRL_KILLS choose another size: `CAPRL_KILL_PROFILE=mini CAPRL_KILLS=10 make test-integration`.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caprl_utils import paths
from caprl_utils.pretraining.llamafactory import ENVIRONMENT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(5400)]
PROFILE = os.environ.get("CAPRL_KILL_PROFILE", "smoke")
KILLS = int(os.environ.get("CAPRL_KILLS", "5"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository, so that the reports of this one stay as they are."""
    if not (paths.ZOO / "vlm-3b" / "config.json").is_file():
        pytest.skip("the model zoo is not whole")
    folder = tmp_path_factory.mktemp("checkout") / "repository"
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", ".tools", "runs", "__pycache__", ".pytest_cache", ".ruff_cache"
    )
    shutil.copytree(paths.ROOT, folder, ignore=left_out)
    (folder / ENVIRONMENT.name).symlink_to(ENVIRONMENT)
    return folder


def start(checkout: Path, runs: Path) -> subprocess.Popen:
    environment = {**os.environ, "CAPRL_RUNS": str(runs), "PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        ["make", "reproduce", f"PROFILE={PROFILE}", f"PY={sys.executable}"],
        cwd=checkout, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(checkout: Path, runs: Path) -> float:
    """Run the chain to its end; seconds."""
    begin = time.monotonic()
    process = start(checkout, runs)
    _, told = process.communicate()
    assert process.returncode == 0, told[-3000:]
    return time.monotonic() - begin


def tables(checkout: Path, runs: Path) -> dict[str, bytes]:
    folder = runs / "smoke" / "reports" if PROFILE == "smoke" else checkout / "reports" / PROFILE
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.csv"))}


def test_a_chain_killed_at_random_moments_ends_with_the_same_tables(checkout, tmp_path):
    whole = finish(checkout, tmp_path / "whole")
    wanted = tables(checkout, tmp_path / "whole")
    assert wanted
    rng, killed = random.Random(0), []
    while len(killed) < KILLS:  # twice as long as a share of the whole at most, so that none comes too late
        process, moment = start(checkout, tmp_path / "killed"), rng.uniform(0.02, 2 / KILLS) * whole
        try:
            process.communicate(timeout=moment)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed.append(moment)
    seconds = finish(checkout, tmp_path / "killed")
    print(
        f"undisturbed {whole:.0f} s; killed after {[round(k) for k in killed]} s; the last run: {seconds:.0f} s"
    )
    assert len(killed) == KILLS, f"the chain ended after {len(killed)} kills"
    assert tables(checkout, tmp_path / "killed") == wanted
