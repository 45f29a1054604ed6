"""What a profile needs before it starts (`make plan`): its notebooks, rough costs, and everything that is missing here.

Costs of sizes that need GPUs stand in configs/estimates.yaml, with their sources; times of the others are measured.
"""

import shutil
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

from caprl_utils import paths
from caprl_utils.config import load_assembly, read_yaml
from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.pretraining.llamafactory import ENVIRONMENT
from caprl_utils.pretraining.pretrain import benchmarks_of
from caprl_utils.pretraining.sets import all_trainings
from caprl_utils.prism.authors import COLLECTION
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.processes import visible_gpus
from caprl_utils.progress import Times
from caprl_utils.registry import drawn_source
from caprl_utils.schema import Profile

ESTIMATES = paths.CONFIGS / "estimates.yaml"
CHAIN = [
    "01_qa_curation", "03_caprl_rl_training", "04_prism_evaluation", "05_llamafactory_pretraining",
    "06_tables_and_figures",
]  # fmt: skip
ROLES = {  # notebook -> models that it asks; 05 takes its captions from files, or from models that 03 trained
    "01": ("question_writer", "question_filter"),
    "03": ("policy", "reward_reader", "vlm_judge", "reward_judge", "prism_reader"),
    "04": ("policy", "captioner_7b", "captioner_72b", "prism_reader"),
}
JUDGES = {"vlm_judge": "judge_vlm", "reward_judge": "judge_unified"}  # role -> the experiment that asks it
_ANSWER_SEC = 2.0


class Need(NamedTuple):
    """Something that a profile needs. kind: its line in the table. told: what it is and how to get it."""

    kind: str
    there: bool
    told: str


def lines(profile: Profile) -> list[str]:
    """The plan as it is printed: a table of what is needed, what of it is missing, what each notebook costs."""
    needs = _needs(profile, CHAIN)
    table = []
    for kind in dict.fromkeys(need.kind for need in needs):
        found = [need.there for need in needs if need.kind == kind]
        here = "here" if all(found) else f"{sum(found)} of {len(found)} here" if len(found) > 1 else "missing"
        table.append(f"  {kind:<36} {here}")
    missing = [f"  - {need.told}" for need in needs if not need.there]
    head = [f"profile {profile.name}: {profile.description}", f"made for {profile.hardware}", ""]
    told = ["missing:", *missing] if missing else ["nothing is missing"]
    return [*head, *table, "", *told, "", *_steps(profile)]


def check(profile: Profile, chain: Sequence[str]) -> None:
    """Raise UserError with everything that is missing for a chain of notebooks, before the first of them starts."""
    if missing := [f"  - {need.told}" for need in _needs(profile, chain) if not need.there]:
        command = f"make plan PROFILE={profile.name}"
        head = f"profile {profile.name} cannot run to its end here ({command}); missing:"
        raise UserError("\n".join([head, *missing]))


def _steps(profile: Profile) -> Iterator[str]:
    """A line per notebook: what it costs, or how long it took; the sum last."""
    costs, times = _costs(profile), Times.of(profile.name).known
    copies, total = paths.RUNS / profile.name / "notebooks", 0.0
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


def _costs(profile: Profile) -> dict[str, dict[str, int]]:
    """Notebook -> its estimate; empty for a profile that needs no GPU."""
    return read_yaml(ESTIMATES).get(profile.name, {})


def _needs(profile: Profile, chain: Sequence[str]) -> list[Need]:
    """Each once, of what this chain of notebooks takes: a server that only an earlier one asked may be gone."""
    parts = (_machine, _models, _data, _benchmarks)
    return list(dict.fromkeys(need for part in parts for need in part(profile, chain)))


def _pretrains(chain: Sequence[str]) -> bool:
    return any(name.startswith("05_") for name in chain)


