"""What a run needs: the lists of dependencies agree; the plan tells what is missing, and what each notebook costs."""

import re
import subprocess
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from caprl_utils import paths, run, runs
from caprl_utils.config import load_profile, names_of, read_yaml
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.run import REQUIREMENTS, check_environment, requirements
from caprl_utils.schema import Profile

LOCKS = ("main-cpu.lock", "main-gpu.lock")
PYPROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())
PYTHON = PYPROJECT["project"]["requires-python"].removeprefix(">=")
MAKEFILE = (paths.ROOT / "Makefile").read_text()


def written(name):
    lines = (line.split("#")[0].strip() for line in (REQUIREMENTS / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def test_locks_answer_every_direct_requirement_and_agree_where_both_name_a_package():
    pairs = [("main.in", lock) for lock in LOCKS]
    pairs += [(f"{name}.in", f"{name}.lock") for name in ("main-cpu", "main-gpu", "llamafactory")]
    for source, lock in pairs:
        for requirement in written(source):
            version = requirements(lock).get(canonicalize_name(requirement.name))
            assert version and requirement.specifier.contains(version), f"{requirement} in {lock}: {version}"
    cpu, gpu = map(requirements, LOCKS)
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert cpu and not different & {*requirements("main.in"), "numpy", "tokenizers", "huggingface-hub"}


def test_pyproject_and_conda_take_the_same_lists_and_python():
    assert PYPROJECT["project"]["dynamic"] == ["dependencies"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements/runtime.in"]
    text = (paths.ROOT / "environment.yml").read_text()
    conda = yaml.safe_load(text)["dependencies"]
    assert {"pip": ["-r requirements/main-cpu.lock"]} in conda and f"python={PYTHON}" in conda
    assert "make setup-llamafactory" in text  # the second environment
    makefile = MAKEFILE.replace("\\\n\t\t", "").replace("$(UV) ", "uv ")
    for lock in (*LOCKS, "llamafactory.lock"):
        command = (REQUIREMENTS / lock).read_text().splitlines()[1].removeprefix("#").strip()
        assert command in makefile and f"--python-version {PYTHON}" in command


def test_a_wrong_version_and_a_missing_package_point_to_setup(monkeypatch):
    check_environment()  # that of these tests is the locked one
    found = {name: metadata.version(name) for name in requirements("main.in") if name != "peft"} | {"trl": "0.1"}

    def version(name):
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(run.metadata, "version", version)
    with pytest.raises(UserError, match=r"trl is 0\.1, the lock says .*; peft is missing\. Run `make setup`"):
        check_environment()


def test_the_commit_is_that_of_this_repository_alone(tmp_path, monkeypatch):
    """Unpacked inside another repository, or with GIT_DIR set for one, that one's commit is not taken."""
    unpacked = tmp_path / "other" / "caprl"
    unpacked.mkdir(parents=True)
    author = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for arguments in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "other"]):
        subprocess.run(["git", *arguments], cwd=unpacked.parent, check=True)
    ours = runs.commit.__wrapped__()
    monkeypatch.setenv("GIT_DIR", str(unpacked.parent / ".git"))
    assert runs.commit.__wrapped__() == ours
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.setattr(paths, "ROOT", unpacked)
    assert runs.commit.__wrapped__() == {"commit": None, "dirty": None}
    monkeypatch.setattr(paths, "ROOT", unpacked.parent)
    assert runs.commit.__wrapped__()["commit"] not in (None, ours["commit"])


def test_the_workflow_and_the_image_run_commands_that_exist():
    workflow = yaml.safe_load((paths.ROOT / ".github/workflows/ci.yml").read_text())
    told = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert told == ["make setup", "make test"]
    assert [line for line in (paths.ROOT / ".ci/run").read_text().splitlines() if line in told] == told

    text = (paths.ROOT / "Dockerfile").read_text()
    targets = re.findall(r"(?:RUN|caprl) make ([a-z-]+)", text)
    assert targets == ["reproduce", "setup"] and all(f"\n{target}: " in MAKEFILE for target in targets)
    installs = [("main-cpu", ".venv"), ("llamafactory", ".venv-llamafactory")]
    assert all(f"install.sh {folder} requirements/{lock}.lock" in text for lock, folder in installs)
    assert f"FROM python:{PYTHON}-slim-bookworm\n" in text


def plan(name, **overrides):
    return "\n".join(run.plan(load_profile(name, overrides)))


def test_the_paper_profile_names_every_missing_thing_and_one_gpu_needs_no_server(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "visible_gpus", list)
    monkeypatch.setattr(run, "ENVIRONMENT", tmp_path)
    table, missing = plan("paper").split("missing:")
    assert "servers                              0 of 7 here" in table and "GPU-hours" not in table
    for part in ("16 GPUs at once, 16,000 GPU-hours", "in all: 18,649 GPU-hours",
                 "GPUs: 16 at once, this machine has 0",
                 "hf download Qwen/Qwen2.5-VL-3B-Instruct",
                 "make serve MODEL=Qwen/Qwen2.5-VL-72B-Instruct PORT=8000", "data/pretraining/CapRL-5M.json",
                 "hf download --repo-type dataset lmms-lab-encoder/ChartQA"):  # fmt: skip
        assert part in missing, part
    text = plan("one_gpu")  # none of its trainings asks that judge
    assert "GPUs at once: 1 " in text and not any(word in text for word in ("server", "72B", "UnifiedReward"))


def test_nothing_is_missing_for_the_mini_world(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ENVIRONMENT", tmp_path)
    for source in ("mini-world", "s3://a/b", str(tmp_path)):
        assert "nothing is missing" in plan("mini", images={"source": source})
    assert "  - images no/such (images.source)" in plan("mini", images={"source": "no/such"})
    monkeypatch.setattr(run, "ENVIRONMENT", tmp_path / "none")
    assert "make setup-llamafactory" in plan("mini")
    run.check(load_profile("mini"), ["01_qa_curation", "03_caprl_rl_training"])  # these go without it


def test_a_server_that_only_an_earlier_notebook_asked_may_be_gone(monkeypatch):
    monkeypatch.setattr(run, "visible_gpus", list)
    monkeypatch.setattr(run, "_have", lambda path, kind: True)
    with pytest.raises(UserError, match=r"\(prism_reader\)") as told:
        run.check(load_profile("paper"), ["04_prism_evaluation", "06_tables_and_figures"])
    for gone in ("question_writer", "reward_reader", "images.source", "LLaMA-Factory"):
        assert gone not in str(told.value), gone


def test_a_notebook_takes_what_it_took_here_or_what_is_published_at_this_machines_pace(runs_folder, monkeypatch):
    monkeypatch.setattr(run, "REPORTED", runs_folder / "published.json")
    write_json(run.REPORTED, {"mini": {"01": 50.0, "03": 1000.0, "04": 700.0}})
    assert run.known_times("mini")["04"] == 700.0 and run.known_times("smoke") == {}
    write_json(runs_folder / "mini" / "notebooks" / "times.json", {"01": 65.0, "03": 2035.0})
    assert run.known_times("mini") == {"01": 65.0, "03": 2035.0, "04": 1400.0}
    assert [run.duration(s) for s in (5, 65, 605, 3605)] == ["0:05", "1:05", "10:05", "1:00:05"]
    for profile, costs in read_yaml(run.ESTIMATES).items():
        assert profile in names_of(Profile) and set(costs) <= set(run.CHAIN)
