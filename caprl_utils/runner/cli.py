"""Command line: run the named notebooks in order, each only when it is out of date."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import Profile, load_profile, nearest
from caprl_utils.errors import UserError
from caprl_utils.files import ACCESS_LOG_ENV
from caprl_utils.hashing import cache_key
from caprl_utils.paths import shown
from caprl_utils.progress import PROGRESS_ENV
from caprl_utils.runner.monitor import duration
from caprl_utils.runner.stamps import is_valid, notebook_key, read_notebook, write_stamp
from caprl_utils.runs import Lock

INTERRUPTED = 130  # exit status of a command ended by Ctrl-C


def main(argv: list[str]) -> int:
    """Returns the exit status: 0 done, 1 an error that was told, 2 wrong usage, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        run_all(arguments.notebooks, arguments.profile, arguments.parameter)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
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


def run_all(notebooks: list[str], profile_name: str, items: list[str]) -> None:
    """Run each notebook that is out of date. Raises UserError at the first failure."""
    profile = load_profile(profile_name)
    named = [text.split(":") for text in notebooks]
    sources = [_find(name) for name, *_ in named]
    begin = time.monotonic()
    ran, keys = [], []
    for source, (_, *own) in zip(sources, named, strict=True):
        keys.append(_key(source, profile, [*items, *own], keys))
        ran.append(_run_one(source, profile, [*items, *own], keys[-1]))
    if any(ran):
        print(f"done in {duration(time.monotonic() - begin)}", file=sys.stderr)
    else:
        print(
            f"{profile.name}: everything is up to date ({', '.join(s.stem for s in sources)})",
            file=sys.stderr,
        )


def _find(name: str) -> Path:
    path = Path(name) if name.endswith(".ipynb") else paths.NOTEBOOKS / f"{name}.ipynb"
    if path.is_file():
        return path.resolve()
    known = sorted(p.stem for p in paths.NOTEBOOKS.glob("*.ipynb"))
    close = nearest(path.stem, known)
    hint = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"
    raise UserError(f"no notebook {shown(path)}{hint}")


def _parameters(profile: Profile, items: list[str]) -> dict[str, Any]:
    from caprl_utils.runner.parameters import parse_parameters

    return {"profile": profile.name, **parse_parameters(items)}


def _key(source: Path, profile: Profile, items: list[str], earlier: list[str]) -> str:
    """A notebook's key. Those of the notebooks before it belong to it: what they made new may be read here."""
    return cache_key(
        notebook=notebook_key(source, profile, _parameters(profile, items)), earlier=list(earlier)
    )


def _run_one(source: Path, profile: Profile, items: list[str], key: str) -> bool:
    """Run a notebook if it is out of date; True when it ran."""
    parameters = _parameters(profile, items)
    folder = paths.RUNS / profile.name / "notebooks"
    values = (item.replace("/", "_") for item in sorted(items))
    name = "-".join([source.stem, *values])  # an executed copy for each set of values
    lock = Lock(folder / f".{name}.lock", f"{name} ({profile.name})")
    lock.acquire()
    try:
        stamp = folder / f"{name}.json"
        if is_valid(stamp, key):
            return False
        stamp.unlink(missing_ok=True)
        _execute(source, name, folder, parameters)
        # the code may have been edited meanwhile: stamp what was there at the start
        write_stamp(stamp, key, _side_file(folder, name, "access"))
    finally:
        lock.release()
    return True


def _execute(source: Path, name: str, folder: Path, parameters: dict[str, Any]) -> None:
    from caprl_utils.environment import check_environment

    check_environment()
    from caprl_utils.runner.execute import execute

    temporary, failed = folder / f".{name}.tmp.ipynb", folder / f"{name}.failed.ipynb"
    progress_file, access_log = (_side_file(folder, name, kind) for kind in ("progress", "access"))
    for file in (temporary, progress_file, access_log):
        file.unlink(missing_ok=True)
    _prepare_environment(progress_file, access_log)
    begin = time.monotonic()
    try:
        execute(source, temporary, parameters, progress_file, folder / f"{name}.kernel.log")
    except UserError as error:
        if not _is_whole(temporary):
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, failed)
        raise UserError(f"{error}\nthe failed copy is {shown(failed)}") from None
    os.replace(temporary, folder / f"{name}.ipynb")
    failed.unlink(missing_ok=True)
    print(f"{name}: done in {duration(time.monotonic() - begin)}", file=sys.stderr)


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