def _machine(profile: Profile, chain: Sequence[str]) -> Iterator[Need]:
    costs = [cost for name, cost in _costs(profile).items() if any(copy.startswith(name) for copy in chain)]
    if _pretrains(chain):
        told = f"LLaMA-Factory's environment {shown(ENVIRONMENT)}: make setup-llamafactory"
        yield Need("LLaMA-Factory's environment", ENVIRONMENT.is_dir(), told)
    if gpus := max((cost["gpus"] for cost in costs), default=0):
        there = len(visible_gpus())
        told = f"GPUs: {gpus} at once, this machine has {there}; several machines: configs/accelerate, configs/slurm"
        yield Need(f"GPUs at once: {gpus}", there >= gpus, told)
    if disk_gb := sum(cost["disk_gb"] for cost in costs):
        folder = next(f for f in (paths.RUNS, *paths.RUNS.parents) if f.exists())
        free = shutil.disk_usage(folder).free / 1e9
        told = f"disk: {disk_gb:,} GB, {free:,.0f} GB are free in {shown(folder)}; CAPRL_RUNS names another"
        yield Need(f"disk: {disk_gb:,} GB", free >= disk_gb, told)


def _models(profile: Profile, chain: Sequence[str]) -> Iterator[Need]:
    served, loaded = {}, {}  # url -> (role, path); path -> what for
    asked = {role for copy in chain for role in ROLES.get(copy[:2], ())}
    asked -= {role for role, name in JUDGES.items() if name not in profile.ablations.experiments}
    for role, model in profile.models.named().items():
        if role not in asked:
            continue
        if model.backend == "endpoint":
            served |= {url: (role, model.path) for url in model.base_urls if url not in served}
        else:
            loaded.setdefault(model.path, role)
    for name in profile.pretraining.settings if _pretrains(chain) else ():
        setting = load_assembly(name)
        for donor in (setting.language, setting.vision):
            loaded.setdefault(donor.path, f"setting {name}")
    for url, (role, path) in served.items():
        port = f" PORT={place}" if (place := urlsplit(url).port) else ""
        yield Need("servers", _answers(url), f"server {url} ({role}): make serve MODEL={path}{port}")
    for path, purpose in loaded.items():
        yield Need("models", _have(path, "model"), f"model {path} ({purpose}): .venv/bin/hf download {path}")


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy, as the client asks
    try:
        with opener.open(f"{url}/models", timeout=_ANSWER_SEC):
            return True
    except HTTPError:
        return True  # it answers, if only to those with a key
    except (OSError, ValueError, HTTPException):
        return False


def _have(path: str, kind: str) -> bool:
    """A model of the zoo (in the repository, or made from what is), a folder, or a hub id that was downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    if path.startswith(paths.ZOO_PREFIX) or Path(path).is_dir():
        return True
    return (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type=kind) / "snapshots").is_dir()


def _data(profile: Profile, chain: Sequence[str]) -> Iterator[Need]:
    source = profile.images.source
    if any(copy.startswith("01_") for copy in chain):
        there = drawn_source(source) or (paths.HOME / source).exists() or _have(source, "dataset")
        what = "a folder, a parquet file, webdataset tars or a data set of the hub"
        yield Need("data", bool(there), f"images {source} (images.source): {what}")
    for training in all_trainings(profile.pretraining) if _pretrains(chain) else ():
        source = getattr(profile.pretraining, training.stage).data
        file = paths.HOME / source.format(name=training.captions.name if training.captions else "")
        told = f"data {shown(file)} (pretraining.{training.stage}.data): captions or conversations as a LLaVA file"
        yield Need("data", drawn_source(source) is not None or file.is_file(), told)


def _benchmarks(profile: Profile, chain: Sequence[str]) -> Iterator[Need]:
    more = benchmarks_of(profile) if _pretrains(chain) else ()
    for name in dict.fromkeys([*profile.prism.benchmarks, *more]):
        benchmark, copy = get_benchmark(name), profile.prism.paths.get(name)
        if copy is not None:
            there, told = (paths.HOME / copy).exists(), f"{copy} (prism.paths)"
        elif benchmark.hub is not None:
            there = _have(benchmark.hub.id, "dataset")
            told = f".venv/bin/hf download --repo-type dataset {benchmark.hub.id}"
        elif benchmark.loader is None:  # known only from the authors' files
            files = profile.prism.evaluation_files
            there = bool(files) and (paths.HOME / files).exists()
            told = f"prism.evaluation_files=DIR with the authors' files ({COLLECTION})"
        else:
            continue
        yield Need("benchmarks", there, f"benchmark {benchmark.name}: {told}")
