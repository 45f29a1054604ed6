"""Run notebooks through papermill. Whether one is out of date is make's decision (Makefile); this runs it.

What papermill lets pass is an error here: an unknown parameter, a cell that calls exit. A notebook runs under
a temporary name and gets its own name when it has succeeded, dated at its start, so that whatever was edited
meanwhile is newer; a failed copy is kept as NAME.failed.ipynb. NAME.files lists the records and reports that it
read or wrote: when one of them is gone, make runs the notebook again.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from caprl_utils import paths, progress
from caprl_utils.config import parse_overrides
from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.files import ACCESS_LOG_ENV, full_disk_as_user_error, write_atomic, write_json
from caprl_utils.paths import shown
from caprl_utils.processes import die_with_parent, python_path, tail
from caprl_utils.provenance import check_environment
from caprl_utils.runs import Lock
from caprl_utils.schema import Profile

TIMES = paths.REPORTS / "bench" / "times.json"  # seconds of each notebook where the reports were made
_ENGINE = "caprl"
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


def run_all(
    notebooks: Sequence[str], profile: Profile, items: Sequence[str], chain: Sequence[str] = ()
) -> None:
    """Run notebooks in order. Raises UserError at the first failure.

    notebooks: NAME, or NAME:PARAMETER=VALUE; items: parameters of all of them; chain: all copies that the caller
    is going to run, of which these are some, for the time that is left.
    """
    jobs = [_job(text, profile, items) for text in notebooks]
    names = list(chain) or [job.name for job in jobs]
    for job in jobs:
        lock = Lock(job.side_file("lock"), f"{job.name} ({profile.name})")
        lock.acquire()
        try:
            _run(job, profile, names)
        finally:
            lock.release()


def _job(text: str, profile: Profile, items: Sequence[str]) -> Job:
    name, *own = text.split(":")
    source = Path(name) if name.endswith(".ipynb") else paths.NOTEBOOKS / f"{name}.ipynb"
    if not source.is_file():
        known = sorted(p.stem for p in paths.NOTEBOOKS.glob("*.ipynb"))
        hint = did_you_mean(source.stem, known) or f"; there are: {', '.join(known)}"
        raise UserError(f"no notebook {shown(source)}{hint}")
    parameters = {"profile": profile.name, **parse_overrides([*items, *own], "-p")}
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
            raise UserError(f"{shown(notebook)} has no parameter {name!r}{hint}")
        kind = _TYPES.get(known[name]["inferred_type_name"])
        fits = kind is None or value is None or isinstance(value, (float, int) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{shown(notebook)}: parameter {name} is {kind.__name__}, got {value!r}")


def _run(job: Job, profile: Profile, chain: Sequence[str]) -> None:
    check_environment()
    temporary, failed = job.side_file("tmp.ipynb"), job.folder / f"{job.name}.failed.ipynb"
    stopped = temporary.exists() or failed.exists()
    for kind in ("tmp.ipynb", "progress", "access"):
        job.side_file(kind).unlink(missing_ok=True)
    os.environ |= {  # for the kernel, which inherits it
        "PYTHONPATH": python_path(), "CAPRL_RUNS": str(paths.RUNS), "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        progress.PROGRESS_ENV: str(job.side_file("progress")), ACCESS_LOG_ENV: str(job.side_file("access")),
    }  # fmt: skip
    start = time.time()
    try:
        _execute(job, temporary, Monitor(job, chain, expected_times(profile.name)))
    except UserError as error:
        if "cells" not in _read(temporary, {}):
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, failed)
        raise UserError(f"{error}\nthe failed copy is {shown(failed)}") from None
    sec = time.time() - start
    access = job.side_file("access")
    files = sorted(set(access.read_text(encoding="utf-8").splitlines())) if access.exists() else []
    write_atomic(job.folder / f"{job.name}.files", "".join(f"{file}\n" for file in files))
    os.utime(temporary, (start, start))
    os.replace(temporary, job.folder / f"{job.name}.ipynb")
    failed.unlink(missing_ok=True)
    if not stopped:  # what goes on where an earlier one was stopped takes less
        _note_time(profile.name, job.name, sec)
    print(f"{job.name}: done in {duration(sec)}", file=sys.stderr)


def expected_times(profile_name: str) -> dict[str, float]:
    """Executed notebook -> seconds from nothing, measured here or as reported; empty where nothing is known."""
    reported = _read(TIMES, {}).get(profile_name, {})
    return reported | _read(paths.RUNS / profile_name / "notebooks" / "times.json", {})


def _note_time(profile_name: str, name: str, sec: float) -> None:
    """Keep the longest time of a notebook: a shorter one found some of its results made."""
    file = paths.RUNS / profile_name / "notebooks" / "times.json"
    known = _read(file, {})
    write_json(file, known | {name: max(round(sec, 1), known.get(name, 0.0))})


def _read(file: Path, default: Any) -> Any:
    """The JSON in a file, or `default` where it is missing or was cut off by a full disk."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


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
        client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, startup_timeout=_KERNEL_START_SEC)
        parent = os.getpid()
        with open(kernel_log, "wb") as log:
            return client.execute(stdout=log, stderr=log, preexec_fn=lambda: die_with_parent(parent))


