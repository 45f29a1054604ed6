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


def steps(plan: str) -> list[str]:
    """The notebooks that a plan of make runs."""
    return [line.split()[6] for line in plan.splitlines() if "caprl_utils run " in line]


def test_plain_make_prints_help_made_from_the_comments():
    shown = make().stdout
    for target in re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, re.MULTILINE):
        assert re.search(rf"^  make {target} +\S", shown, re.MULTILINE), target
    assert "Profiles: mini one_gpu paper smoke (PROFILE=mini)" in shown


def test_each_item_has_a_target_that_makes_what_it_needs_first(tmp_path):
    for item in ("table1", "table2", "table4", "table5", "table6", "figure4", "figures", "extras", "rewards"):
        plan = make("-n", item, "PROFILE=smoke", f"CAPRL_RUNS={tmp_path}").stdout
        assert plan.index("01_qa_curation") < plan.index("caprl_utils report "), item


def test_reproduce_runs_the_whole_chain_and_table3_its_slice_only(tmp_path):
    plan = make("-n", "reproduce", f"CAPRL_RUNS={tmp_path}").stdout
    assert steps(plan) == ["01_qa_curation", "03_caprl_rl_training:with_ablations=True", *CHAIN[2:]]
    table3 = make("-n", "table3", f"CAPRL_RUNS={tmp_path}").stdout
    assert "run --profile mini 05_" not in table3
    assert table3.index("train --table3") < table3.index("run --profile mini 04_")  # seeds, judges


def made(tmp_path, *names) -> dict:
    """Executed copies as they are after a run, each newer than the one before it; their runs folder."""
    copies = tmp_path / "smoke" / "notebooks"
    copies.mkdir(parents=True)
    now = time.time()
    for number, name in enumerate(names):
        (copies / f"{name}.ipynb").write_text("{}")
        os.utime(copies / f"{name}.ipynb", (now + number, now + number))
    return copies


def stale(tmp_path, goal="slice", *more) -> list[str]:
    return steps(make("-n", goal, "PROFILE=smoke", f"CAPRL_RUNS={tmp_path}", *more).stdout)


def test_a_notebook_runs_again_after_what_comes_before_it_or_a_setting_changed(tmp_path):
    slice_ = [name for name in CHAIN if not name.startswith("05_")]
    copies = made(tmp_path, *slice_)
    assert stale(tmp_path) == [] and stale(tmp_path, CHAIN[0]) == []
    edited = ["-W", "caprl_utils/reports/tables.py"]  # make takes it as just edited
    assert stale(tmp_path, "slice", *edited) == slice_
    os.utime(copies / f"{slice_[1]}.ipynb", (time.time() + 100, time.time() + 100))
    assert stale(tmp_path) == slice_[2:]
    assert stale(tmp_path, "slice", "SET=rl.steps=3") != []


def test_a_table_that_is_gone_makes_its_notebook_run_again(tmp_path):
    name, table = "06_tables_and_figures", tmp_path / "table 3.md"
    (made(tmp_path, name) / f"{name}.files").write_text(f"{table}\n")
    table.write_text("")
    assert stale(tmp_path, name) == []
    table.unlink()
    assert stale(tmp_path, name) == [name]


def test_serve_says_what_it_needs():
    assert "make serve MODEL=zoo:base" in make("serve").stderr
    done = make("serve", "MODEL=zoo:nothing")
    assert done.returncode != 0 and "no model 'zoo:nothing'" in done.stderr and "Traceback" not in done.stderr


def test_unknown_profile_lists_the_known_and_a_missing_environment_points_to_setup():
    assert "unknown profile 'mno'; known profiles: mini one_gpu paper smoke" in make("PROFILE=mno").stderr
    done = make("reproduce", "PY=.nowhere/bin/python")
    assert done.returncode != 0 and "make setup" in done.stderr


def test_tables_are_made_under_runs_and_reports_are_no_target():
    # a file that make asks for by this name: the rule must know it
    assert make("-n", "runs/smoke/reports/table3.md", "PROFILE=smoke", "CAPRL_RUNS=runs").returncode == 0
    assert "caprl_utils" not in make("-n", "reports/smoke/table3.md", "PROFILE=smoke").stdout


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("PROFIL=smoke", "unknown variable PROFIL; did you mean PROFILE?"),
        ("profile=smoke", "unknown variable profile; did you mean PROFILE?"),
        ("STEPS=3", "unknown variable STEPS; known: PROFILE SET"),
    ],
)
def test_a_misspelt_variable_is_refused(given, told):
    done = make("-n", "reproduce", given)
    assert done.returncode != 0 and told in done.stderr and 'SET="rl.steps=10"' in done.stderr


def test_folders_and_settings_may_hold_spaces_and_quotes(tmp_path):
    runs = tmp_path / "the user's rùns"
    copies = made(runs, "01_qa_curation")
    setting = "SET='rl.seeds=[0, 1]'"
    assert stale(runs, "01_qa_curation", setting) == ["01_qa_curation"]
    assert (copies / ".set").read_text() == "'rl.seeds=[0, 1]'\n"
    os.utime(copies / "01_qa_curation.ipynb")
    assert stale(runs, "01_qa_curation", setting) == []
    assert "01_qa_curation" not in stale(runs, "table3", setting)


def test_jupyterlab_takes_options_and_starts_as_root():
    plan = make("-n", "lab", "LAB_ARGS=--no-browser --port 8889").stdout
    assert "--no-browser --port 8889" in plan and ("--allow-root" in plan) == (os.geteuid() == 0)
    assert f'root_dir="{paths.ROOT}"' in plan
