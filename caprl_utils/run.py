"""Run notebooks through papermill. Whether one is out of date is make's decision (Makefile); this runs it.

A notebook runs under a temporary name and gets its own when it has succeeded, dated at its start, so that whatever was
edited meanwhile is newer; a failed copy is kept as NAME.failed.ipynb. NAME.files lists the records and reports that it
read or wrote: when one of them is gone, make runs the notebook again.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from caprl_utils import paths, plan, progress
from caprl_utils.config import parse_overrides
from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.files import ACCESS_LOG_ENV, full_disk_as_user_error, write_atomic
from caprl_utils.paths import shown
from caprl_utils.processes import die_with_parent, python_path, tail
from caprl_utils.progress import Times, duration, read_state
from caprl_utils.provenance import check_environment
from caprl_utils.runs import Lock
from caprl_utils.schema import Profile

_MESSAGE_LINES = 12
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KERNEL_START_SEC = 120  # a loaded machine takes long to import
_BEAT_SEC, _TERMINAL_BEAT_SEC = 10.0, 1.0
_SOURCE_WIDTH = 60
_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}


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
    """Run notebooks in order. Raises UserError at the first failure.

    notebooks: NAME, or NAME:PARAMETER=VALUE; items: parameters of all; chain: all copies that the caller is going to
    run, of which these are some: all that it still needs is looked up first, and the time left told.
    """
    jobs = [_job(text, profile, items) for text in notebooks]
    check_environment()
    if jobs[0].name in chain:
        plan.check(profile, chain[chain.index(jobs[0].name) :])
    for job in jobs:
        lock = Lock(job.side_file("lock"), f"{job.name} ({profile.name})")
        lock.acquire()
        try:
            _run(job, profile, list(chain) or [job.name for job in jobs])
        finally:
            lock.release()


def _job(text: str, profile: Profile, items: Sequence[str]) -> Job:
    name, *own = text.split(":")
    source = Path(name) if name.endswith(".ipynb") else paths.NOTEBOOKS / f"{name}.ipynb"
    if not source.is_file():
        known = sorted(p.stem for p in paths.NOTEBOOKS.glob("*.ipynb"))
        hint = did_you_mean(source.stem, known) or f"; there are: {', '.join(known)}"
        raise UserError(f"no notebook {shown(source)}{hint}")
    parameters = {"profile": profile.name, **parse_overrides([*items, *own], "-p", "seed=1")}
    _check_parameters(source, parameters)
    suffixes = [item.replace("/", "_").replace("=", "-") for item in sorted([*items, *own])]
    folder = paths.RUNS / profile.name / "notebooks"
    return Job(source.resolve(), parameters, "-".join([source.stem, *suffixes]), folder)


def _check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Compare with the notebook's cell tagged `parameters`. Raises UserError with the nearest name."""
    try:
        known = papermill.inspect_notebook(str(notebook))
    except Exception as error:  # whatever nbformat finds wrong with it
        raise UserError(f"{shown(notebook)} is no notebook ({type(error).__name__}: {error})") from None
    if not known:
        raise UserError(f"{shown(notebook)} has no cell tagged `parameters`; one is needed, with `profile`")
    for name, value in parameters.items():
        if name not in known:
            hint = f"{did_you_mean(name, known)}; it has: {', '.join(sorted(known))}"
            hint += f"; a setting: --set {name}={value}" if "." in name else ""
            raise UserError(f"{shown(notebook)} has no parameter {name!r}{hint}")
        kind = _TYPES.get(known[name]["inferred_type_name"])
        fits = kind is None or value is None or isinstance(value, (float, int) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{shown(notebook)}: parameter {name} is {kind.__name__}, got {value!r}")


def _run(job: Job, profile: Profile, chain: Sequence[str]) -> None:
    temporary, failed = job.side_file("tmp.ipynb"), job.folder / f"{job.name}.failed.ipynb"
    stopped = temporary.exists() or failed.exists()
    for kind in ("tmp.ipynb", "progress", "access"):
        job.side_file(kind).unlink(missing_ok=True)
    access = job.side_file("access")
    os.environ |= {  # for the kernel, which inherits it
        "PYTHONPATH": python_path(), "CAPRL_RUNS": str(paths.RUNS), "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        progress.PROGRESS_ENV: str(job.side_file("progress")), ACCESS_LOG_ENV: str(access),
    }  # fmt: skip
    start = time.time()
    try:
        _execute(job, temporary, Monitor(job, chain, Times.of(profile.name)))
    except UserError as error:
        if "cells" not in read_state(temporary, {}):
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
    if not stopped:  # what goes on where an earlier one was stopped takes less
        progress.note_time(profile.name, job.name, sec)
    print(f"{job.name}: done in {duration(sec)}", file=sys.stderr)


class _OwnKernel(AsyncKernelManager):
    """Starts the kernel of this interpreter, whatever kernels JUPYTER_PATH or a home folder offers."""

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[], parent=self)