papermill_engines.register(_ENGINE, _Engine)


def _execute(job: Job, target: Path, monitor: "Monitor") -> None:
    """Run a notebook into `target`, which exists afterwards even when a cell failed.

    Raises UserError naming notebook, cell and cause; KeyboardInterrupt on Ctrl-C or SIGTERM.
    """
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
                str(job.source), str(target), job.parameters,
                engine_name=_ENGINE, progress_bar=False, cwd=str(job.source.parent),
                on_cell=on_cell, kernel_log=kernel_log,
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
    return (
        f"{_where(source, *running[-1])}\n"
        "the kernel died: its process was killed (often the system being out of memory) or crashed. "
        "Stop other programs or use a smaller profile, then run again: it continues from what is saved.\n"
        f"The end of {end}"
    )


def first_line(source: str) -> str:
    """The first telling line of a cell, shortened."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    text = next((line for line in lines if not line.startswith("#")), lines[0] if lines else "(empty)")
    return text if len(text) <= _SOURCE_WIDTH else text[: _SOURCE_WIDTH - 3] + "..."


def duration(sec: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    return str(timedelta(seconds=int(sec))).removeprefix("0:").removeprefix("0")


def time_left(name: str, sec: float, chain: Sequence[str], times: dict[str, float]) -> str:
    """What is left of all notebooks of a chain after `sec` of this one; empty where some time is not known."""
    later = chain[chain.index(name) + 1 :] if name in chain else []
    if len(chain) < 2 or any(other not in times for other in (name, *later)):
        return ""
    rest = max(0.0, times[name] - sec) + sum(times[other] for other in later)
    return f" [all: about {max(1, round(rest / 60))} min left]"


class Monitor(AbstractContextManager):
    """Prints to stderr: each code cell as it starts, and how far the stage in it is.

    In a terminal the running line is renewed in place each second; elsewhere (a log file, CI) a plain line
    comes at least every ten seconds.
    """

    def __init__(self, job: Job, chain: Sequence[str], times: dict[str, float]):
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
                self._print(self._state(), renew=True)

    def _state(self) -> str:
        """The running cell, with the state of the stage in it instead of its source when there is one."""
        cell, since = self._running
        state = _read(self.job.side_file("progress"), {"time": 0.0})
        return cell if state["time"] < since else f"{' '.join(cell.split()[:2])} {progress.line(state)}"

    def _print(self, text: str, renew: bool = False) -> None:
        self._last_print = time.monotonic()
        sec, name, chain = self._last_print - self._start, self.job.name, self.chain
        head = f"[{chain.index(name) + 1}/{len(chain)}] " if len(chain) > 1 and name in chain else ""
        left = time_left(name, sec, chain, self.times) if renew else ""
        line = f"{head}{name} {duration(sec):>5}  {text}{left}"
        if self._terminal:
            print(f"\r\033[K{line}", end="" if renew else "\n", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
