"""What a profile needs before it starts (`make plan`), and running its notebooks through papermill.

Whether a notebook is out of date is make's decision (Makefile). It runs under a temporary name and gets its own when it
has succeeded, dated at its start, so that whatever was edited meanwhile is newer; a failed copy is kept as
NAME.failed.ipynb. NAME.files lists the records and reports that it read or wrote: when one is gone, make runs it again.
"""

import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from packaging.utils import canonicalize_name
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from caprl_utils import paths
from caprl_utils.config import load_assembly, parse_overrides, read_yaml
from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.files import ACCESS_LOG_ENV, full_disk_as_user_error, write_atomic, write_json
from caprl_utils.image_sources import is_hub
from caprl_utils.paths import shown
from caprl_utils.pretraining.llamafactory import ENVIRONMENT
from caprl_utils.pretraining.pretrain import benchmarks_of
from caprl_utils.pretraining.sets import all_trainings
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.loading import COLLECTION
from caprl_utils.processes import die_with_parent, python_path, tail, visible_gpus
from caprl_utils.progress import PROGRESS_ENV, read_state
from caprl_utils.registry import drawn_source, maker_of
from caprl_utils.runs import Lock
from caprl_utils.schema import Profile

ESTIMATES = paths.CONFIGS / "estimates.yaml"  # costs of sizes that need GPUs, with their sources
REPORTED = paths.REPORTS / "bench" / "times.json"  # seconds of each notebook behind the published reports
REQUIREMENTS = paths.ROOT / "requirements"
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
_KERNEL_START_SEC = 120  # a loaded machine takes long to import
_BEAT_SEC, _TERMINAL_BEAT_SEC = 10.0, 1.0
_MESSAGE_LINES, _SOURCE_WIDTH = 12, 60
_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}


# What is needed


Need = tuple[str, bool, str]  # its line in the table, whether it is there, what it is and how to get it


def plan(profile: Profile) -> list[str]:
    """Lines for people: a table of what is needed, what of it is missing, what each notebook costs."""
    lines, needs = [f"profile {profile.name}: {profile.description}", f"made for {profile.hardware}", ""], {}
    for kind, there, told in dict.fromkeys(_needs(profile, CHAIN)):
        needs.setdefault(kind, {})[told] = there
    for kind, found in needs.items():
        here = f"{sum(found.values())} of {len(found)} here" if len(found) > 1 else "missing"
        lines.append(f"  {kind:<36} {'here' if all(found.values()) else here}")
    missing = [f"  - {told}" for found in needs.values() for told, there in found.items() if not there]
    lines += ["", "missing:" if missing else "nothing is missing", *missing, ""]

    costs, times = read_yaml(ESTIMATES).get(profile.name, {}), known_times(profile.name)
    copies, total = paths.RUNS / profile.name / "notebooks", 0.0
    for name in CHAIN:
        sec = max((sec for copy, sec in times.items() if copy.startswith(name)), default=None)
        total += sec or 0.0
        takes = "minutes on a CPU" if sec is None else f"{sec / 60:.1f} minutes (measured)"
        if cost := costs.get(name):
            takes = f"{cost['gpus']} GPUs at once, {cost['gpu_hours']:,} GPU-hours, {cost['disk_gb']:,} GB of disk"
        lines.append(f"  {name:<28} {takes}{', made before' if any(copies.glob(f'{name}*.ipynb')) else ''}")
    if costs:
        hours = sum(cost["gpu_hours"] for cost in costs.values())
        return [*lines, f"in all: {hours:,} GPU-hours (not measured; sources: {shown(ESTIMATES)})"]
    return [*lines, f"in all: {total / 60:.0f} minutes"] if total else lines


def check(profile: Profile, chain: Sequence[str]) -> None:
    """Raise UserError with everything that is missing for a chain of notebooks, before the first of them starts."""
    if missing := [f"\n  - {told}" for _, there, told in dict.fromkeys(_needs(profile, chain)) if not there]:
        command = f"make plan PROFILE={profile.name}"
        raise UserError(f"profile {profile.name} cannot run to its end here ({command}); missing:{''.join(missing)}")


