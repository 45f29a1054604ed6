"""From a printed digit to what made it: `caprl trace "table3 CapRL mini-chart"`.

The first word names a report; the others must occur in the cell's table name, row label or column head. What a report
says of its runs is enough; their files tell more where they are here.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.reports.items import NOTEBOOKS
from caprl_utils.reports.numbers import fill, from_record_path, look_up, read
from caprl_utils.rl.experiments import MAIN
from caprl_utils.schema import Profile

MAKERS = {  # stage of a run -> notebook that makes it
    "curation": "01_qa_curation", "vlm_init": "02_initialize_vlm_3b", "captions": NOTEBOOKS["prism"],
    "vqa": NOTEBOOKS["pretraining"], **NOTEBOOKS,
}  # fmt: skip
DATA = ("data", "samples", "questions", "images", "source", "captions", "file")  # names of hashes of data
MOST_SHOWN = 12  # cells listed when an item fits several
Sources = Sequence[Mapping[str, str]]  # {file, key} of each number that a cell was made from
Runs = Mapping[str, Mapping[str, Any]]  # record file -> what a report says of that run


@dataclass(frozen=True)
class Found:
    """One printed cell. own: False where it names no sources, and these are its row's."""

    name: tuple[str, str, str, str]  # report, table, row, column
    text: str
    value: Any
    sources: Sources
    runs: Runs
    own: bool


def trace(profile: Profile, item: str) -> str:
    """The cells that an item names, each with what made it. Raises UserError where none fits."""
    folder = paths.reports_of(profile.name)
    folder = folder if any(folder.glob("*.json")) else paths.REPORTS / profile.name
    if not item.split():
        raise UserError('name a cell, for example "table3 CapRL mini-chart"')
    if not (cells := find(item, folder)):
        known = [cell.name for cell in cells_of(folder, item.split()[0])]
        rows, columns = (", ".join(dict.fromkeys(name[part] for name in known)) for part in (2, 3))
        raise UserError(f"no cell of {paths.shown(folder)} fits {item!r}. Rows: {rows}. Columns: {columns}")
    told = [describe(cell) for cell in cells[:MOST_SHOWN]]
    if more := len(cells[MOST_SHOWN:]):
        told.append(f"{more} more cells fit; add a word of the row or column")
    return "\n\n".join(told)


def find(item: str, folder: Path) -> list[Found]:
    """Cells that an item names; those of one exact row or column before those that only hold the word."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9.=]+", "", text.lower())

    report, *words = item.split()
    wanted, fitting, exact = [plain(word) for word in words], [], []
    for cell in cells_of(folder, report):
        if all(word in plain(" ".join(cell.name[1:])) for word in wanted):
            fitting.append(cell)
            parts = [plain(part) for part in cell.name[2:]]  # give or take a suffix such as "-3B"
            if cell.name[1] == report and all(any(part.startswith(word) for part in parts) for word in wanted):
                exact.append(cell)
    return exact or fitting


def cells_of(folder: Path, report: str = "*") -> Iterator[Found]:
    """Every cell with a value in the reports of a folder, or in one of them. Raises UserError without any report."""
    files = sorted(folder.glob(f"{report}.json"))
    if not files:
        known = ", ".join(sorted(f.stem for f in folder.glob("*.json"))) or "none"
        where = f"{paths.shown(folder)} (there are: {known})"
        raise UserError(f"no report {report} in {where}; run `make reproduce`")
    for file in files:
        content = read(file)
        runs = {run["file"]: run for run in content.get("runs", [])}
        for table, row in [(t, row) for t in content.get("tables", []) for row in t["rows"]]:
            for column, cell, sources in zip(table["columns"], row["cells"], sources_of(row), strict=True):
                if cell["value"] is not None:
                    name = (file.stem, table["name"], row["label"], column)
                    yield Found(name, cell["text"], cell["value"], sources, runs, bool(cell["sources"]))


def sources_of(row: Mapping[str, Any]) -> list[Sources]:
    """Of every cell of a table's row its sources: its own, or of a value without any the files of the whole row."""
    files = dict.fromkeys(source["file"] for cell in row["cells"] for source in cell["sources"])
    of_row = [{"file": file, "key": ""} for file in files]
    return [cell["sources"] or (of_row if cell["value"] is not None else []) for cell in row["cells"]]


def describe(cell: Found) -> str:
    """The cell, and for each of its sources the record, the value there, code, data and command behind it."""
    files: dict[str, dict[str, Any]] = {}
    for file, key in ((source["file"], source["key"]) for source in cell.sources):
        known = files.setdefault(file, {**about(file, cell.runs), "keys": {}})
        known["keys"][key], here = None, from_record_path(file)
        if key and not known["again"] and here.is_file() and here.suffix in (".json", ".csv"):
            text = here.read_text(encoding="utf-8")
            content = list(csv.DictReader(text.splitlines())) if here.suffix == ".csv" else json.loads(text)
            known["keys"][key] = look_up(content, key)
    return fill("trace.txt", cell=cell, files=list(files.values())).rstrip()


def about(file: str, runs: Runs) -> dict[str, Any]:
    """What is known of a file: of a run's from the report itself (`runs`), and from the record where it is here."""
    if not file.startswith("runs/"):
        return {"file": file, "run": None, "again": None}
    folder = file.rsplit("/", 1)[0]
    told, here = runs.get(f"{folder}/result.json", {}), from_record_path(f"{folder}/result.json")
    record = read(here)
    again = record["key"] if record and told.get("key") not in (None, record["key"]) else None
    facts = {**dict.fromkeys(("key", "commit"), "not recorded"), "hashes": {}, **({} if again else record), **told}
    _, profile, stage, run = folder.split("/", 3)
    hashes = {"data": {}, "hashes": {}}
    for name, value in facts["hashes"].items():
        hashes["data" if name in DATA else "hashes"][name] = value
    return {
        "file": file, "run": f"{profile}/{stage}/{run}", "here": bool(record), "again": again, "facts": facts,
        "folder": folder, "profile": profile, "command": command(profile, stage, run), "hashes": hashes,
    }  # fmt: skip


@dataclass
class Records:
    """The entries at a page's end: the runs behind its cells, and the groups of runs that a cell is made from."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # anchor -> what `about` knows of a file
    groups: dict[tuple[str, ...], str] = field(default_factory=dict)  # anchors of several files -> that of their entry

    def anchor(self, sources: Sources, runs: Runs) -> str:
        """The anchor of a cell's entry, made on first use; "" of a cell without sources. runs: as of its report."""
        names: dict[str, None] = {}
        for file in dict.fromkeys(source["file"] for source in sources):
            folder = file.rsplit("/", 1)[0] if file.startswith("runs/") else file
            name = re.sub(r"[^a-z0-9]+", "-", folder.lower())
            names[name] = None
            if name not in self.files:
                self.files[name] = about(file, runs)
        return self.groups.setdefault((*names,), f"r{len(self.groups) + 1}") if len(names) > 1 else "".join(names)


def command(profile: str, stage: str, run: str) -> str:
    """What makes a run: the training behind a row of the ablations, or the notebook of its stage."""
    training = re.match(r"(\w+)-seed(\d+)", run)
    if stage in ("rl", "prism") and training and (training[1] != MAIN or training[2] != "0"):
        return f"caprl train {training[1]} --profile {profile}"
    return f"make {MAKERS.get(stage, 'reproduce')} PROFILE={profile}"
