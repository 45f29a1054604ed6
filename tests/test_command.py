"""The one command: every sub-command explains itself on one screen, and says in one line what a user can mend."""

import os
import subprocess
import sys

import pytest

from caprl_utils import paths
from caprl_utils.__main__ import app

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


def caprl(*arguments: str) -> subprocess.CompletedProcess:
    command, env = [sys.executable, "-m", "caprl_utils", *arguments], {**os.environ, "COLUMNS": "80"}
    return subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_screen_and_explains_every_option(command):
    done = caprl(*([command] if command else []), "--help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.rstrip().splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 80


def test_settings_with_their_sources_and_overrides():
    done = caprl("config", "smoke", "--set", "rl.group_size=6")
    assert "rl.group_size = 6" in done.stdout and "author script" in done.stdout
    done = caprl("config", "mini", "--experiment", "rounds_8")
    assert "rl.rounds = 8" in done.stdout and "reward.terms = {'qa': 1.0}" in done.stdout
    assert "# ours: the same expectation in one forward pass (default 'qa_sampled', paper, equations" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["config", "smke"], 1, "did you mean smoke?"),
        (["config", "bogus"], 1, "no profile 'bogus'; known: mini, one_gpu"),
        (["config", "smoke", "--set", "rl.stepz=1"], 1, "did you mean rl.steps?"),
        (["run", "04_prism", "--profile", "smoke"], 1, "did you mean 04_prism_evaluation?"),
        (["run"], 2, "Missing argument"),
        (["frobnicate"], 2, "No such command"),
        (["caption", "x", "--temperature", "-1"], 2, "greater than or equal to 0"),
        (["score", "zoo:base", "--num-samples", "0"], 2, "greater than or equal to 1"),
        (["score", "zoo:base", "--benchmark", "mini-chart", "--num-samples", "1"], 1, "1 samples of each"),
    ],
)
def test_what_can_be_mended_is_told_in_one_line(arguments, status, told):
    done = caprl(*arguments)
    assert done.returncode == status and told in done.stderr and "Traceback" not in done.stderr
