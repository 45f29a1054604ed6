"""What all benches share: the command, ways measured side by side in one run, and one page of results.

Rows go to reports/bench/bench.json (and .md), merged by name, with the machine and its load: wall times mean little
without it.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any, TypeVar

from caprl_utils import paths, runs
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic, write_json

BENCHES = ("client", "curation", "bootstrap", "reward", "same_twice")  # each is `rows()` of the module bench_NAME
ROUNDS = 5
MISSING = "–"
INTRODUCTION = (
    "The ratio says how much better ours is than what it is compared with, whichever way the unit runs: above 1 is "
    "better. A **measured** baseline ran in the same run as ours. A **target** is a limit that we set: there the ratio "
    "says how far below it ours stays. The goal is of the ratio. Three significant digits; bench.json has all."
)
HEADS = ("Bench", "Ours", "Compared with", "Better is", "Ratio", "Goal", "Unit", "n", "Machine")
Work = TypeVar("Work")


def main(names: Sequence[str]) -> int:
    """Run the named benches (default: all) and print one table; returns 1 when one could not run."""
    if unknown := sorted(set(names) - set(BENCHES)):
        print(f"error: no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    rows, failed = [], 0
    for name in names or BENCHES:
        print(f"bench {name} ...", file=sys.stderr, flush=True)
        try:
            found = importlib.import_module(f"bench_{name}").rows()
            record(found)
            rows += found
        except UserError as error:
            print(f"error: bench {name}: {error}", file=sys.stderr)
            failed = 1
    print(f"{table(rows)}\n{machine()}")
    return failed


def peak_gb() -> float:
    """GiB that this process held at most. Not getrusage's: after exec that starts at the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def side_by_side(
    ways: Mapping[str, Callable[[Work], float]], make: Callable[[int, int], Work], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Way -> what it reached in each round (units per second). In a round each way has its turn.

    make: (round, number of the call) -> the work; other work at each call, so that no cache answers.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for number, (name, way) in enumerate(ways.items()):
            found[name].append(way(make(turn, turn * len(ways) + number)))
    return found


def row(
    name: str, ours: float | Sequence[float], baseline: float | Sequence[float], goal: float | None, unit: str, n: int,
    lower: bool = False, target: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One line of the page; of several rounds the median counts, and all are kept.

    goal: of the ratio, None for a baseline that stands there to compare. lower: smaller is better. target: the
    baseline is a limit that we set, and no other program that was measured.
    """
    first, second = (v if isinstance(v, float) else statistics.median(v) for v in (ours, baseline))
    ratio = (second / first if first else None) if lower else first / second
    rounds = {} if isinstance(ours, float) else {"all": {"ours": ours, "baseline": baseline}}
    return {
        "name": name, "ours": first, "baseline": second, "ratio": ratio, "goal": goal, "unit": unit, "n": n,
        "lower": lower, "target": target, **rounds,
    }  # fmt: skip


def record(rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to reports/bench; a row replaces the one of the same name. The machine and the commit are added.

    Raises UserError for a file there that is not ours.
    """
    file = paths.REPORTS / "bench" / "bench.json"
    try:
        known = {row["name"]: row for row in json.loads(file.read_text("utf-8"))} if file.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths.shown(file)} is damaged ({error}); restore or delete it") from None
    known |= {row["name"]: {**row, "machine": machine(), "commit": runs.commit()["commit"]} for row in rows}
    ordered = sorted(known.values(), key=lambda row: row["name"])
    write_json(file, ordered)
    write_atomic(file.with_suffix(".md"), f"# Benches\n\n{INTRODUCTION}\n\n{table(ordered)}\n")


def machine() -> str:
    """Processor, cores, GPUs, and the load of the last minute."""
    found = runs.hardware()
    gpus = f", {', '.join(found['gpus'])}" if found["gpus"] else ""
    return f"{found['cpu']}, {found['cores']} cores{gpus}, load {os.getloadavg()[0]:.1f}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADS, [":---", "---:", "---:", ":---", "---:", "---:", ":---", "---:", ":---"]]
    for row in rows:
        compared = f"target {row['baseline']:g}" if row["target"] else f"measured {three_digits(row['baseline'])}"
        goal, ratio = row["goal"], row["ratio"]
        met = "" if None in (goal, ratio) else ", met" if ratio >= goal else ", missed"
        lines.append([
            row["name"], three_digits(row["ours"]), compared, "lower" if row["lower"] else "higher",
            three_digits(ratio), MISSING if goal is None else f"{goal:g}{met}", row["unit"], f"{row['n']:,}",
            row.get("machine", "this"),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def three_digits(value: float | None) -> str:
    """A figure with three significant digits and no exponent: 3972.3 -> "3,970"; None -> a dash."""
    if value is None:
        return MISSING
    places = 2 - floor(log10(abs(value))) if value else 0
    return f"{round(value, places):,.{max(0, places)}f}"
