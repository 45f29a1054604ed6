"""How numbers stand in print: the one formatter of digits, and tables in which every number knows its source.

Values that differ never print the same beside each other, nor as 0 or 100 % if they are not: they get more digits.
Rounding is half up on the decimal form (41.25: 41.3). Nothing depends on dates, run times or paths of a machine.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from caprl_utils import paths
from caprl_utils.files import write_atomic

MISSING = "–"
EQUAL_BELOW = 1e-9  # ours: nearer values differ only by the order of a summation
_MAX_DECIMALS = 12
_TEMPLATES = Environment(
    loader=PackageLoader("caprl_utils.reports", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    autoescape=lambda name: name.endswith(".html.jinja"),
)  # fmt: skip


def percent(value: float | None) -> str:
    """A share as percent without the sign: 0.4125 -> "41.3"; None -> a dash."""
    return percents([value])[0]


def percents(values: Sequence[float | None]) -> list[str]:
    """Shares that are read beside each other, as percent: [0.65604, 0.656] -> ["65.604", "65.600"]."""
    return _distinct([None if v is None else 100 * _exact(v) for v in values], 1, anchors=(0, 100))


def number(value: float | None) -> str:
    """A plain number such as a mean of tokens: 61.25 -> "61.3"; None -> a dash."""
    return numbers([value])[0]


def numbers(values: Sequence[float | None], decimals: int = 1) -> list[str]:
    """Plain numbers that are read beside each other."""
    return _distinct([None if v is None else _exact(v) for v in values], decimals, anchors=(0,))


def difference(value: float) -> str:
    """A difference of shares in percentage points, with its sign: 0.213 -> "+21.3"."""
    return differences([value])[0]


def differences(values: Sequence[float]) -> list[str]:
    """Differences of shares that are read beside each other."""
    texts = _distinct([100 * _exact(value) for value in values], 1, anchors=(0,))
    return [f"+{text}" if value > EQUAL_BELOW else text for value, text in zip(values, texts, strict=True)]


def interval(bounds: Sequence[float] | None, signed: bool = False) -> str:
    """An interval of shares in percent: (0.38, 0.443) -> "[38.0, 44.3]"; `signed` for a difference."""
    return MISSING if bounds is None else f"[{', '.join((differences if signed else percents)(bounds))}]"


def bounded(value: float, low: float, high: float) -> str:
    """A share with its interval: "41.3 [38.0, 44.3]"."""
    return f"{percent(value)} {interval((low, high))}"


def gap(value: float, low: float, high: float, decimals: int | None = None, unit: str = "") -> str:
    """A difference with its interval, of shares in points: "+8.4 [+5.6, +11.2]"; decimals: of other numbers."""
    if decimals is None:
        return f"{difference(value)}{unit} {interval((low, high), signed=True)}"
    first, *ends = numbers([value, low, high], decimals)
    return f"{'+' if value > 0 else ''}{first}{unit} [{', '.join(ends)}]"


def p_value(p: float) -> str:
    """A p-value with three decimals; below that "p < 0.001", never "p = 0.000"."""
    return "p < 0.001" if p < 0.001 else f"p = {_round(_exact(p), 3)}"


def count(value: int | None) -> str:
    """A whole number with thousands separated: 10000 -> "10,000"."""
    return MISSING if value is None else f"{value:,}"


def _exact(value: float) -> Decimal:
    """The value, free of the noise of float summation."""
    return Decimal(repr(round(float(value), 15)))


def _round(value: Decimal, decimals: int) -> str:
    rounded = value.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_UP)
    return f"{abs(rounded) if rounded == 0 else rounded:f}"  # no "-0.0"


def _distinct(values: Sequence[Decimal | None], decimals: int, anchors: Sequence[int]) -> list[str]:
    """Texts of the values; those that would print like another value, or like an anchor, get more digits."""
    known = [*(value for value in values if value is not None), *map(Decimal, anchors)]
    digits = [decimals] * len(known)
    while True:
        texts = [_round(value, d) for value, d in zip(known, digits, strict=True)]
        same = [[v for v, other in zip(known, texts, strict=True) if other == text] for text in texts]
        clash = [max(group) - min(group) > Decimal(EQUAL_BELOW) for group in same]
        if not any(clash) or max(digits) >= _MAX_DECIMALS:
            printed = iter(texts)
            return [MISSING if value is None else next(printed) for value in values]
        digits = [d + more for d, more in zip(digits, clash, strict=True)]


@dataclass(frozen=True)
class Source:
    """Where a number stands: a file (as `record_path` writes it) and the keys to it inside, joined by "/"."""

    file: str
    key: str


@dataclass(frozen=True)
class Cell:
    """What is printed, the raw value behind it, its interval if it has one, and its sources."""

    text: str = MISSING
    value: float | int | str | None = None
    interval: tuple[float, float] | None = None
    sources: tuple[Source, ...] = ()


def sources(files: Iterable[str], *keys: str) -> tuple[Source, ...]:
    """The same place in several files."""
    return tuple(Source(file, "/".join(keys)) for file in files)


def plain(value: Any, sources: Sequence[Source], print_as: Callable[[Any], str] = number) -> Cell:
    """A value without an interval; a dash for None."""
    return Cell(print_as(value), value, None, tuple(sources))


def cells_of(values: Sequence, sources: Sequence[Sequence[Source]], texts: Sequence[str]) -> list[Cell]:
    """Cells without intervals, printed beside each other."""
    return [Cell(t, v, None, tuple(s)) for t, v, s in zip(texts, values, sources, strict=True)]


def cell_of(part: Any, sources: Sequence[Source], print_as: Callable = bounded) -> Cell:
    """A value with its interval (of `part`: value, low, high), printed by `bounded` or `gap`; a dash for None."""
    if part is None:
        return Cell(sources=tuple(sources))
    bounds = part.low, part.high
    return Cell(print_as(part.value, *bounds), part.value, bounds, tuple(sources))


@dataclass(frozen=True)
class Table:
    """head: of the label column. columns: heads of the others. rows: (label, cells). words: aligned left."""

    name: str
    caption: str
    head: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    notes: Sequence[str] = ()
    words: bool = False

    def markdown(self) -> str:
        """The table, its caption above and its notes below, numbers aligned right."""
        aligned = [":---", *[":---" if self.words else "---:"] * len(self.columns)]
        rows = [[label, *(cell.text for cell in cells)] for label, cells in self.rows]
        lines = [" | ".join(t.replace("|", "\\|") for t in row) for row in ([self.head, *self.columns], aligned, *rows)]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"**{self.caption}**", "", *(f"| {line} |" for line in lines), *notes]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Everything, with the sources of each cell."""
        rows = [{"label": label, "cells": [asdict(cell) for cell in cells]} for label, cells in self.rows]
        return vars(self) | {"columns": list(self.columns), "rows": rows, "notes": list(self.notes)}


