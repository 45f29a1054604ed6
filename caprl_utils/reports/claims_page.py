"""One table over every statement of the paper that its tables and figures carry, with our verdict.

    python -m caprl_utils.reports.claims_page --profile mini

Read from the reports' own JSON files, so a verdict here is that of the table it comes from; what was not run says so,
and what the mini world has built in is listed with the reason and counted apart.
Writes reports/claims.md for profile mini (<report folder>/claims.md for others), claims.csv and claims.json.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import command_line
from caprl_utils.files import note_access, write_atomic
from caprl_utils.reports import numbers, paper, report3
from caprl_utils.reports.claims import BY_CONSTRUCTION, MARGIN, WINDOW_STEPS, Claim, printed
from caprl_utils.reports.commands import profile_of
from caprl_utils.reports.statements import Group, groups
from caprl_utils.reports.tables import Cell, Source, Table, json_text, record_path
from caprl_utils.schema import Profile

NOT_RUN = "not run"
SUPPORTED = "supported"
VERDICTS = (SUPPORTED, "not supported", "undecided", BY_CONSTRUCTION, NOT_RUN)
P_LEVEL = 0.05  # of corrected p-values; verdicts go by the interval
INTRODUCTION = (
    "A statement is tested by the 95 % interval of a paired difference between our own runs, resampled by image: "
    "**supported** when the interval lies on the statement's side of zero, **not supported** when it lies on the "
    f'other, **undecided** when it holds zero. "No gain" is supported when the interval ends below {MARGIN:.0%} of the '
    'questions, "as good" when it begins above minus that. Rewards compare the first and last '
    f"{WINDOW_STEPS} steps. **By construction**: the models were made so, which tests nothing. n says how many "
    "evaluated models stand on either side; where it is one, how much trainings with another seed differ is not in the "
    "interval. Verdicts are not corrected for their number: about 1 in 40 false statements would come out as supported "
    "by chance. p, beside statements of accuracy, is corrected after Holm over the tests of its table or figure. "
    "Verdicts hold for our models and benchmarks at this size, not for the paper's."
)


def write(profile: Profile, folder: Path | None = None) -> dict[str, Any]:
    """Write claims.md, .csv and .json from the reports in a profile's folder; returns what the JSON holds.

    folder: for the page as well. Raises UserError when smoke numbers would enter reports/.
    """
    page = (folder or page_folder(profile)) / "claims.md"
    folder = folder or report3.report_folder(profile)
    report3.refuse_smoke(profile, folder)
    rows = [row for group in groups(profile) for row in _rows(group, folder, report3.report_folder(profile))]
    table = claims_table(rows)
    facts = {
        "profile": profile.name,
        "counts": {word: sum(row["verdict"] == word for row in rows) for word in VERDICTS},
        "supported_one_training": _ids(row for row in _supported(rows) if _single(row["found"])),
        "supported_large_p": _ids(row for row in _supported(rows) if _weak(row["found"])),
        "printed_averages": paper.average_notes(),
    }
    content = {
        "facts": facts,
        "tables": [table.as_json()],
        "runs": _provenance(rows, folder),
    }
    write_atomic(folder / "claims.json", json_text(content))
    write_atomic(folder / "claims.csv", _csv(rows))
    write_atomic(page, markdown(profile, rows, table, facts, os.path.relpath(folder, page.parent)))
    return content


def page_folder(profile: Profile) -> Path:
    """Where claims.md goes: profile mini's stands in reports/ itself."""
    return paths.REPORTS if profile.name == "mini" else report3.report_folder(profile)


