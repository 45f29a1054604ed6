"""Writing files so that a reader never sees half of one, and a full disk is told as such."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_native_id
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.paths import shown

ACCESS_LOG_ENV = "CAPRL_ACCESS_LOG"


@contextmanager
def full_disk_as_user_error(path: Path) -> Iterator[None]:
    """Turn "no space left" into a UserError that says where, and how much is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = next(p for p in [path, *path.absolute().parents] if p.exists())
        free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MB free in {shown(folder)}"
        mend = "Free some space, or set CAPRL_RUNS to a folder on another disk, then run again: it goes on from here."
        raise UserError(f"the disk is full: {shown(path)} could not be written ({free}). {mend}") from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file, also when several processes do: a name of its own beside it, fsync, rename. Raises UserError
    on a full disk.
    """
    with appearing(path, f"{get_native_id()}.tmp") as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    if path.parent.name == "reports":
        note_access(path)


@contextmanager
def appearing(path: Path, ending: str = "tmp") -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends without an error, and goes otherwise.
    Raises UserError on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{ending}")
    try:
        with full_disk_as_user_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """write_atomic of indented JSON; NaN is refused, because missing is None."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that holds any, as JSON Lines has them: ended by a line feed and by nothing else
    that Unicode calls a line end; a byte order mark is no text.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            yield number, line


def note_access(path: Path) -> None:
    """Tell the runner that a notebook read or wrote this record or report: it runs again when the file is gone."""
    if target := os.environ.get(ACCESS_LOG_ENV):
        with full_disk_as_user_error(Path(target)), open(target, "a", encoding="utf-8") as file:
            file.write(f"{path.absolute()}\n")
