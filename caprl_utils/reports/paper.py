"""The paper's own tables, read from reports/paper and never mixed with ours."""

import csv
from pathlib import Path

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.reports.tables import Cell, Source, Table, record_path

AVERAGE = "Average"
CAUTIONS = {  # table of reports/paper -> what is uncertain about it
    "figure5_left_generalization.csv": "Figure 5, left: the SEED values of the two trainings were read from a text "
    "layer and may stand in the other order (reports/paper/README.md).",
}
FILES = {  # table of reports/paper -> columns that name a row
    "table1_pretraining.csv": ("setting", "dataset"),
    "table2_image_sources.csv": ("setting", "dataset"),
    "table3_prism.csv": ("caption_model",),
    "table4_qa_per_image.csv": ("caption_model",),
    "table5_sampling_rounds.csv": ("sampling_rounds",),
    "table6_leakage.csv": ("training_data",),
    "figure5_left_generalization.csv": ("caption_model",),
}


def paper_table(file: str, caption: str, label_columns: tuple[str, ...]) -> Table:
    """A CSV of reports/paper as a table; digits stay as printed.

    label_columns: columns that name a row; their texts are joined. A printed average that rounding does not
    lead to gets a note. Raises UserError when the file is missing or has no such column.
    """
    path = paths.PAPER / file
    rows = _read(path, label_columns)
    columns = [name for name in rows[0] if name not in label_columns]
    source = record_path(path)
    body = []
    for number, row in enumerate(rows):
        cells = [Cell(row[c], _value(row[c]), sources=(Source(source, f"{number}/{c}"),)) for c in columns]
        body.append((", ".join(row[name] for name in label_columns), cells))
    cautions = [CAUTIONS[file]] if file in CAUTIONS else []
    notes = [*_average_notes(body, columns), *cautions]
    return Table(Path(file).stem, caption, label_columns[0], columns, body, notes)


def _read(path: Path, label_columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"missing {paths.shown(path)}: the paper's values come with the repository") from None
    for name in label_columns:
        if not rows or name not in rows[0]:
            raise UserError(f"{paths.shown(path)} has no column {name!r}")
    return rows


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # a column such as "trained by GRPO": yes or no


def _average_notes(body: list[tuple[str, list[Cell]]], columns: list[str]) -> list[str]:
    if AVERAGE not in columns:
        return []
    found = []
    for label, cells in body:
        printed = cells[columns.index(AVERAGE)]
        values = [c.value for c in cells if isinstance(c.value, float) and c is not printed]
        mean = sum(values) / len(values)
        away = abs(printed.value - mean)
        if away > 0.05 + 1e-9:
            found.append(
                f"{label}: the printed average {printed.text} lies {away:.3f} away from the mean of the printed "
                f"entries, {mean:.3f}"
            )
    return found


def average_notes() -> list[str]:
    """Every printed average of the paper more than 0.05 from the mean of its printed row, rows of two tables once."""
    found: dict[str, str] = {}
    for file, label_columns in FILES.items():
        table = paper_table(file, "", label_columns)
        for note in table.notes:
            if note != CAUTIONS.get(file):
                found.setdefault(note, f"{file.split('_')[0].replace('table', 'Table ')}, {note}")
    return list(found.values())


def paper_values(file: str) -> dict[tuple[str, ...], dict[str, float]]:
    """Label of a row -> column -> number as printed."""
    label_columns = FILES[file]
    return {
        tuple(row[name] for name in label_columns): {
            column: value for column, text in row.items() if isinstance(value := _value(text), float)
        }
        for row in _read(paths.PAPER / file, label_columns)
    }