class _Engine(NBClientEngine):
    """papermill's engine, reporting each cell; the kernel logs to a file and dies with this process."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, on_cell: Callable[[int, Any], None], kernel_log: Path, **_: Any
    ) -> Any:
        plain_start = nb_man.cell_start  # `on_cell` gets index and cell before each

        def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> None:
            on_cell(cell_index, cell)
            plain_start(cell, cell_index, **more)

        nb_man.cell_start = cell_start
        options = {"startup_timeout": _KERNEL_START_SEC, "kernel_manager_class": _OwnKernel}
        client, parent = PapermillNotebookClient(nb_man, kernel_name=kernel_name, **options), os.getpid()
        with open(kernel_log, "wb") as log:
            return client.execute(stdout=log, stderr=log, preexec_fn=lambda: die_with_parent(parent))


papermill_engines.register("caprl", _Engine)


def _execute(job: Job, target: Path, monitor: "Monitor") -> None:
    """Run a notebook into `target`, which exists even when a cell failed. Raises UserError naming cell and cause."""
    kernel_log = job.folder / f"{job.name}.kernel.log"
    running: list[Any] = []  # (index, source) of each code cell that was started

    def on_cell(index: int, cell: Any) -> None:
        _interrupt_at_once()
        if _is_code(cell):
            running.append((index, cell.source))
            monitor.cell_start(len(running), cell.source)

    with full_disk_as_user_error(target), _signals_restored(), monitor:
        try:
            notebook = papermill.execute_notebook(
                str(job.source), str(target), job.parameters, engine_name="caprl", progress_bar=False,
                kernel_name=NATIVE_KERNEL_NAME, cwd=str(job.source.parent), on_cell=on_cell, kernel_log=kernel_log,
            )  # fmt: skip
        except PapermillExecutionError as error:
            raise UserError(_cell_message(job.source, error)) from None
        except (DeadKernelError, RuntimeError) as error:
            if running and not isinstance(error, DeadKernelError):
                raise
            raise UserError(_dead_kernel_message(job.source, running, kernel_log)) from None
    for index, cell in enumerate(notebook.cells):
        # a cell that calls exit() ends the notebook with success in papermill
        failed = cell.get("execution_count") is None or any(o.output_type == "error" for o in cell.outputs)
        if _is_code(cell) and failed:
            told = "the notebook ended here without an error: a cell must not call exit()"
            raise UserError(f"{_where(job.source, index, cell.source)}\n{told}")


def _is_code(cell: Any) -> bool:
    return cell.cell_type == "code" and bool(cell.source.strip())


@contextmanager
def _signals_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt_at_once() -> None:
    """Put our handlers over nbclient's, which would report Ctrl-C as a dead kernel."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for number in _STOP_SIGNALS:
        signal.signal(number, stop)


def _where(source: Path, index: int, cell: str) -> str:
    """Name a cell, given its index in the executed copy, by its position in the source notebook (from 1)."""
    cells = papermill.iorw.load_notebook_node(str(source)).cells
    tagged = [i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])]
    position = index + 1 if index <= tagged[0] else index  # papermill puts its own cell behind the tagged one
    return f"{shown(source)}, cell {position} (`{first_line(cell)}`)"


def _cell_message(source: Path, error: PapermillExecutionError) -> str:
    text = str(error.evalue).strip().splitlines()
    shortened = "\n".join(text[:_MESSAGE_LINES] + (["..."] if len(text) > _MESSAGE_LINES else []))
    return f"{_where(source, error.cell_index, error.source)}\n{error.ename}: {shortened}"


def _dead_kernel_message(source: Path, running: Sequence[Any], kernel_log: Path) -> str:
    end = f"{shown(kernel_log)}:\n{tail(kernel_log)}"
    if not running:
        return f"{shown(source)}\nthe kernel did not start; the end of {end}"
    told = (
        "the kernel died: its process was killed (often the system being out of memory) or crashed. "
        "Stop other programs or use a smaller profile, then run again: it continues from what is saved."
    )
    return f"{_where(source, *running[-1])}\n{told}\nThe end of {end}"


def first_line(source: str) -> str:
    """The first telling line of a cell, shortened."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    text = next((line for line in lines if not line.startswith("#")), lines[0] if lines else "(empty)")
    return text if len(text) <= _SOURCE_WIDTH else text[: _SOURCE_WIDTH - 3] + "..."


class Monitor(AbstractContextManager):
    """Prints to stderr: each code cell as it starts, how far the stage in it is, and what is left of the chain.

    A terminal renews the running line each second; elsewhere (a log file, CI) a line comes every ten seconds.
    """

    def __init__(self, job: Job, chain: Sequence[str], times: Times):
        self.job, self.chain, self.times = job, chain, times
        cells = papermill.iorw.load_notebook_node(str(job.source)).cells
        self._num_cells = sum(map(_is_code, cells)) + 1  # one more: the cell that papermill adds
        self._running = ("starting the kernel", time.time())  # cell, since when
        self._start, self._terminal, self._end = time.monotonic(), sys.stderr.isatty(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Monitor":
        self._print(self._running[0])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def cell_start(self, number: int, source: str) -> None:
        """Code cell `number` (from 1) is about to run."""
        self._running = (f"cell {number}/{self._num_cells} {first_line(source)}", time.time())
        self._print(self._running[0])

    def _beat(self) -> None:
        every = _TERMINAL_BEAT_SEC if self._terminal else _BEAT_SEC
        while not self._end.wait(0.5):
            if time.monotonic() - self._last_print >= every:
                self._renew()

    def _renew(self) -> None:
        """The running cell again, with the state of its stage instead of its source, and the time left of the chain."""
        cell, since = self._running
        state = read_state(self.job.side_file("progress"), None)
        state = state if state and state["time"] >= since else None
        text = f"{' '.join(cell.split()[:2])} {progress.line(state)}" if state else cell
        left = self.times.left(self.chain, self.job.name, time.monotonic() - self._start, state)
        if len(self.chain) > 1 and left is not None:
            text += f" [all: about {max(1, round(left / 60))} min left]"
        self._print(text, renew=True)

    def _print(self, text: str, renew: bool = False) -> None:
        self._last_print = time.monotonic()
        name, chain = self.job.name, self.chain
        head = f"[{chain.index(name) + 1}/{len(chain)}] " if len(chain) > 1 and name in chain else ""
        line = f"{head}{name} {duration(self._last_print - self._start):>5}  {text}"
        if self._terminal:
            print(f"\r\033[K{line}", end="" if renew else "\n", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
