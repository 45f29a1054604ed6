"""The whole chain in a clone: it leaves the working tree as it was, every target of README's map works after it, and
`kill -9` at random moments, started again each time, changes nothing in its tables.

CAPRL_KILL_PROFILE and CAPRL_KILLS choose another size: `CAPRL_KILL_PROFILE=mini CAPRL_KILLS=10 make test-integration`.
"""

import os
import random
import re
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


def git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
    return subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A clone of the repository, so that the reports of this one stay as they are."""
    if not (paths.ZOO / "base" / "config.json").is_file():
        pytest.skip("the model zoo is not whole")
    folder = tmp_path_factory.mktemp("checkout") / "repository"
    left_out = (".git", ".venv*", ".tools", "runs", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(paths.ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    (folder / ENVIRONMENT.name).symlink_to(ENVIRONMENT)
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        git(folder, *arguments)
    return folder


def start(checkout: Path, runs: Path, target: str = "reproduce") -> subprocess.Popen:
    command = ["make", target, f"PROFILE={PROFILE}", f"PY={sys.executable}"]
    env, pipe = {**os.environ, "CAPRL_RUNS": str(runs), "PYTHONPATH": str(checkout)}, subprocess.PIPE
    return subprocess.Popen(command, cwd=checkout, env=env, start_new_session=True, stdout=pipe, stderr=pipe, text=True)


def finish(checkout: Path, runs: Path, target: str = "reproduce") -> tuple[float, str]:
    """Make a target to its end; (seconds, what it printed)."""
    begin, process = time.monotonic(), start(checkout, runs, target)
    shown, told = process.communicate()
    assert process.returncode == 0, f"{target}: {told[-3000:]}"
    return time.monotonic() - begin, shown


def tables(runs: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((runs / PROFILE / "reports").glob("*.csv"))}


@pytest.fixture(scope="module")
def whole(checkout, tmp_path_factory) -> tuple[Path, float, str]:
    """The chain, undisturbed: its runs folder, seconds, and what it printed."""
    runs = tmp_path_factory.mktemp("whole") / "my runs"
    return runs, *finish(checkout, runs)


def test_the_chain_says_where_to_look_every_target_of_the_map_works_and_the_working_tree_stays_clean(checkout, whole):
    assert (whole[0] / PROFILE / "reports" / "report.html").is_file() and "reports/report.html" in whole[2]
    targets = dict.fromkeys(re.findall(r"`make (\w+)`", (checkout / "README.md").read_text(encoding="utf-8")))
    made = [t for t in targets if t.startswith(("table", "figure", "extra"))]
    assert len(made) >= 8
    for target in (*made, "extras", "report", "plan", "config"):
        finish(checkout, whole[0], target)
    names = {file.stem for file in (whole[0] / PROFILE / "reports").glob("*.md")}
    assert names >= {"figure1c", "figure4", "figure5_left", "extra_readers", *(f"table{n}" for n in range(3, 7))}
    assert git(checkout, "status", "--porcelain") == ""


def test_a_chain_killed_at_random_moments_ends_with_the_same_tables(checkout, whole, tmp_path):
    undisturbed, killed, rng = whole[1], [], random.Random(0)
    while len(killed) < KILLS:  # twice as long as a share of the whole at most, so that none comes too late
        process, moment = start(checkout, tmp_path / "killed"), rng.uniform(0.02, 2 / KILLS) * undisturbed
        try:
            process.communicate(timeout=moment)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed.append(moment)
    seconds, _ = finish(checkout, tmp_path / "killed")
    shown = f"killed after {[round(k) for k in killed]} s; the last run: {seconds:.0f} s"
    print(f"undisturbed {undisturbed:.0f} s; {shown}")
    assert len(killed) == KILLS, f"the chain ended after {len(killed)} kills"
    wanted, found = tables(whole[0]), tables(tmp_path / "killed")
    assert found and [name for name in found if found[name] != wanted[name]] in ([], ["claims.csv"])
