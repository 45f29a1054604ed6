"""What a profile needs before it starts (`make plan`): its notebooks, rough costs, and everything that is missing here.

Costs of sizes that need GPUs are a short table, configs/estimates.yaml, with their sources; times of the others are
measured. What is missing is looked up: servers, models, data, benchmarks, disk.
"""

import shutil
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

from caprl_utils import paths
from caprl_utils.config import load_assembly, read_yaml
from caprl_utils.paths import shown
from caprl_utils.pretraining.llamafactory import ENVIRONMENT
from caprl_utils.pretraining.pretrain import benchmarks_of
from caprl_utils.pretraining.sets import all_trainings
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.processes import visible_gpus
from caprl_utils.registry import drawn_source
from caprl_utils.run import expected_times
from caprl_utils.schema import Profile

ESTIMATES = paths.CONFIGS / "estimates.yaml"
CHAIN = [
    "01_qa_curation", "03_caprl_rl_training", "04_llamafactory_pretraining", "05_prism_evaluation",
    "06_tables_and_figures",
]  # fmt: skip
_ANSWER_SEC = 2.0


def lines(profile: Profile) -> list[str]:
    """The plan as it is printed."""
    costs = read_yaml(ESTIMATES).get(profile.name, {})
    gpus, disk_gb = ([cost[kind] for cost in costs.values()] for kind in ("gpus", "disk_gb"))
    wants = [
        *_machine(max(gpus, default=0), sum(disk_gb)), *_models(profile), *_data(profile), *_benchmarks(profile),
    ]  # fmt: skip
    return [
        f"profile {profile.name}: {profile.description}", f"made for {profile.hardware}",
        "", *_steps(profile, costs), "",
        *(["missing:", *(f"  - {want}" for want in dict.fromkeys(wants))] if wants else ["nothing is missing"]),
    ]  # fmt: skip


def _steps(profile: Profile, costs: dict) -> Iterator[str]:
    """A line per notebook: what it costs, or how long it took; the sum last."""
    times, copies, total = expected_times(profile.name), paths.RUNS / profile.name / "notebooks", 0.0
    for name in CHAIN:
        sec = max((sec for copy, sec in times.items() if copy.startswith(name)), default=None)
        needs = "minutes on a CPU" if sec is None else f"{sec / 60:.1f} minutes (measured)"
        if cost := costs.get(name):
            needs = f"{cost['gpus']} GPUs at once, {cost['gpu_hours']:,} GPU-hours, {cost['disk_gb']:,} GB of disk"
        total += sec or 0.0
        yield f"  {name:<28} {needs}{', made before' if any(copies.glob(f'{name}*.ipynb')) else ''}"
    if costs:
        hours = sum(cost["gpu_hours"] for cost in costs.values())
        yield f"in all: {hours:,} GPU-hours (not measured; sources: {shown(ESTIMATES)})"
    elif total:
        yield f"in all: {total / 60:.0f} minutes"


# What is not here, one line each with its remedy. gpus: at once; disk_gb: of all steps.
def _machine(gpus: int, disk_gb: float) -> Iterator[str]:
    if not ENVIRONMENT.is_dir():
        yield f"LLaMA-Factory's environment {shown(ENVIRONMENT)}: make setup"
    there = len(visible_gpus())
    if there < gpus:
        yield f"GPUs: {gpus} at once, this machine has {there}; several machines: configs/accelerate, configs/slurm"
    folder = next(f for f in (paths.RUNS, *paths.RUNS.parents) if f.exists())
    free = shutil.disk_usage(folder).free / 1e9
    if free < disk_gb:
        yield f"disk: {disk_gb:,.0f} GB, {free:,.0f} GB are free in {shown(folder)}; CAPRL_RUNS names another"


def _models(profile: Profile) -> Iterator[str]:
    served, loaded = {}, {}  # url -> (role, path); path -> what for
    for role, model in profile.models.named().items():
        if model.backend == "endpoint":
            served |= {url: (role, model.path) for url in model.base_urls if url not in served}
        else:
            loaded.setdefault(model.path, role)
    for name in profile.pretraining.settings:
        setting = load_assembly(name)
        for donor in (setting.language, setting.vision):
            loaded.setdefault(donor.path, f"setting {name}")
    for url, (role, path) in served.items():
        if not _answers(url):
            port = f" PORT={place}" if (place := urlsplit(url).port) else ""
            yield f"server {url} ({role}): make serve MODEL={path}{port}"
    for path, purpose in loaded.items():
        if not _have(path, "model"):
            yield f"model {path} ({purpose}): .venv/bin/hf download {path}"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=_ANSWER_SEC):
            return True
    except HTTPError:
        return True  # it answers, if only to those with a key
    except (OSError, ValueError, HTTPException):
        return False


def _have(path: str, kind: str) -> bool:
    """A model of the zoo (in the repository, or made from what is), a folder, or a hub id that was downloaded."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    if path.startswith(paths.ZOO_PREFIX) or Path(path).is_dir():
        return True
    try:
        return any(repo.repo_id == path and repo.repo_type == kind for repo in scan_cache_dir().repos)
    except CacheNotFound:
        return False


def _data(profile: Profile) -> Iterator[str]:
    source = profile.images.source
    if drawn_source(source) is None and not (paths.HOME / source).exists() and not _have(source, "dataset"):
        yield f"images {source} (images.source): a folder, a parquet file, webdataset tars or a data set of the hub"
    for training in all_trainings(profile.pretraining):
        source = getattr(profile.pretraining, training.stage).data
        file = paths.HOME / source.format(name=training.captions.name if training.captions else "")
        if drawn_source(source) is None and not file.is_file():
            what = "captions or conversations as a LLaVA file"
            yield f"data {shown(file)} (pretraining.{training.stage}.data): {what}"


def _benchmarks(profile: Profile) -> Iterator[str]:
    for name in dict.fromkeys([*profile.prism.benchmarks, *benchmarks_of(profile)]):
        benchmark = get_benchmark(name)
        if benchmark.hub is not None and not _have(benchmark.hub.id, "dataset"):
            yield f"benchmark {benchmark.name}: .venv/bin/hf download --repo-type dataset {benchmark.hub.id}"
