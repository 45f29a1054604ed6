"""One list of dependencies, one lock for each environment, and all files that name them agree."""

import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from caprl_utils import paths, provenance
from caprl_utils.errors import UserError
from caprl_utils.provenance import check_environment, direct, pins

LOCKS = ("main-cpu.lock", "main-gpu.lock")
PYPROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())


def requirements(name):
    lines = (line.split("#")[0].strip() for line in (provenance.REQUIREMENTS / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


@pytest.mark.parametrize(
    ("source", "lock"),
    [("main.in", lock) for lock in LOCKS]
    + [(f"{name}.in", f"{name}.lock") for name in ("main-cpu", "main-gpu", "llamafactory")],
)
def test_lock_answers_every_direct_requirement(source, lock):
    locked = pins(lock)
    assert requirements(source)
    for requirement in requirements(source):
        version = locked.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), f"{requirement} in {lock}: {version}"


def test_both_main_locks_agree_where_both_name_a_package():
    cpu, gpu = (pins(lock) for lock in LOCKS)
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert not different & {*direct(), "numpy", "tokenizers", "huggingface-hub"}


def test_pyproject_and_conda_take_the_same_lists_and_python():
    assert PYPROJECT["project"]["dynamic"] == ["dependencies"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements/runtime.in"]
    conda = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    pip = next(item["pip"] for item in conda["dependencies"] if isinstance(item, dict))
    assert pip == ["-r requirements/main-cpu.lock"]
    (python,) = (item for item in conda["dependencies"] if str(item).startswith("python="))
    version = python.removeprefix("python=")
    assert PYPROJECT["project"]["requires-python"] == f">={version}"
    makefile = (paths.ROOT / "Makefile").read_text().replace("\\\n\t\t", "").replace("$(UV) ", "uv ")
    for lock in (*LOCKS, "llamafactory.lock"):
        command = (provenance.REQUIREMENTS / lock).read_text().splitlines()[1].removeprefix("#").strip()
        assert command in makefile and f"--python-version {version}" in command


def test_a_wrong_version_and_a_missing_package_point_to_setup(monkeypatch):
    check_environment()  # that of these tests is the locked one
    found = {name: metadata.version(name) for name in direct() if name != "peft"} | {"trl": "0.1"}

    def version(name):
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(provenance.metadata, "version", version)
    with pytest.raises(UserError, match=r"trl is 0\.1, the lock says .*; peft is missing\. Run `make setup`"):
        check_environment()
