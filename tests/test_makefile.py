"""What make says, and what README and notebooks may rely on."""

import os
import re
import subprocess
import time

import pytest

from caprl_utils import paths

MAKEFILE = (paths.ROOT / "Makefile").read_text()
CHAIN = re.search(r"^CHAIN := (.*)$", MAKEFILE, re.MULTILINE)[1].split()


def make(*arguments):
    return subprocess.run(["make", *arguments], cwd=paths.ROOT, capture_output=True, text=True, timeout=60)


def plan(runs, *arguments) -> str:
    return make("-n", "PROFILE=smoke", f"CAPRL_RUNS={runs}", *arguments).stdout


def stale(runs, *arguments) -> list[str]:
    """The notebooks that make would run."""
    return re.findall(r"caprl_utils run --profile smoke (\S+)", plan(runs, *arguments))


def made(runs, *names):
    """The folder of executed copies as they are after a run, each newer than the one before it."""
    copies = runs / "smoke" / "notebooks"
    copies.mkdir(parents=True)
    for number, name in enumerate(names):
        (copies / f"{name}.ipynb").write_text("{}")
        os.utime(copies / f"{name}.ipynb", (time.time() + number, time.time() + number))
    return copies


def test_plain_make_prints_help_made_from_the_comments():
    shown = make().stdout
    for target in re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, re.MULTILINE):
        assert re.search(rf"^  make {target} +\S", shown, re.MULTILINE), target
    assert "Profiles: mini one_gpu paper smoke (PROFILE=mini)" in shown


def test_each_item_has_a_target_that_makes_what_it_needs_first_and_reproduce_the_whole_chain(tmp_path):
    for item in ("table1", "table2", "table4", "table5", "table6", "figure4", "figures", "extras", "rewards"):
        told = plan(tmp_path, item)
        assert told.index("01_qa_curation") < told.index("caprl_utils report "), item
    assert stale(tmp_path, "reproduce") == [CHAIN[0], "03_caprl_rl_training:with_ablations=True", *CHAIN[2:]]
    table3 = plan(tmp_path, "table3")
    assert "run --profile smoke 05_" not in table3
    assert table3.index("train --table3") < table3.index("run --profile smoke 04_")  # seeds, judges


def test_a_notebook_runs_again_after_what_it_needs_changed_or_a_table_of_it_is_gone(tmp_path):
    slice_ = [name for name in CHAIN if not name.startswith("05_")]
    copies, table = made(tmp_path, *slice_), tmp_path / "table 3.md"
    table.touch()
    (copies / f"{slice_[-1]}.files").write_text(f"{table}\n")
    assert stale(tmp_path, "slice") == [] and stale(tmp_path, CHAIN[0]) == []
    assert stale(tmp_path, "slice", "-W", "caprl_utils/reports/tables.py") == slice_  # as if just edited
    table.unlink()
    assert stale(tmp_path, "slice") == slice_[-1:]
    os.utime(copies / f"{slice_[1]}.ipynb", (time.time() + 100, time.time() + 100))
    assert stale(tmp_path, "slice") == slice_[2:]
    assert stale(tmp_path, "slice", "SET=rl.steps=3") != []


def test_tables_are_made_under_runs_and_reports_are_no_target():
    # a file that make asks for by this name: the rule must know it
    assert make("-n", "runs/smoke/reports/table3.md", "PROFILE=smoke", "CAPRL_RUNS=runs").returncode == 0
    assert "caprl_utils" not in make("-n", "reports/smoke/table3.md", "PROFILE=smoke").stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serve"], "make serve MODEL=zoo:base"),
        (["PROFILE=mno"], "unknown profile 'mno'; known profiles: mini one_gpu paper smoke"),
        (["reproduce", "PY=.nowhere/bin/python"], "make setup"),
        (["-n", "reproduce", "profile=smoke"], "unknown variable profile; did you mean PROFILE?"),
        (["-n", "reproduce", "STEPS=3"], "STEPS; known: PROFILE SET .*; a setting of the profile: SET=.rl.steps=10"),
    ],
)
def test_what_make_cannot_do_is_told(arguments, told):
    done = make(*arguments)
    assert done.returncode != 0 and re.search(told, done.stderr) and "Traceback" not in done.stderr


def test_folders_and_settings_may_hold_spaces_and_quotes(tmp_path):
    runs, setting = tmp_path / "the user's rùns", "SET='rl.seeds=[0, 1]'"
    copies = made(runs, CHAIN[0])
    assert stale(runs, CHAIN[0], setting) == [CHAIN[0]]
    assert (copies / ".set").read_text() == "'rl.seeds=[0, 1]'\n"
    os.utime(copies / f"{CHAIN[0]}.ipynb")
    assert stale(runs, CHAIN[0], setting) == []
    assert CHAIN[0] not in stale(runs, "table3", setting)


def test_jupyterlab_takes_options_and_starts_as_root():
    told = make("-n", "lab", "LAB_ARGS=--no-browser --port 8889").stdout
    assert "--no-browser --port 8889" in told and ("--allow-root" in told) == (os.geteuid() == 0)
    assert f'root_dir="{paths.ROOT}"' in told
