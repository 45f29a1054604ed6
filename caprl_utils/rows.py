"""Append-only JSONL rows that survive `kill -9`: resume by id, each row once."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

from pydantic import BaseModel

from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.paths import shown

Row = TypeVar("Row", bound=BaseModel)


class RowStore:
    """One JSONL file of rows, each with a unique string `id`.

    A last line that was cut off by a kill is dropped and counted in `torn`. Only one process may append (a
    `Run` holds the lock); any may read. Raises UserError for a line in the middle that is no row.
    """

    def __init__(self, path: Path):
        self.path = path
        self.torn = 0
        self._ids = self._recover()
        self._file = None

    def _recover(self) -> set[str]:
        if not self.path.exists():
            return set()
        ids: set[str] = set()
        good_end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self.torn = 1
                    break
                ids.add(self._parse(line, number)["id"])
                good_end += len(line)
        if self.torn:
            os.truncate(self.path, good_end)
        return ids

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if not isinstance(row["id"], str):
                raise TypeError("id is no text")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{shown(self.path)}, line {number} is no row with a text `id` ({error}). "
                "The file was changed from outside; delete that line and run again."
            ) from None
        return row

    def done_ids(self) -> set[str]:
        """Ids of all rows so far."""
        return set(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, row_id: str) -> bool:
        return row_id in self._ids

    def append(self, row: Mapping[str, Any] | BaseModel) -> None:
        """Add one row. Raises ValueError for an id that is there already, UserError on a full disk."""
        values = row.model_dump(mode="json") if isinstance(row, BaseModel) else dict(row)
        row_id = values.get("id")
        if not isinstance(row_id, str):
            raise ValueError(f"a row of {shown(self.path)} needs a text `id`, got {row_id!r}")
        if row_id in self._ids:
            raise ValueError(f"row {row_id!r} is in {shown(self.path)} already")
        line = json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        self._write(line)
        self._ids.add(row_id)

    def _write(self, line: bytes) -> None:
        with full_disk_as_user_error(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - kept open between rows
            start = os.fstat(self._file.fileno()).st_size
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                os.truncate(self.path, start)  # no half row stays behind
                raise

    @overload
    def read(self) -> Iterator[dict[str, Any]]: ...
    @overload
    def read(self, model: type[Row]) -> Iterator[Row]: ...
    def read(self, model: type[Row] | None = None) -> Iterator[Any]:
        """Yield all rows in the order they were added, as dicts or as `model`."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                row = self._parse(line, number)
                yield row if model is None else model.model_validate(row)

    def close(self) -> None:
        """Flush to disk and close; the next append opens again."""
        if self._file is not None:
            with full_disk_as_user_error(self.path):
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = None

    def __enter__(self) -> "RowStore":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