def _needs(profile: Profile, chain: Sequence[str]) -> Iterator[Need]:
    """What this chain of notebooks takes: a server that only an earlier one asked may be gone."""
    pretrains = any(name.startswith("05_") for name in chain)
    costs = read_yaml(ESTIMATES).get(profile.name, {})
    costs = [cost for name, cost in costs.items() if any(copy.startswith(name) for copy in chain)]
    if pretrains:
        told = f"LLaMA-Factory's environment {shown(ENVIRONMENT)}: make setup-llamafactory"
        yield ("LLaMA-Factory's environment", ENVIRONMENT.is_dir(), told)
    if gpus := max((cost["gpus"] for cost in costs), default=0):
        there = len(visible_gpus())
        told = f"GPUs: {gpus} at once, this machine has {there}; several machines: configs/accelerate, configs/slurm"
        yield (f"GPUs at once: {gpus}", there >= gpus, told)
    if disk_gb := sum(cost["disk_gb"] for cost in costs):
        folder = next(f for f in (paths.RUNS, *paths.RUNS.parents) if f.exists())
        free = shutil.disk_usage(folder).free / 1e9
        told = f"disk: {disk_gb:,} GB, {free:,.0f} GB are free in {shown(folder)}; CAPRL_RUNS names another"
        yield (f"disk: {disk_gb:,} GB", free >= disk_gb, told)
    yield from _models(profile, chain, pretrains)
    if any(name.startswith("01_") for name in chain):
        source = profile.images.source
        there = not is_hub(source) or _have(source.partition(":")[0], "dataset")
        what = "a folder, a parquet file, webdataset tars or a data set of the hub"
        yield ("data", there, f"images {source} (images.source): {what}")
    for training in all_trainings(profile.pretraining) if pretrains else ():
        source = training.source(profile.pretraining)
        file = paths.HOME / source
        told = f"data {shown(file)} (pretraining.{training.stage}.data): captions or conversations as a LLaVA file"
        yield ("data", drawn_source(source) is not None or file.is_file(), told)
    yield from _benchmarks(profile, benchmarks_of(profile) if pretrains else ())


def _models(profile: Profile, chain: Sequence[str], pretrains: bool) -> Iterator[Need]:
    served, loaded = {}, {}  # url -> (role, path); path -> what for
    asked = {role for copy in chain for role in ROLES.get(copy[:2], ())}
    asked -= {role for role, name in JUDGES.items() if name not in profile.ablations.experiments}
    for role, model in profile.models.named().items():
        if role in asked and model.backend == "endpoint":
            served |= {url: (role, model.path) for url in model.base_urls if url not in served}
        elif role in asked:
            loaded.setdefault(model.path, role)
    for setting in map(load_assembly, profile.pretraining.settings if pretrains else ()):
        for donor in (setting.language, setting.vision):
            loaded.setdefault(donor.path, f"setting {setting.name}")
    for url, (role, path) in served.items():
        try:
            there = bool(httpx.get(f"{url}/models", timeout=2.0).status_code)  # a refusal without a key is an answer
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):  # the last two: wrong proxy, certificate
            there = False
        port = f" PORT={place}" if (place := urlsplit(url).port) else ""
        yield ("servers", there, f"server {url} ({role}): make serve MODEL={path}{port}")
    for path, purpose in loaded.items():
        how = "no such model in the zoo" if path.startswith(paths.ZOO_PREFIX) else f".venv/bin/hf download {path}"
        yield ("models", _have(path, "model"), f"model {path} ({purpose}): {how}")


def _benchmarks(profile: Profile, more: Sequence[str]) -> Iterator[Need]:
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
        yield ("benchmarks", there, f"benchmark {benchmark.name}: {told}")


