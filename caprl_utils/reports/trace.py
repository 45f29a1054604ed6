"""From a printed digit to what made it.

    python -m caprl_utils.reports.trace "table3 CapRL mini-chart" --profile mini
    make trace ITEM="table3 CapRL mini-chart"

The first word names a report (a JSON in the profile's report folder); the others must occur in the cell's table name,
row label or column head.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError, command_line
from caprl_utils.reports.tables import from_record_path, look_up
from caprl_utils.rl.experiments import MAIN

MAKERS = {  # stage of a run -> target that makes it
    "curation": "01_qa_curation",
    "vlm_init": "02_initialize_vlm_3b",
    "rl": "03_caprl_rl_training",
    "captions": "05_prism_evaluation",
    "pretraining_data": "04_llamafactory_pretraining",
    "pretraining": "04_llamafactory_pretraining",
    "vqa": "04_llamafactory_pretraining",
    "prism": "05_prism_evaluation",
}
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
    runs: record file -> what the report says of that run, so that an answer needs no files of runs/.
    """

    report: str
    table: str
    row: str
    column: str
    text: str
    value: Any
    sources: tuple[Mapping[str, str], ...]
    runs: Mapping[str, Mapping[str, Any]]
    own: bool = True

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
        content = json.loads(file.read_text(encoding="utf-8"))
        runs = {run["file"]: run for run in content.get("runs", [])}
        for table in content.get("tables", []):
            for row in table["rows"]:
                for column, cell in zip(table["columns"], row["cells"], strict=True):
                    if cell["value"] is not None:
                        yield Found(
                            file.stem, table["name"], row["label"], column, cell["text"], cell["value"],
                            tuple(cell["sources"]) or _of_row(row), runs, bool(cell["sources"]),
                        )  # fmt: skip


def _of_row(row: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    """The records behind a whole row, each once, as the source of what is not read from one place."""
    files = dict.fromkeys(source["file"] for cell in row["cells"] for source in cell["sources"])
    return tuple({"file": file, "key": ""} for file in files)


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
    if cell.sources and not cell.own:
        lines.append("  a property of the row, whose runs are:")
    lines += _source_lines(cell.sources, cell.runs)
    if not cell.sources:
        lines.append("  no source on record")
    return "\n".join(lines)


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
            lines += _file_lines(name, found, runs)
    return lines


def _file_lines(name: str, keys: Sequence[str], runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A run: from the report itself, and from the run's files where they are here."""
    lines = []
    record_file = f"{name.rsplit('/', 1)[0]}/result.json"
    told = runs.get(record_file) or runs.get(name, {})
    here = from_record_path(record_file)
    record = json.loads(here.read_text(encoding="utf-8")) if here.is_file() else {}
    again = bool(record) and bool(told.get("key")) and record["key"] != told["key"]
    if not record:
        lines.append(
            "    its file is not here (runs/ is not in git); what follows is the report's own record of it"
        )
    elif again:
        lines.append(
            f"    was made again since this report (now key {record['key'][:16]}): make the report again"
        )
    elif name == record_file:
        lines += [f"    holds    {look_up(record, key)}" for key in keys if key]
    return [*lines, *_run_lines(record_file, {**({} if again else record), **told})]


def _report_lines(file: Path, key: str, runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A number that another report holds, or one that the paper prints."""
    if file.suffix == ".csv":
        number, column = key.split("/", 1)
        with open(file, encoding="utf-8", newline="") as lines:
            value = list(csv.DictReader(lines))[int(number)][column]
        return [f"    holds    {value}: the paper's value as printed, row {int(number) + 1}, column {column}"]
    content = json.loads(file.read_text(encoding="utf-8"))
    lines = [f"    holds    {look_up(content, key)}"]
    whole = look_up(content, key.rsplit("/", 1)[0])
    return lines + _source_lines(whole.get("sources", []), runs)


def _run_lines(record_file: str, facts: Mapping[str, Any]) -> list[str]:
    """A run's name, key, code, data, settings and command. facts: of its record, or what a report keeps of it."""
    _, profile, stage, *name, _ = record_file.split("/")
    run = "/".join(name)
    hashes = facts.get("hashes") or {}
    data = {word: value for word, value in hashes.items() if word in DATA}
    state = " with uncommitted changes" if facts.get("dirty") else ""
    lines = [f"    run      {profile}/{stage}/{run}, key {str(facts.get('key', 'not recorded'))[:16]}"]
    if "n" in facts:
        lines.append(f"    n        {facts['n']} ({facts['unit']}), seeds {facts['seeds']}")
    finished = f", finished {facts['finished']}, {facts['wall_sec']} s" if "finished" in facts else ""
    return [
        *lines,
        f"    commit   {facts.get('commit', 'not recorded')}{state}{finished}",
        f"    data     {_listed(data) or 'not recorded'}",
        f"    hashes   {_listed({k: v for k, v in hashes.items() if k not in data}) or 'not recorded'}",
        f"    config   {record_file.rsplit('/', 1)[0]}/config.json (make config PROFILE={profile})",
        f"    command  {command(profile, stage, run)}",
    ]


def _listed(hashes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value[:16]}" for name, value in hashes.items())


def command(profile: str, stage: str, run: str) -> str:
    """What makes a run: the training behind a row of the ablations, or the notebook of its stage."""
    training = re.match(r"(\w+)-seed(\d+)", run)
    if stage in ("rl", "prism") and training and (training[1] != MAIN or training[2] != "0"):
        return f"caprl train {training[1]} --profile {profile}"
    return f"make {MAKERS.get(stage, 'reproduce')} PROFILE={profile}"


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; exit status 1 when nothing fits."""
    parser = argparse.ArgumentParser(prog="caprl_utils.reports.trace", description="Trace a printed number.")
    parser.add_argument("item", help='report, then words of row and column: "table3 CapRL mini-chart"')
    parser.add_argument("--profile", default="mini")
    arguments = parser.parse_args(argv)
    folder = paths.reports_of(load_profile(arguments.profile).name)
    if not arguments.item.split():
        raise UserError('name a cell, for example ITEM="table3 CapRL mini-chart"')
    cells = find(arguments.item, folder)
    if not cells:
        raise UserError(f"no cell of {paths.shown(folder)} fits {arguments.item!r}")
    print("\n\n".join(describe(cell) for cell in cells[:MOST_SHOWN]))
    if len(cells) > MOST_SHOWN:
        print(f"\n{len(cells) - MOST_SHOWN} more cells fit; add a word of the row or column")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