def _rows(group: Group, folder: Path, where: Path) -> list[dict[str, Any]]:
    """One dictionary per statement; "found" is what the group's report says of it, or None.

    where: the folder that sources name, the profile's own.
    """
    file = folder / f"{group.name}.json"
    listed: list[Mapping[str, Any]] = []
    if file.is_file():
        note_access(file)
        listed = json.loads(file.read_text(encoding="utf-8"))["facts"].get("claims", [])
    places = {found["text"]: place for place, found in enumerate(listed)}
    rows = []
    for number, claim in enumerate(group.claims, 1):
        place = places.get(claim.text)
        found = None if place is None else listed[place]
        source = record_path(where / file.name) if found else None
        rows.append({
            "id": f"{group.title.split(':')[0]} ({number})", "group": group, "claim": claim, "found": found,
            "verdict": found["verdict"] if found else NOT_RUN, "report": source, "place": place,
        })  # fmt: skip
    return rows


def _supported(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["verdict"] == SUPPORTED]


def _ids(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [row["id"] for row in rows]


def _single(found: Mapping[str, Any]) -> bool:
    """Whether no more than one training stands on either side."""
    return max(found["runs"]) == 1


def _weak(found: Mapping[str, Any]) -> bool:
    """Whether the corrected p-value is no longer below the level, though the interval decides."""
    return (found.get("p") or 0.0) >= P_LEVEL


def claims_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The page's one table; every number with the runs it was compared from."""
    body = [
        (
            row["id"],
            [
                Cell(row["claim"].text), _verdict_cell(row), _difference_cell(row["found"]),
                Cell(paper_text(row["group"], row["claim"])), Cell(test_text(row["claim"])), _count_cell(row),
            ],
        )
        for row in rows
    ]  # fmt: skip
    heads = ["Statement", "Verdict", "Difference, 95 % interval, p", "The paper's numbers", "Our test", "n"]
    return Table("claims", "Statements of the paper", "Item", heads, body, words=True)


def paper_text(group: Group, claim: Claim) -> str:
    """What the paper prints for a statement: "48.3 against 39.9 (+8.4)"."""
    means = group.paper_means(claim)
    if means is None:
        return "a curve" if group.file is None else numbers.MISSING
    ours, theirs = numbers.percents([value / 100 for value in means])
    gap = numbers.difference(round(means[0] - means[1], 2) / 100)
    sign = "+" if claim.kind == "larger gain" else ""
    return f"{sign}{ours} against {sign}{theirs} ({gap})"


def test_text(claim: Claim) -> str:
    """Which rows are compared in what."""
    if claim.kind == "reward":
        return f"reward of {claim.ours}, last minus first steps, above 0"
    what = {
        "tokens": "tokens per caption",
        "larger gain": "gain in accuracy, first minus second group of benchmarks",
    }
    limit = {"no gain": f"below {MARGIN:.0%}", "as good": f"above −{MARGIN:.0%}"}.get(claim.kind, "above 0")
    where = " on those benchmarks" if claim.benchmarks and claim.kind != "larger gain" else ""
    return f"{what.get(claim.kind, 'accuracy')}{where}: {claim.subtraction} {limit}"


def _difference_cell(found: Mapping[str, Any] | None) -> Cell:
    if found is None:
        return Cell(numbers.MISSING)
    low, high = found["interval"]
    sources = tuple(Source(s["file"], s["key"]) for s in found.get("sources", []))
    text = printed(found["kind"], found["value"], low, high, found.get("p"))
    return Cell(text, found["value"], (low, high), sources)


def _count_cell(row: Mapping[str, Any]) -> Cell:
    found = row["found"] or {}
    if found.get("images") is not None:
        ours, theirs = found["runs"]
        text = f"{numbers.count(found['images'])} images; {ours} against {theirs} evaluated"
        return Cell(text, found["images"], None, _in_report(row, "images"))
    if found.get("steps") is not None:
        return Cell(f"{found['steps']} steps of one training", found["steps"], None, _in_report(row, "steps"))
    return Cell(numbers.MISSING)


def _verdict_cell(row: Mapping[str, Any]) -> Cell:
    if row["found"] is None:
        return Cell(NOT_RUN)
    return Cell(f"**{row['verdict']}**", row["verdict"], None, _in_report(row, "verdict"))


def _in_report(row: Mapping[str, Any], key: str) -> tuple[Source, ...]:
    return (Source(row["report"], f"facts/claims/{row['place']}/{key}"),)


def _provenance(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The runs behind all statements, as the reports they stand in name them."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["group"].name for row in rows if row["found"]):
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        found |= {run["file"]: run for run in content["runs"]}
    return [found[file] for file in sorted(found)]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["item", "statement", "paper_ours", "paper_theirs", "kind", "ours", "theirs", "difference",
                     "low", "high", "p", "images", "steps", "verdict"])  # fmt: skip
    for row in rows:
        claim, found = row["claim"], row["found"] or {}
        means = row["group"].paper_means(claim) or (None, None)
        writer.writerow([
            row["id"], claim.text, *(None if m is None else round(m, 2) for m in means), claim.kind, claim.ours,
            claim.theirs, found.get("value"), *found.get("interval", (None, None)), found.get("p"),
            found.get("images"), found.get("steps"), row["verdict"],
        ])  # fmt: skip
    return buffer.getvalue()


def markdown(
    profile: Profile, rows: Sequence[Mapping[str, Any]], table: Table, facts: Mapping[str, Any], base: str
) -> str:
    """The page. base: path from it to the reports."""
    parts = [
        f"# What the paper states, and what our data say (profile {profile.name})",
        *([f"> {report3.SMOKE_WARNING}"] if profile.name == "smoke" else []),
        INTRODUCTION,
        _overview(rows, base),
        _strength(facts),
        table.markdown(),
        *_built_in(rows),
        "## The paper's printed numbers",
        "Averages that lie more than 0.05 away from the mean of the printed entries of their row. The entries are "
        "rounded too, so a true mean may lie up to 0.05 off the one computed from them. Comparisons above use the "
        "averages as printed.",
        "\n".join(f"- {note}" for note in facts["printed_averages"]),
        *paper.CAUTIONS.values(),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _strength(facts: Mapping[str, Any]) -> str:
    """How firm the supported statements are: trainings behind them, and p-values after correction."""
    supported = facts["counts"][SUPPORTED]
    single, weak = (facts[name] for name in ("supported_one_training", "supported_large_p"))
    named = f": {', '.join(weak)}" if weak else ""
    return (
        f"Of the {supported} supported statements, {len(single)} rest on no more than one training a side (n: 1 "
        f"against 1, or the steps of one training), and {len(weak)} have a corrected p of {P_LEVEL} or more{named}."
    )


def _built_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not tested, because the models were made so, under the reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"] == BY_CONSTRUCTION:
            reasons.setdefault(row["claim"].built_in, []).append(row["id"])
    lines = [f"- {', '.join(ids)}: {reason}." for reason, ids in reasons.items()]
    return ["## By construction", "\n".join(lines)] if lines else []


def _overview(rows: Sequence[Mapping[str, Any]], base: str) -> str:
    """Verdicts per item."""
    by_item: dict[str, Counter] = {}
    reports = {row["group"].title: row["group"].name for row in rows if row["report"]}
    for row in rows:
        by_item.setdefault(row["group"].title, Counter())[row["verdict"]] += 1
    lines = [
        "| Item | Statements | " + " | ".join(VERDICTS) + " |",
        "| :--- |" + " ---: |" * (1 + len(VERDICTS)),
    ]
    for title, counts in by_item.items():
        item = f"[{title}]({base}/{reports[title]}.md)" if title in reports else title
        cells = [item, counts.total(), *(counts[word] or "" for word in VERDICTS)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    totals = sum(by_item.values(), Counter())
    cells = ["All", totals.total(), *(totals[word] or "" for word in VERDICTS)]
    return "\n".join([*lines, "| " + " | ".join(map(str, cells)) + " |"])


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    profile = profile_of(argv, "claims_page", __doc__)
    write(profile)
    print(paths.shown(page_folder(profile) / "claims.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
