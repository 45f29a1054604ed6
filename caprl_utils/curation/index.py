"""Random access to the rows of a JSONL store without holding them in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Generic, TypeVar

from caprl_utils.records import Row

AnyRow = TypeVar("AnyRow", bound=Row)


class RowIndex(Generic[AnyRow]):
    """Rows of a finished JSONL file by id: only ids and places are kept, about 150 bytes a row."""

    def __init__(self, path: Path, model: type[AnyRow]) -> None:
        self._path, self._model = path, model
        self._places: dict[str, int] = {}
        self._file = open(path, "rb") if path.exists() else None  # noqa: SIM115 - read as long as we live
        place = 0
        for line in self._file or ():
            self._places[json.loads(line)["id"]] = place
            place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, row_id: str) -> AnyRow | None:
        """The row, or None when there is none."""
        if row_id not in self._places:
            return None
        self._file.seek(self._places[row_id])
        return self._model.model_validate_json(self._file.readline())
