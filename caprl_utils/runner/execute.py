"""Drive papermill over one notebook and name what went wrong."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.paths import shown
from caprl_utils.processes import die_with_parent, tail
from caprl_utils.runner.monitor import Monitor, View, first_line
from caprl_utils.runner.parameters import check_parameters

_ENGINE = "caprl"
_MESSAGE_LINES = 12
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KERNEL_START_SEC = 120  # a loaded machine takes long to import


class NotebookFailed(UserError):
    """A notebook did not run to its end."""


class _Engine(NBClientEngine):
    """papermill's engine, reporting each cell; the kernel logs to a file and dies with this process."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, on_cell: Callable[[int, Any], None], kernel_log: Path, **_: Any
    ) -> Any:
        """Run the cells; `on_cell` gets the index and the cell before each."""
        plain_start = nb_man.cell_start

        def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> None:
            on_cell(cell_index, cell)
            plain_start(cell, cell_index, **more)

        nb_man.cell_start = cell_start
        client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, startup_timeout=_KERNEL_START_SEC)
        parent = os.getpid()
        with open(kernel_log, "wb") as log:
            return client.execute(stdout=log, stderr=log, preexec_fn=lambda: die_with_parent(parent))


papermill_engines.register(_ENGINE, _Engine)


def execute(source: Path, target: Path, parameters: dict[str, Any], view: View, kernel_log: Path) -> None:
    """Run `source` into `target`, which exists afterwards even when a cell failed.

    Raises NotebookFailed naming notebook, cell and cause; KeyboardInterrupt on Ctrl-C or SIGTERM.
    """
    check_parameters(source, parameters)
    state = _State()
    code = [cell for cell in papermill.iorw.load_notebook_node(str(source)).cells if _runs(cell)]
    monitor = Monitor(view, len(code) + 1)  # one more: the cell that papermill adds
    with full_disk_as_user_error(target), _signals_restored(), monitor:

        def on_cell(index: int, cell: Any) -> None:
            _interrupt_at_once()
            if _runs(cell):
                state.advance(index, cell.source)
                monitor.cell_start(state.count, cell.source)

        try:
            notebook = papermill.execute_notebook(
                str(source), str(target), parameters,
                engine_name=_ENGINE, progress_bar=False, cwd=str(source.parent),
                on_cell=on_cell, kernel_log=kernel_log,
            )  # fmt: skip
        except PapermillExecutionError as error:
            raise NotebookFailed(_cell_message(source, error.cell_index, error.source, error)) from None
        except (DeadKernelError, RuntimeError) as error:
            if not (isinstance(error, DeadKernelError) or state.count == 0):
                raise
            raise NotebookFailed(_dead_kernel_message(source, state, kernel_log)) from None
    _all_cells_ran(source, notebook)


class _State:
    """Which cell runs."""

    def __init__(self) -> None:
        self.count, self.index, self.source = 0, 0, ""

    def advance(self, index: int, source: str) -> None:
        self.count, self.index, self.source = self.count + 1, index, source


def _runs(cell: Any) -> bool:
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


def _cell_message(source: Path, index: int, cell: str, error: PapermillExecutionError) -> str:
    text = str(error.evalue).strip().splitlines()
    shortened = "\n".join(text[:_MESSAGE_LINES] + (["..."] if len(text) > _MESSAGE_LINES else []))
    return f"{_where(source, index, cell)}\n{error.ename}: {shortened}"


def _dead_kernel_message(source: Path, state: _State, kernel_log: Path) -> str:
    if state.count == 0:
        return (
            f"{shown(source)}\nthe kernel did not start; the end of {shown(kernel_log)}:\n{tail(kernel_log)}"
        )
    return (
        f"{_where(source, state.index, state.source)}\n"
        "the kernel died: its process was killed (often the system being out of memory) or crashed. "
        "Stop other programs or use a smaller profile, then run again: it continues from what is saved.\n"
        f"The end of {shown(kernel_log)}:\n{tail(kernel_log)}"
    )


def _all_cells_ran(source: Path, notebook: Any) -> None:
    """A cell that calls exit() ends the notebook with success in papermill; here it is a failure."""
    for index, cell in enumerate(notebook.cells):
        if _runs(cell) and (
            cell.execution_count is None or any(o.output_type == "error" for o in cell.outputs)
        ):
            raise NotebookFailed(
                f"{_where(source, index, cell.source)}\n"
                "the notebook ended here without an error: a cell must not call exit()"
            )