def _have(path: str, kind: str) -> bool:
    """A model of the zoo (in the repository, or made from what is), a folder, or a hub id that was downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if path.startswith(paths.ZOO_PREFIX):
        return maker_of(path) is not None or (paths.zoo_folder(path) / "config.json").is_file()
    cached = Path(HF_HUB_CACHE) / f"{kind}s--{path.replace('/', '--')}" / "snapshots"
    return Path(path).is_dir() or cached.is_dir()


def requirements(file: str) -> dict[str, str]:
    """Name -> pinned version ("" where it is not pinned) of a file in requirements/ and those that it includes."""
    text = (REQUIREMENTS / file).read_text(encoding="utf-8")
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)(?:\[[^]]*\])?(?:==([^\s;\\]+))?", text, re.MULTILINE)
    names = {canonicalize_name(name): version for name, version in found}
    for included in re.findall(r"^-r (\S+)", text, re.MULTILINE):
        names |= requirements(included)
    return names


def check_environment() -> None:
    """Raise UserError when a direct dependency is missing or has another version than the locks say."""
    locks, problems = [requirements("main-cpu.lock"), requirements("main-gpu.lock")], []
    for name in requirements("main.in"):
        wanted = {lock[name] for lock in locks if name in lock}
        try:
            if wanted and (found := metadata.version(name)) not in wanted:
                problems.append(f"{name} is {found}, the lock says {' or '.join(sorted(wanted))}")
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is missing")
    if problems:
        told = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
        raise UserError(f"environment {sys.executable} is not the locked one: {told}. Run `make setup`.")


# Running notebooks


@dataclass(frozen=True)
class Job:
    """A notebook to run. name: of its executed copy, as Makefile knows it; folder: where that goes."""

    source: Path
    parameters: dict[str, Any]
    name: str
    folder: Path

    def side_file(self, kind: str) -> Path:
        """A hidden file beside the copy while it is made."""
        return self.folder / f".{self.name}.{kind}"


def run_all(notebooks: Sequence[str], profile: Profile, items: Sequence[str] = (), chain: Sequence[str] = ()) -> None:
    """Run notebooks in order. Raises UserError at the first failure. notebooks: NAME, or NAME:PARAMETER=VALUE; items:
    parameters of all; chain: all copies that the caller is going to run, of which these are some: all that it still
    needs is looked up first, and the time left told.
    """
    jobs = [_job(text, profile, items) for text in notebooks]
    check_environment()
    if jobs[0].name in chain:
        check(profile, chain[chain.index(jobs[0].name) :])
    for job in jobs:
        with Lock(job.side_file("lock"), f"{job.name} ({profile.name})"):
            _run(job, profile, list(chain) if job.name in chain else [job.name for job in jobs])


def _job(text: str, profile: Profile, items: Sequence[str]) -> Job:
    """Raises UserError for a notebook that is none, and for parameters that its cell tagged `parameters` has not."""
    name, *own = text.split(":")
    source = Path(name) if name.endswith(".ipynb") else paths.NOTEBOOKS / f"{name}.ipynb"
    if not source.is_file():
        there = sorted(p.stem for p in paths.NOTEBOOKS.glob("*.ipynb"))
        hint = did_you_mean(source.stem, there) or f"; there are: {', '.join(there)}"
        raise UserError(f"no notebook {shown(source)}{hint}")
    try:
        known = papermill.inspect_notebook(str(source))
    except Exception as error:  # whatever nbformat finds wrong with it
        raise UserError(f"{shown(source)} is no notebook ({type(error).__name__}: {error})") from None
    if not known:
        raise UserError(f"{shown(source)} has no cell tagged `parameters`; one is needed, with `profile`")
    parameters = {"profile": profile.name, **parse_overrides(items := [*items, *own], "-p", "seed=1")}
    for name, value in parameters.items():
        if name not in known:
            hint = f"{did_you_mean(name, known)}; it has: {', '.join(sorted(known))}"
            hint += f"; a setting: --set {name}={value}" if "." in name else ""
            raise UserError(f"{shown(source)} has no parameter {name!r}{hint}")
        kind = _TYPES.get(known[name]["inferred_type_name"], type(value))
        if value is not None and type(value) is not kind and (type(value), kind) != (int, float):
            raise UserError(f"{shown(source)}: parameter {name} is {kind.__name__}, got {value!r}")
    name = "-".join([source.stem, *(item.replace("/", "_").replace("=", "-") for item in sorted(items))])
    return Job(source.resolve(), parameters, name, paths.RUNS / profile.name / "notebooks")


def _run(job: Job, profile: Profile, chain: Sequence[str]) -> None:
    temporary, failed = job.side_file("tmp.ipynb"), job.folder / f"{job.name}.failed.ipynb"
    progress, access = job.side_file("progress"), job.side_file("access")
    for file in (temporary, progress, access):
        file.unlink(missing_ok=True)
    os.environ |= {  # for the kernel, which inherits it
        "PYTHONPATH": python_path(), "CAPRL_RUNS": str(paths.RUNS), "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        PROGRESS_ENV: str(progress), ACCESS_LOG_ENV: str(access),
    }  # fmt: skip
    start = time.time()
    try:
        _execute(job, temporary, Monitor(job, chain, known_times(profile.name)))
    except UserError as error:
        if "cells" not in read_state(temporary):
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, failed)
        raise UserError(f"{error}\nthe failed copy is {shown(failed)}") from None
    sec = time.time() - start
    files = sorted(set(access.read_text(encoding="utf-8").split("\n")) - {""}) if access.exists() else []
    write_atomic(job.folder / f"{job.name}.files", "".join(f"{file}\n" for file in files))
    os.utime(temporary, (start, start))
    os.replace(temporary, job.folder / f"{job.name}.ipynb")
    failed.unlink(missing_ok=True)
    measured = read_state(job.folder / "times.json")  # a shorter time found some of its results made
    write_json(job.folder / "times.json", measured | {job.name: max(round(sec, 1), measured.get(job.name, 0.0))})
    print(f"{job.name}: done in {duration(sec)}", file=sys.stderr)


class _OwnKernel(AsyncKernelManager):
    """Starts the kernel of this interpreter, whatever kernels JUPYTER_PATH or a home folder offers."""

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[], parent=self)


class _Engine(NBClientEngine):
    """papermill's engine, telling of each code cell; the kernel logs to a file and dies with this process."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, on_cell: Callable[..., None], kernel_log: Path, **_: Any
    ) -> Any:
        options = {"startup_timeout": _KERNEL_START_SEC, "kernel_manager_class": _OwnKernel}
        client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, on_cell_execute=on_cell, **options)
        parent = os.getpid()
        with open(kernel_log, "wb") as log:
            return client.execute(stdout=log, stderr=log, preexec_fn=lambda: die_with_parent(parent))


