"""The one command: every sub-command explains itself on one screen, and says in one line what a user can mend."""

import subprocess
import sys

import pytest

from caprl_utils import paths
from caprl_utils.__main__ import app, main

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.fixture
def caprl(monkeypatch, capsys):
    """Runs the command in this process; gives its exit status and what it printed."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("CAPRL_SET", "")

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["caprl", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed, code = capsys.readouterr(), stopped.value.code
        return (1, code) if isinstance(code, str) else (code or 0, printed.out + printed.err)

    return call


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_screen_and_explains_every_option(caprl, command):
    status, told = caprl(*([command] if command else []), "--help")
    lines = told.rstrip().splitlines()
    assert status == 0 and len(lines) <= 30 and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["config", "smoke", "--set", "rl.group_size=6"], 0, "rl.group_size = 6 "),
        (["config", "smoke"], 0, "# author script"),
        (["config", "mini", "--experiment", "rounds_8"], 0, "reward.terms = {'qa': 1.0}"),
        (["config", "mini", "--experiment", "rounds_8"], 0, "rl.rounds = 8 "),
        (["config"], 0, "# ours: the same expectation in one forward pass (default 'qa_sampled', paper, equations"),
        (["config", "smke"], 1, "error: no profile 'smke'; did you mean smoke?"),
        (["config", "bogus"], 1, "no profile 'bogus'; known: mini, one_gpu"),
        (["config", "smoke", "--set", "rl.stepz=1"], 1, "did you mean rl.steps?"),
        (["run", "04_prism", "--profile", "smoke"], 1, "did you mean 04_prism_evaluation?"),
        (["run"], 2, "Missing argument"),
        (["frobnicate"], 2, "No such command"),
        (["caption", "x", "--temperature", "-1"], 2, "greater than or equal to 0"),
        (["score", "zoo:base", "--num-samples", "0"], 2, "greater than or equal to 1"),
        (["score", "zoo:base", "--benchmark", "mini-chart", "--num-samples", "1"], 1, "1 samples of each"),
        (["serve", "zoo:nothing"], 1, "no model 'zoo:nothing'"),
        (["serve", ""], 1, "error: path '': String should have at least 1 character"),
        (["caption", "mini-world:nope:3", "--check"], 1, "the mini world has no split 'nope'"),
        (
            ["plan", "--profile", "smoke", "--set", "models.policy.path=zoo:bas"],
            0,
            "model zoo:bas (policy): no such model in the zoo",
        ),
    ],
)
def test_settings_are_shown_and_what_can_be_mended_is_told_in_one_line(caprl, arguments, status, told):
    assert (found := caprl(*arguments))[0] == status and told in found[1]


def test_as_a_process_of_its_own_it_shows_no_traceback():
    command = [sys.executable, "-m", "caprl_utils", "config", "smke"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no profile") and "Traceback" not in done.stderr
