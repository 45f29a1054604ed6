"""The README's map: paper item -> notebook -> target -> the paper's value, ours, profile and commit of the runs.

    python -m caprl_utils.reports.readme_map            write it into README.md
    python -m caprl_utils.reports.readme_map --check    exit status 1 when README.md is out of date

Values come from reports/ alone, so the map cannot drift; what has no result yet says so. Ours says which rows it
compares; of several comparisons of one kind all stand there (caprl_utils/reports/summary.py).
"""

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError, command_line
from caprl_utils.files import write_atomic
from caprl_utils.reports import numbers

START, END = "<!-- map:start -->", "<!-- map:end -->"
NOT_YET = "not yet"
PROFILES = ("paper", "one_gpu", "mini")  # the largest that has a result is shown; smoke never is


@dataclass(frozen=True)
class Item:
    """One row of the map. ours: what to say of the report's JSON; None as long as nothing makes the
    report.
    """

    name: str
    notebook: str
    target: str
    paper: Callable[[], str]
    report: str | None = None
    ours: Callable[[Mapping[str, Any]], str] | None = None


def _paper_average(file: str, column: str, *ladders: Sequence[str]) -> Callable[[], str]:
    """Text such as "39.9 to 48.3" from the last column of a CSV of reports/paper: each ladder of rows in each of the
    paper's settings.
    """

    def text() -> str:
        with open(paths.PAPER / file, encoding="utf-8", newline="") as lines:
            found = list(csv.DictReader(lines))
        settings = dict.fromkeys(row.get("setting") for row in found)
        values = {(row.get("setting"), row[column]): list(row.values())[-1] for row in found}
        return "; ".join(
            (" to " if len(ladder) == 2 else ", ").join(values[setting, row] for row in ladder)
            for setting in settings
            for ladder in ladders
        )

    return text


def _table3(content: Mapping[str, Any]) -> str:
    rows = {row["label"]: row["cells"] for row in content["tables"][0]["rows"]}
    place = content["tables"][0]["columns"].index("Average")
    base, caprl = numbers.percents([rows[label][place]["value"] for label in ("3B (base)", "CapRL-3B")])
    facts = content["facts"]
    gain = f"{numbers.difference(facts['gain'])} {numbers.interval(facts['gain_interval'], signed=True)}"
    return f"CapRL-3B against 3B (base): {base} to {caprl} ({gain})"


def _curves() -> str:
    return "curves"


def _summary(content: Mapping[str, Any]) -> str:
    return content["facts"]["summary"]


ITEMS = (
    Item(
        "Table 1: VLMs pretrained on caption sets", "04_llamafactory_pretraining", "table1",
        _paper_average("table1_pretraining.csv", "dataset", ("Vanilla", "CapRL-1M")),
        "table1.json", _summary,
    ),
    Item(
        "Table 2: the same images, other captions", "04_llamafactory_pretraining", "table2",
        _paper_average(
            "table2_image_sources.csv", "dataset", ("ShareGPT4V-1M", "CapRL-ShareGPT4V-1M"),
            ("DenseFusion-1M", "CapRL-DenseFusion-1M"),
        ),
        "table2.json", _summary,
    ),
    Item(
        "Table 3: caption quality in Prism, base to CapRL", "05_prism_evaluation", "table3",
        _paper_average("table3_prism.csv", "caption_model", ("Qwen2.5-VL-3B", "CapRL-3B")),
        "table3.json", _table3,
    ),
    Item(
        "Table 4: questions per image, 1 to 3", "03_caprl_rl_training", "table4",
        _paper_average("table4_qa_per_image.csv", "caption_model", [f"CapRL-{n}QA-20k" for n in (1, 2, 3)]),
        "table4.json", _summary,
    ),
    Item(
        "Table 5: answer rounds, 1 to 8", "03_caprl_rl_training", "table5",
        _paper_average("table5_sampling_rounds.csv", "sampling_rounds", [f"N={n}" for n in (1, 2, 4, 8)]),
        "table5.json", _summary,
    ),
    Item(
        "Table 6: leaking to filtered questions", "03_caprl_rl_training", "table6",
        _paper_average("table6_leakage.csv", "training_data", ("Leaking20k", "Refined20k")),
        "table6.json", _summary,
    ),
    Item("Figure 1c: a judge's reward to CapRL's", "03_caprl_rl_training", "figures", _curves,
         "figure1c.json", _summary),
    Item("Figure 4: growing caption sets", "04_llamafactory_pretraining", "figure4", _curves,
         "figure4.json", _summary),
    Item("Figure 5: kinds of training images", "03_caprl_rl_training", "figures", _curves,
         "figure5_left.json", _summary),
    Item("Figure 5: number of training images", "03_caprl_rl_training", "figures", _curves,
         "figure5_right.json", _summary),
)  # fmt: skip


def render() -> str:
    """The map as a Markdown table."""
    head = ["Paper item", "Notebook", "Target", "Paper", "Ours", "Profile", "Commit of the runs"]
    lines = ["| " + " | ".join(head) + " |", "|" + " :--- |" * len(head)]
    lines += ["| " + " | ".join(_row(item)) + " |" for item in ITEMS]
    return "\n".join(lines)


def _row(item: Item) -> list[str]:
    notebook, target = f"`{item.notebook}`", f"`make {item.target}`"
    for profile in PROFILES:
        file = paths.REPORTS / profile / (item.report or "")
        if item.report and file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            where = f"[{item.ours(content)}](reports/{profile}/{Path(item.report).stem}.md)"
            return [item.name, notebook, target, item.paper(), where, profile, _commit(content)]
    return [item.name, notebook, target, item.paper(), NOT_YET, "", ""]


def _commit(content: Mapping[str, Any]) -> str:
    """Short commits of the runs behind a report; a star where the code had uncommitted changes."""
    found = {(run["commit"], run.get("dirty")) for run in content["runs"] if run.get("commit")}
    return ", ".join(sorted(f"{commit[:10]}{'*' if dirty else ''}" for commit, dirty in found))


def update(readme: Path, check: bool = False) -> bool:
    """Put the map between its marks; returns whether the file was up to date. check: change nothing.

    Raises UserError when the file or its marks are missing.
    """
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UserError(f"{paths.shown(readme)} needs the lines {START} and {END}, once each, in this order")
    before, after = text.split(START)[0], text.split(END)[1]
    wanted = f"{before}{START}\n{render()}\n{END}{after}"
    if wanted != text and not check:
        write_atomic(readme, wanted)
    return wanted == text


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    check = list(argv) == ["--check"]
    if argv and not check:
        print("usage: python -m caprl_utils.reports.readme_map [--check]", file=sys.stderr)
        return 2
    readme = paths.ROOT / "README.md"
    current = update(readme, check)
    if check and not current:
        print("error: the map in README.md is out of date; run: python -m caprl_utils.reports.readme_map")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
