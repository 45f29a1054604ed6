"""Command line: run the named notebooks in order, each only when it is out of date."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError, command_line, nearest
from caprl_utils.files import ACCESS_LOG_ENV
from caprl_utils.hashing import cache_key
from caprl_utils.paths import shown
from caprl_utils.progress import PROGRESS_ENV
from caprl_utils.runner import times
from caprl_utils.runner.monitor import Place, View, duration
from caprl_utils.runner.stamps import is_valid, notebook_key, read_notebook, write_stamp
from caprl_utils.runs import Lock
from caprl_utils.schema import Profile

INTERRUPTED = 130  # exit status of a command ended by Ctrl-C


@command_line
def main(argv: list[str]) -> int:
    """Returns the exit status: 0 done, 1 an error that was told, 2 wrong usage, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        run_all(arguments.notebooks, arguments.profile, arguments.parameter)
    except KeyboardInterrupt:
        print("stopped; run again to continue", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m caprl_utils.runner", description="Run notebooks.")
    parser.add_argument(
        "notebooks",
        nargs="+",
        help="names in notebooks/ or paths, in order; NAME:PARAMETER=VALUE sets one of its own",
    )
    parser.add_argument("--profile", default="mini", help="smoke, mini, one_gpu or paper")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    return parser


@dataclass(frozen=True)
class Job:
    """A notebook to run. name: of its executed copy, one for each set of parameters."""

    source: Path
    parameters: dict[str, Any]
    name: str
    key: str


def run_all(notebooks: list[str], profile_name: str, items: list[str]) -> None:
    """Run each notebook that is out of date. Raises UserError at the first failure."""
    profile = load_profile(profile_name)
    jobs = _jobs(notebooks, profile, items)
    begin = time.monotonic()
    ran = []
    for number, job in enumerate(jobs, 1):
        place = Place(
            number, len(jobs), times.expected(profile.name), [later.name for later in jobs[number:]]
        )
        ran.append(_run_one(job, profile, place))
    if any(ran):
        print(f"done in {duration(time.monotonic() - begin)}", file=sys.stderr)
    else:
        names = ", ".join(job.source.stem for job in jobs)
        print(f"{profile.name}: everything is up to date ({names})", file=sys.stderr)


def outdated(notebooks: Sequence[str], profile: Profile) -> dict[str, bool]:
    """Notebook as named -> whether it would run now; what comes after one that would run may change by it."""
    folder, found, earlier = paths.RUNS / profile.name / "notebooks", {}, False
    for text, job in zip(notebooks, _jobs(notebooks, profile, []), strict=True):
        earlier = earlier or not is_valid(folder / f"{job.name}.json", job.key)
        found[text] = earlier
    return found


def _jobs(notebooks: Sequence[str], profile: Profile, items: Sequence[str]) -> list[Job]:
    """What is to be run. Keys of the notebooks before one belong to its key: what they made new may be read there."""
    from caprl_utils.runner.parameters import parse_parameters

    jobs: list[Job] = []
    for text in notebooks:
        name, *own = text.split(":")
        source, given = _find(name), [*items, *own]
        parameters = {"profile": profile.name, **parse_parameters(given)}
        key = cache_key(notebook=notebook_key(source, profile, parameters), earlier=[job.key for job in jobs])
        copy = "-".join([source.stem, *(item.replace("/", "_") for item in sorted(given))])
        jobs.append(Job(source, parameters, copy, key))
    return jobs


def _find(name: str) -> Path:
    path = Path(name) if name.endswith(".ipynb") else paths.NOTEBOOKS / f"{name}.ipynb"
    if path.is_file():
        return path.resolve()
    known = sorted(p.stem for p in paths.NOTEBOOKS.glob("*.ipynb"))
    close = nearest(path.stem, known)
    hint = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"
    raise UserError(f"no notebook {shown(path)}{hint}")


def _run_one(job: Job, profile: Profile, place: Place) -> bool:
    """Run a notebook if it is out of date; True when it ran."""
    folder = paths.RUNS / profile.name / "notebooks"
    lock = Lock(folder / f".{job.name}.lock", f"{job.name} ({profile.name})")
    lock.acquire()
    try:
        stamp = folder / f"{job.name}.json"
        if is_valid(stamp, job.key):
            return False
        stamp.unlink(missing_ok=True)
        stopped = any(
            (folder / name).exists() for name in (f".{job.name}.tmp.ipynb", f"{job.name}.failed.ipynb")
        )
        begin = time.monotonic()
        _execute(job, folder, place)
        sec = time.monotonic() - begin
        if not stopped:  # what goes on where an earlier one was stopped takes less
            times.note(profile.name, job.name, sec)
        print(f"{job.name}: done in {duration(sec)}", file=sys.stderr)
        # the code may have been edited meanwhile: stamp what was there at the start
        write_stamp(stamp, job.key, _side_file(folder, job.name, "access"))
    finally:
        lock.release()
    return True


def _execute(job: Job, folder: Path, place: Place) -> None:
    from caprl_utils.environment import check_environment

    check_environment()
    from caprl_utils.runner.execute import execute

    temporary, failed = folder / f".{job.name}.tmp.ipynb", folder / f"{job.name}.failed.ipynb"
    progress_file, access_log = (_side_file(folder, job.name, kind) for kind in ("progress", "access"))
    for file in (temporary, progress_file, access_log):
        file.unlink(missing_ok=True)
    _prepare_environment(progress_file, access_log)
    view = View(job.name, place, progress_file)
    try:
        execute(job.source, temporary, job.parameters, view, folder / f"{job.name}.kernel.log")
    except UserError as error:
        if not _is_whole(temporary):
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, failed)
        raise UserError(f"{error}\nthe failed copy is {shown(failed)}") from None
    os.replace(temporary, folder / f"{job.name}.ipynb")
    failed.unlink(missing_ok=True)


def _is_whole(notebook: Path) -> bool:
    """False for a copy that is missing or was cut off by a full disk."""
    try:
        return bool(read_notebook(notebook))
    except (UserError, OSError):
        return False


def _side_file(folder: Path, name: str, kind: str) -> Path:
    return folder / f".{name}.{kind}"


def _prepare_environment(progress_file: Path, access_log: Path) -> None:
    """For the kernel, which inherits our environment."""
    python_path = [str(paths.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(
        {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(python_path)),
            "CAPRL_RUNS": str(paths.RUNS),
            PROGRESS_ENV: str(progress_file),
            ACCESS_LOG_ENV: str(access_log),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
    )