def write(
    stem: Path, facts: Mapping[str, Any], tables: Sequence[Table], text: str, runs: Sequence[Any],
    lines: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write a report: <stem>.md is the text, .json facts, tables and runs (returned), .csv `lines`, or where there are
    none every number of the tables.
    """
    lines = lines or [
        {"table": table.name, "row": label, "column": column, "value": cell.value, "low": (cell.interval or [None])[0],
         "high": (cell.interval or [None])[-1], "printed": cell.text}
        for table in tables for label, cells in table.rows for column, cell in zip(table.columns, cells, strict=True)
    ]  # fmt: skip
    writer = csv.DictWriter(sheet := io.StringIO(), list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    content = {"facts": facts, "tables": [table.as_json() for table in tables], "runs": runs}
    shown = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for kind, written in (("json", shown), ("csv", sheet.getvalue()), ("md", text)):
        write_atomic(stem.with_suffix(f".{kind}"), written)
    return content


def fill(template: str, **values: Any) -> str:
    """A text of this folder (<template>.jinja) with its values; pages of HTML are escaped, empty lines never double."""
    text = _TEMPLATES.get_template(f"{template}.jinja").render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def record_path(path: Path) -> str:
    """A run file or a report as tables name it: the same on every machine, wherever it lies."""
    path = path.absolute()
    if not path.is_relative_to(paths.RUNS):
        return str(path.relative_to(paths.PAPER.parents[1]))
    profile, kind, *inside = path.relative_to(paths.RUNS).parts
    return "/".join(["reports", profile, *inside] if kind == "reports" else ["runs", profile, kind, *inside])


def from_record_path(name: str) -> Path:
    """The file that `record_path` named; a report made here goes before the published one."""
    kind, profile, *inside = name.split("/")
    if kind == "runs":
        return paths.RUNS.joinpath(profile, *inside)
    here = paths.reports_of(profile).joinpath(*inside)
    return here if here.is_file() else paths.PAPER.parent.joinpath(profile, *inside)


def read(file: Path) -> Any:
    """What a JSON file holds; nothing, {}, where it is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def look_up(record: Any, key: str) -> Any:
    """The value that `Source.key` names."""
    for part in re.split(r"(?<! )/", key):  # a judge's pair is "better / worse"
        record = record[int(part) if isinstance(record, list) else part]
    return record
