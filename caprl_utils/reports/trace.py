"""From a printed digit to what made it: `caprl trace "table3 CapRL mini-chart"`.

The first word names a report (a JSON in the profile's report folder); the others must occur in the cell's table name,
row label or column head. What a report says of its runs is enough; their files tell more where they are here.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.reports.items import NOTEBOOKS
from caprl_utils.reports.numbers import from_record_path, look_up
from caprl_utils.rl.experiments import MAIN
from caprl_utils.schema import Profile

MAKERS = {  # stage of a run -> target that makes it
    "curation": "01_qa_curation", "vlm_init": "02_initialize_vlm_3b", "rl": NOTEBOOKS["rl"],
    "captions": NOTEBOOKS["prism"], "prism": NOTEBOOKS["prism"], "pretraining": NOTEBOOKS["pretraining"],
    "vqa": NOTEBOOKS["pretraining"],
}  # fmt: skip
DATA = (
    "data",
    "samples",
    "questions",
    "images",
    "source",
    "captions",
    "file",
)  # names of hashes that are of data
MOST_SHOWN = 12  # cells listed when an item fits several


@dataclass(frozen=True)
class Found:
    """One printed cell.

    sources: {file, key} of each number that it was made from; those of its row where it names none (own: False).
    runs: record file -> what the report says of that run.
    """

    report: str
    table: str
    row: str
    column: str
    text: str
    value: Any
    sources: Sequence[Mapping[str, str]]
    runs: Mapping[str, Mapping[str, Any]]
    own: bool


def trace(profile: Profile, item: str) -> str:
    """The cells that an item names, each with what made it. Raises UserError where none fits."""
    folder = paths.reports_of(profile.name)
    if not item.split():
        raise UserError('name a cell, for example "table3 CapRL mini-chart"')
    cells = find(item, folder)
    if not cells:
        raise UserError(f"no cell of {paths.shown(folder)} fits {item!r}")
    told = [describe(cell) for cell in cells[:MOST_SHOWN]]
    if len(cells) > MOST_SHOWN:
        told.append(f"{len(cells) - MOST_SHOWN} more cells fit; add a word of the row or column")
    return "\n\n".join(told)


def find(item: str, folder: Path) -> list[Found]:
    """Cells that an item names; those of one exact row or column before those that only hold the word."""
    report, *words = item.split()
    wanted = [_plain(word) for word in words]
    fitting = [
        cell
        for cell in cells_of(folder, report)
        if all(word in _plain(f"{cell.table} {cell.row} {cell.column}") for word in wanted)
    ]
    # give or take a suffix such as "-3B"
    exact = [
        c for c in fitting
        if c.table == report and all(any(_plain(p).startswith(w) for p in (c.row, c.column)) for w in wanted)
    ]  # fmt: skip
    return exact or fitting


def cells_of(folder: Path, report: str = "*") -> Iterator[Found]:
    """Every cell with a value in the reports of a folder, or in one of them. Raises UserError without any report."""
    files = sorted(folder.glob(f"{report}.json"))
    if not files:
        known = ", ".join(sorted(f.stem for f in folder.glob("*.json"))) or "none"
        raise UserError(
            f"no report {report} in {paths.shown(folder)} (there are: {known}); run `make reproduce`"
        )
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        runs = {run["file"]: run for run in content.get("runs", [])}
        for table in content.get("tables", []):
            for row in table["rows"]:
                of_row = dict.fromkeys(source["file"] for cell in row["cells"] for source in cell["sources"])
                for column, cell in zip(table["columns"], row["cells"], strict=True):
                    if cell["value"] is not None:
                        yield Found(
                            file.stem, table["name"], row["label"], column, cell["text"], cell["value"],
                            cell["sources"] or [{"file": name, "key": ""} for name in of_row], runs,
                            bool(cell["sources"]),
                        )  # fmt: skip


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.=]+", "", text.lower())


def describe(cell: Found) -> str:
    """The cell, and for each of its sources the record, value, code, data and command behind it."""
    lines = [
        f"{cell.report} | {cell.table} | {cell.row} | {cell.column}",
        f"  printed {cell.text}, value {cell.value}",
    ]
    if cell.sources and not cell.own:
        lines.append("  a property of the row, whose runs are:")
    lines += _source_lines(cell.sources, cell.runs)
    return "\n".join(lines if cell.sources else [*lines, "  no source on record"])


def _source_lines(sources: Sequence[Mapping[str, str]], runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is known of each number; a file that several were read from is told once."""
    keys: dict[str, list[str]] = {}
    for source in sources:
        keys.setdefault(source["file"], []).append(source["key"])
    lines = []
    for name, found in keys.items():
        lines += [f"  {name}{f' : {key}' if key else ''}" for key in found]
        if name.startswith("reports/"):
            lines += [line for key in found for line in _report_lines(from_record_path(name), key, runs)]
        else:
            lines += _run_lines(name, found, runs)
    return lines


