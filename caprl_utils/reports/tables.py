"""A table whose every printed number knows where it came from, and its Markdown, CSV and JSON forms.

The Markdown and the CSV hold nothing that changes between two runs with the same results (no dates, paths
of a machine or run times). The JSON holds raw values and, for each cell, the run record and the key that
it was read from.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caprl_utils import paths


@dataclass(frozen=True)
class Source:
    """Where a number stands: a file (as `record_path` writes it) and the keys to it inside."""

    file: str
    key: str


@dataclass(frozen=True)
class Cell:
    """What is printed, the raw value behind it, its interval if it has one, and its sources."""

    text: str
    value: float | int | str | None = None
    interval: tuple[float, float] | None = None
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Table:
    """columns: heads of the columns after the first. rows: (label, cells). head: head of the label
    column. words: columns hold words, so they are aligned left.
    """

    name: str
    caption: str
    head: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    notes: Sequence[str] = field(default=())
    words: bool = False

    def __post_init__(self) -> None:
        for label, cells in self.rows:
            if len(cells) != len(self.columns):
                raise ValueError(
                    f"table {self.name}, row {label!r}: {len(cells)} cells for {len(self.columns)} columns"
                )

    def cell(self, row: str, column: str) -> Cell:
        """The cell of a row label and a column head. Raises KeyError naming what there is."""
        for label, cells in self.rows:
            if label == row and column in self.columns:
                return cells[list(self.columns).index(column)]
        labels = [label for label, _ in self.rows]
        raise KeyError(
            f"table {self.name} has rows {labels} and columns {list(self.columns)}, not {row!r}, {column!r}"
        )

    def markdown(self) -> str:
        """The table, its caption above and its notes below, numbers aligned right."""
        lines = [f"**{self.caption}**", ""]
        lines.append(_line([self.head, *self.columns]))
        lines.append(_line([":---", *(":---" if self.words else "---:" for _ in self.columns)]))
        lines += [_line([label, *(cell.text for cell in cells)]) for label, cells in self.rows]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Long form, one number a line: row, column, raw value, interval."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["table", "row", "column", "value", "low", "high", "printed"])
        for label, cells in self.rows:
            for column, cell in zip(self.columns, cells, strict=True):
                low, high = cell.interval or (None, None)
                writer.writerow([self.name, label, column, cell.value, low, high, cell.text])
        return buffer.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Everything, with the sources of each cell."""
        return {
            "name": self.name,
            "caption": self.caption,
            "columns": list(self.columns),
            "rows": [
                {"label": label, "cells": [_cell_json(cell) for cell in cells]} for label, cells in self.rows
            ],
            "notes": list(self.notes),
        }


def record_path(path: Path) -> str:
    """A run file or a report as tables name it: the same on every machine, wherever CAPRL_RUNS points."""
    path = path.absolute()
    for prefix, folder in _folders().items():
        if path.is_relative_to(folder):
            return f"{prefix}{path.relative_to(folder)}"
    return str(path.relative_to(paths.ROOT))


def from_record_path(name: str) -> Path:
    """The file that `record_path` named."""
    for prefix, folder in _folders().items():
        if name.startswith(prefix):
            return folder / name.removeprefix(prefix)
    return paths.ROOT / name


def _folders() -> dict[str, Path]:
    return {"runs/": paths.RUNS, "reports/paper/": paths.PAPER, "reports/": paths.REPORTS}


def look_up(record: Any, key: str) -> Any:
    """The value under keys joined by "/", as `Source.key` holds them. Raises KeyError naming the missing
    part.
    """
    for part in key.split("/"):
        try:
            record = record[int(part)] if isinstance(record, list) else record[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise KeyError(f"{key}: there is no {part!r}") from None
    return record


def json_text(value: Any) -> str:
    """Indented JSON as reports are written."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {
        "text": cell.text,
        "value": cell.value,
        "interval": list(cell.interval) if cell.interval else None,
        "sources": [{"file": s.file, "key": s.key} for s in cell.sources],
    }


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
