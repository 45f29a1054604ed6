"""What make says, and what README and notebooks may rely on."""

import re
import subprocess

import pytest

from caprl_utils import paths

MAKEFILE = (paths.ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
CHAIN = re.search(r"^CHAIN := (.*)$", MAKEFILE, re.MULTILINE)[1].split()


def make(*arguments):
    return subprocess.run(["make", *arguments], cwd=paths.ROOT, capture_output=True, text=True, timeout=60)


def test_plain_make_prints_help_made_from_the_comments():
    shown = make().stdout
    for target in re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, re.MULTILINE):
        assert re.search(rf"^  make {target} +\S", shown, re.MULTILINE), target
    assert "Profiles: mini one_gpu paper smoke (PROFILE=mini)" in shown


@pytest.mark.parametrize(
    "item", ["table1", "table2", "table4", "table5", "table6", "figure4", "figures", "extras"]
)
def test_each_item_has_a_target_that_makes_what_it_needs_first(item):
    plan = make("-n", item, "PROFILE=smoke").stdout
    assert plan.index("01_qa_curation") < plan.index("caprl_utils.reports.")


def test_reproduce_runs_the_whole_chain_and_table3_its_slice_only():
    assert "03_caprl_rl_training:with_ablations=True 04_" in make("-n", "reproduce").stdout
    table3 = make("-n", "table3").stdout
    assert "04_" not in table3
    assert table3.index("rl.ablations --table3") < table3.index(
        "05_prism_evaluation"
    )  # all seeds, and the judges


def test_serve_says_what_it_needs():
    assert "make serve MODEL=zoo:vlm-3b" in make("serve").stderr
    done = make("serve", "MODEL=zoo:nothing")
    assert done.returncode != 0 and "no model 'zoo:nothing'" in done.stderr and "Traceback" not in done.stderr


def test_unknown_profile_lists_the_known():
    done = make("reproduce", "PROFILE=mno")
    assert done.returncode != 0
    assert "unknown profile 'mno'; known profiles: mini one_gpu paper smoke" in done.stderr


def test_missing_environment_points_to_setup():
    done = make("reproduce", "PY=.nowhere/bin/python")
    assert done.returncode != 0 and "make setup" in done.stderr


def test_a_failed_step_stops_make():
    assert ".DELETE_ON_ERROR:" in MAKEFILE and not re.search(r"^\t-", MAKEFILE, re.MULTILINE)


def test_the_chain_goes_in_the_order_of_the_numbers_and_its_notebooks_exist():
    assert sorted(CHAIN) == CHAIN
    for name in CHAIN:
        assert (paths.NOTEBOOKS / f"{name}.ipynb").is_file(), name


def test_smoke_tables_stay_out_of_reports():
    # a file that make asks for by this name: the rule must know it
    assert make("-n", "runs/smoke/reports/table3.md", "PROFILE=smoke", "CAPRL_RUNS=runs").returncode == 0
    assert make("-n", "reports/smoke/table3.md", "PROFILE=smoke").returncode != 0
    assert make("-n", "reports/mini/table3.md").returncode == 0