def _report_lines(file: Path, key: str, runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A number that another report holds, or one that the paper prints."""
    if file.suffix == ".csv":
        number, column = key.split("/", 1)
        with open(file, encoding="utf-8", newline="") as lines:
            value = list(csv.DictReader(lines))[int(number)][column]
        return [f"    holds    {value}: the paper's value as printed, row {int(number) + 1}, column {column}"]
    content = json.loads(file.read_text(encoding="utf-8"))
    whole = look_up(content, key.rsplit("/", 1)[0])
    return [f"    holds    {look_up(content, key)}", *_source_lines(whole.get("sources", []), runs)]


def _run_lines(name: str, keys: Sequence[str], runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A run's values, key, code, data, settings and command: from the report itself, and from the run's files."""
    folder = name.rsplit("/", 1)[0]
    told = runs.get(f"{folder}/result.json") or runs.get(name, {})
    here = from_record_path(f"{folder}/result.json")
    record = json.loads(here.read_text(encoding="utf-8")) if here.is_file() else {}
    lines = []
    if not record:
        lines.append(
            "    its file is not here (runs/ is not in git); what follows is the report's own record of it"
        )
    elif told.get("key") not in (None, record["key"]):
        lines.append(
            f"    was made again since this report (now key {record['key'][:16]}): make the report again"
        )
        record = {}
    elif name.endswith("/result.json"):
        lines += [f"    holds    {look_up(record, key)}" for key in keys if key]
    facts = {"key": "not recorded", "commit": "not recorded", "hashes": {}, **record, **told}
    _, profile, stage, run = folder.split("/", 3)
    data = {word: value for word, value in facts["hashes"].items() if word in DATA}
    rest = {word: value for word, value in facts["hashes"].items() if word not in DATA}
    lines.append(f"    run      {profile}/{stage}/{run}, key {facts['key'][:16]}")
    if "n" in facts:
        lines.append(f"    n        {facts['n']} ({facts['unit']}), seeds {facts['seeds']}")
    state = " with uncommitted changes" if facts.get("dirty") else ""
    finished = f", finished {facts['finished']}, {facts['wall_sec']} s" if "finished" in facts else ""
    return [
        *lines,
        f"    commit   {facts['commit']}{state}{finished}",
        f"    data     {_listed(data)}",
        f"    hashes   {_listed(rest)}",
        f"    config   {folder}/config.json (make config PROFILE={profile})",
        f"    command  {command(profile, stage, run)}",
    ]


def _listed(hashes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value[:16]}" for name, value in hashes.items()) or "not recorded"


def command(profile: str, stage: str, run: str) -> str:
    """What makes a run: the training behind a row of the ablations, or the notebook of its stage."""
    training = re.match(r"(\w+)-seed(\d+)", run)
    if stage in ("rl", "prism") and training and (training[1] != MAIN or training[2] != "0"):
        return f"caprl train {training[1]} --profile {profile}"
    return f"make {MAKERS.get(stage, 'reproduce')} PROFILE={profile}"