papermill_engines.register("caprl", _Engine)


def _execute(job: Job, target: Path, monitor: "Monitor") -> None:
    """Run a notebook into `target`, which exists even when a cell failed. Raises UserError naming cell and cause."""
    kernel_log = job.folder / f"{job.name}.kernel.log"
    log_end = f"{shown(kernel_log)}:\n"
    cells = papermill.iorw.load_notebook_node(str(job.source)).cells
    tagged = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    running: list[str] = []  # each code cell that was started, by its position in the source

    def on_cell(cell: Any, cell_index: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # nbclient would report Ctrl-C as a dead kernel
            signal.signal(number, signal.default_int_handler)
        position = cell_index + (cell_index <= tagged)  # from 1; papermill puts its own cell behind the tagged one
        running.append(f"{shown(job.source)}, cell {position} (`{first_line(cell.source)}`)")
        monitor.tell(f"cell {len(running)}/{monitor.num_cells} {first_line(cell.source)}")

    with full_disk_as_user_error(target), monitor:
        try:
            notebook = papermill.execute_notebook(
                str(job.source), str(target), job.parameters, engine_name="caprl", progress_bar=False,
                kernel_name=NATIVE_KERNEL_NAME, cwd=str(job.source.parent), on_cell=on_cell, kernel_log=kernel_log,
            )  # fmt: skip
        except PapermillExecutionError as error:
            lines = str(error.evalue).strip().splitlines()
            told = "\n".join(lines[:_MESSAGE_LINES] + ["..."] * (len(lines) > _MESSAGE_LINES))
            raise UserError(f"{running[-1]}\n{error.ename}: {told}") from None
        except (DeadKernelError, RuntimeError) as error:
            if not running:
                told = f"{shown(job.source)}\nthe kernel did not start; the end of {log_end}{tail(kernel_log)}"
                raise UserError(told) from None
            if not isinstance(error, DeadKernelError):
                raise
            raise UserError(
                f"{running[-1]}\nthe kernel died: its process was killed (often the system being out of memory) or "
                "crashed. Stop other programs or use a smaller profile, then run again: it continues from what is "
                f"saved.\nThe end of {log_end}{tail(kernel_log)}"
            ) from None
    code = filter(_is_code, notebook.cells)  # one that calls exit() ends the notebook with success in papermill
    if any(cell.execution_count is None or any(o.output_type == "error" for o in cell.outputs) for cell in code):
        raise UserError(f"{running[-1]}\nthe notebook ended here without an error: a cell must not call exit()")


def _is_code(cell: Any) -> bool:
    return cell.cell_type == "code" and bool(cell.source.strip())


def first_line(source: str) -> str:
    """The first telling line of a cell, shortened."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    text = next((line for line in lines if not line.startswith("#")), lines[0] if lines else "(empty)")
    return text if len(text) <= _SOURCE_WIDTH else text[: _SOURCE_WIDTH - 3] + "..."


class Monitor(AbstractContextManager):
    """Prints to stderr: each code cell as it starts, how far the stage in it is, and what is left of the chain. A
    terminal renews the running line each second; elsewhere (a log file, CI) a line comes every ten seconds.
    """

    def __init__(self, job: Job, chain: Sequence[str], times: Mapping[str, float]):
        self.job, self.chain, self.times = job, chain, times
        cells = papermill.iorw.load_notebook_node(str(job.source)).cells
        self.num_cells = sum(map(_is_code, cells)) + 1  # one more: the cell that papermill adds
        self._start, self._terminal, self._end = time.monotonic(), sys.stderr.isatty(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Monitor":
        self.tell("starting the kernel")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """What runs from now on."""
        self._running = (text, time.time())
        self._print(text)

    def _beat(self) -> None:
        """The running cell again, with the state of its stage instead of its source, and the time left of the chain."""
        every = _TERMINAL_BEAT_SEC if self._terminal else _BEAT_SEC
        while not self._end.wait(0.5):
            if time.monotonic() - self._last_print < every:
                continue
            cell, since = self._running
            state, text, sec = read_state(self.job.side_file("progress")), cell, time.monotonic() - self._start
            left = None  # of the stage that runs, by its own pace
            if state and state["time"] >= since:
                done, total = state["done"], state["total"]
                left = state["sec"] / done * (total - done) if total and 0 < done < total else None
                text = f"{' '.join(cell.split()[:2])} {state['label']} {done}{f'/{total}' if total else ''}"
                text += f", {state['note']}" if state["note"] else ""
                text += "" if left is None else f", about {left:.0f} s left"
            later = self.chain[self.chain.index(self.job.name) :]
            if len(self.chain) > 1 and all(name in self.times for name in later):
                first, *others = (self.times[name] for name in later)
                text += f" [all: about {max(1, round((max(left or 0.0, first - sec) + sum(others)) / 60))} min left]"
            self._print(text, end="" if self._terminal else "\n")

    def _print(self, text: str, end: str = "\n") -> None:
        self._last_print = time.monotonic()
        name, chain = self.job.name, self.chain
        head = f"[{chain.index(name) + 1}/{len(chain)}] " if len(chain) > 1 else ""
        line = f"{head}{name} {duration(self._last_print - self._start):>5}  {text}"
        print(f"\r\033[K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)


def known_times(profile: str) -> dict[str, float]:
    """Executed notebook -> seconds from nothing: as measured here, else as published, at this machine's pace."""
    published = read_state(REPORTED).get(profile, {})
    measured = read_state(paths.RUNS / profile / "notebooks" / "times.json")
    both = published.keys() & measured.keys()
    pace = sum(measured[name] for name in both) / sum(published[name] for name in both) if both else 1.0
    return {name: sec * pace for name, sec in published.items()} | measured


def duration(sec: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    return str(timedelta(seconds=int(sec))).removeprefix("0:").removeprefix("0")
