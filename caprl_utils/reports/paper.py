"""What the paper prints: the CSV files of reports/paper, digits as printed, never mixed with ours."""

from __future__ import annotations

import csv
from pathlib import Path

from caprl_utils import paths
from caprl_utils.reports.items import Item, texts
from caprl_utils.reports.numbers import Cell, Source, Table, record_path

PRINTED_AVERAGE = "Average"  # column of the paper's tables


def _rows(file: str) -> list[dict[str, tuple[str, float | str]]]:
    """Column -> (as printed, number or a word such as "yes")."""

    def value(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    rows = csv.DictReader((paths.PAPER / file).read_text(encoding="utf-8").splitlines())
    return [{column: (text, value(text)) for column, text in row.items()} for row in rows]


def paper_table(file: str, caption: str) -> Table:
    """A CSV of reports/paper as a table; digits stay as printed, what is odd about them stands below."""
    rows, labels = _rows(file), texts()["paper_tables"][file]
    columns = [name for name in rows[0] if name not in labels]
    source, body = record_path(paths.PAPER / file), []
    for number, row in enumerate(rows):
        cells = [Cell(*row[c], None, (Source(source, f"{number}/{c}"),)) for c in columns]
        body.append((", ".join(row[name][0] for name in labels), cells))
    notes = [*average_notes(file), *(note for name, note in texts()["cautions"].items() if name == file)]
    return Table(Path(file).stem, caption, labels[0], columns, body, notes)


def paper_values(file: str) -> dict[tuple[str, ...], dict[str, float]]:
    """Labels of a row -> column -> number as printed."""
    labels = texts()["paper_tables"][file]
    return {
        tuple(row[name][0] for name in labels): {c: v for c, (_, v) in row.items() if isinstance(v, float)}
        for row in _rows(file)
    }


def printed_row(item: Item, label: str) -> dict[str, float] | None:
    """`paper_values` of an item's row, if it stands in the paper's table."""
    row = next((row for row in item.rows if row.label == label), None)
    return paper_values(item.paper).get(row.paper) if row else None


def average_notes(file: str) -> list[str]:
    """Printed averages of one of the paper's tables that rounding of the printed entries does not lead to."""
    notes = []
    for labels, values in paper_values(file).items():
        printed, entries = values.get(PRINTED_AVERAGE), [v for c, v in values.items() if c != PRINTED_AVERAGE]
        mean = sum(entries) / max(1, len(entries))
        if printed is not None and abs(printed - mean) > 0.05 + 1e-9:
            away = f"the printed average {printed:.1f} lies {abs(printed - mean):.3f} away from the mean"
            notes.append(f"{', '.join(labels)}: {away} of the printed entries, {mean:.3f}")
    return notes


def all_average_notes() -> list[str]:
    """Those of all of the paper's tables, rows of two tables once."""
    found: dict[str, str] = {}
    for file in texts()["paper_tables"]:
        for note in average_notes(file):
            found.setdefault(note, f"{file.split('_')[0].replace('table', 'Table ')}, {note}")
    return list(found.values())
