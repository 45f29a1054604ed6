"""From a printed digit to what made it.

    python -m caprl_utils.reporting.trace "table3 CapRL mini-chart" --profile mini
    make trace ITEM="table3 CapRL mini-chart"

The first word names a report (a JSON in the profile's report folder); the others must occur in the cell's table name,
row label or column head.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.reporting.tables import from_record_path, look_up

MAKERS = {  # stage of a run -> target that makes it
    "curation": "01_qa_curation",
    "vlm_init": "02_initialize_vlm_3b",
    "rl": "03_caprl_rl_training",
    "captions": "04_llamafactory_pretraining",
    "pretraining": "04_llamafactory_pretraining",
    "vqa": "04_llamafactory_pretraining",
    "prism": "05_prism_evaluation",
}
MOST_SHOWN = 12  # cells listed when an item fits several


@dataclass(frozen=True)
class Found:
    """One printed cell. sources: {file, key} of each number that it was made from."""

    report: str
    table: str
    row: str
    column: str
    text: str
    value: Any
    sources: tuple[Mapping[str, str], ...]

    @property
    def name(self) -> str:
        return f"{self.report} | {self.table} | {self.row} | {self.column}"


def cells_of(folder: Path, report: str | None = None) -> Iterator[Found]:
    """Every cell with a value in the reports of a folder, or in one of them. Raises UserError without any report."""
    files = sorted(f for f in folder.glob("*.json") if report in (None, f.stem))
    known = ", ".join(sorted(f.stem for f in folder.glob("*.json"))) or "none"
    if not files:
        raise UserError(
            f"no report {report or ''} in {paths.shown(folder)} (there are: {known}); run `make reproduce`"
        )
    for file in files:
        for table in json.loads(file.read_text(encoding="utf-8")).get("tables", []):
            for row in table["rows"]:
                for column, cell in zip(table["columns"], row["cells"], strict=True):
                    if cell["value"] is not None:
                        yield Found(
                            file.stem, table["name"], row["label"], column,
                            cell["text"], cell["value"], tuple(cell["sources"]),
                        )  # fmt: skip


def find(item: str, folder: Path) -> list[Found]:
    """Cells that an item names; those of one exact row or column before those that only hold the word."""
    report, *words = item.split()
    wanted = [_plain(word) for word in words]
    fitting = [
        cell
        for cell in cells_of(folder, report)
        if all(word in _plain(f"{cell.table} {cell.row} {cell.column}") for word in wanted)
    ]
    exact = [c for c in fitting if c.table == report and all(_is_part(w, c) for w in wanted)]
    return exact or fitting


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.=]+", "", text.lower())


def _is_part(word: str, cell: Found) -> bool:
    """Whether a word is the whole row label or column head, give or take a suffix such as "-3B"."""
    return any(_plain(part).startswith(word) for part in (cell.row, cell.column))


def describe(cell: Found) -> str:
    """The cell, and for each of its sources the record, value, code, data and command behind it."""
    lines = [cell.name, f"  printed {cell.text}, value {cell.value}"]
    for source in cell.sources:
        lines += _source_lines(source)
    if not cell.sources:
        lines.append("  no source on record")
    return "\n".join(lines)


def _source_lines(source: Mapping[str, str]) -> list[str]:
    file = from_record_path(source["file"])
    lines = [f"  {source['file']} : {source['key']}"]
    if not file.is_file():
        return [
            *lines,
            "    this file is not here (runs/ is not in git); the report's own JSON keeps its key and commit",
        ]
    if file.suffix != ".json":
        return [*lines, "    a value of the paper or a row file: open it"]
    record = json.loads(file.read_text(encoding="utf-8"))
    lines.append(f"    holds    {look_up(record, source['key'])}")
    if "commit" not in record:
        return lines
    state = " with uncommitted changes" if record["dirty"] else ""
    hashes = ", ".join(f"{name} {value[:10]}" for name, value in record["hashes"].items())
    return [
        *lines,
        f"    run      {record['profile']}/{record['stage']}/{record['name']}, key {record['key'][:16]}",
        f"    n        {record['n']} ({record['unit']}), seeds {record['seeds']}",
        f"    commit   {record['commit']}{state}, finished {record['finished']}, {record['wall_sec']} s",
        f"    hashes   {hashes}",
        f"    config   {Path(source['file']).parent}/config.json",
        f"    command  make {MAKERS.get(record['stage'], 'reproduce')} PROFILE={record['profile']}",
    ]


def main(argv: Sequence[str]) -> int:
    """Command line; exit status 1 when nothing fits."""
    parser = argparse.ArgumentParser(
        prog="caprl_utils.reporting.trace", description="Trace a printed number."
    )
    parser.add_argument("item", help='report, then words of row and column: "table3 CapRL mini-chart"')
    parser.add_argument("--profile", default="mini")
    arguments = parser.parse_args(argv)
    try:
        folder = paths.reports_of(load_profile(arguments.profile).name)
        if not arguments.item.split():
            raise UserError('name a cell, for example ITEM="table3 CapRL mini-chart"')
        cells = find(arguments.item, folder)
        if not cells:
            raise UserError(f"no cell of {paths.shown(folder)} fits {arguments.item!r}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(describe(cell) for cell in cells[:MOST_SHOWN]))
    if len(cells) > MOST_SHOWN:
        print(f"\n{len(cells) - MOST_SHOWN} more cells fit; add a word of the row or column")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
