"""The recorded benches as Markdown, for reports/bench/bench.md and the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, log10
from typing import Any

from caprl_utils.reports.numbers import MISSING

# How the name of a bench begins whose "baseline" is a limit that we set, and no other program that was measured.
TARGETS = ("bootstrap", "curation, peak memory", "reward's share of a step")
INTRODUCTION = (
    "The ratio says how much better ours is than what it is compared with, whichever way the unit runs: above 1 is "
    "better. A **measured** baseline ran in the same run as ours. A **target** is a limit that we set: there the ratio "
    "says how far below it ours stays. The goal is of the ratio. Three significant digits; bench.json has all."
)
REWARD_NOTE = (
    "The rewards over vLLM are compared with three clients. The goal is set against the usual way: one "
    "request per question, ten tokens sampled (OpenAI's library, connections kept). The other two stand beside it "
    "without a goal: a slower one in the style of the released reward server, which opens a client per request, and a "
    "stricter one of our own, which lets an answer end where the model ends it."
)
_HEADS = ["Bench", "Ours", "Compared with", "Better is", "Ratio", "Goal", "Unit", "n"]


def bench_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The recorded benches as a Markdown page; a machine that all share is named once, above the table."""
    split = [_machine_and_load(row) for row in rows]
    machines = {machine for machine, _ in split}
    shared = len(machines) == 1
    lasts = [load if shared else row["machine"] for row, (_, load) in zip(rows, split, strict=True)]
    lines = [
        _line([*_HEADS, "Load" if shared else "Machine"]),
        "| :--- | ---: | ---: | :--- | ---: | ---: | :--- | ---: | :--- |",
        *(_line([*_cells(row), last]) for row, last in zip(rows, lasts, strict=True)),
    ]
    where = (
        [f"Machine: {machines.pop()}; its load of the minute before stands in each row."] if shared else []
    )
    notes = [REWARD_NOTE] if any(row["name"].startswith("qa_") for row in rows) else []
    return "\n\n".join(["# Benches", INTRODUCTION, *where, "\n".join(lines), *notes]) + "\n"


def three_digits(value: float | None) -> str:
    """A figure with three significant digits and no exponent: 3972.3 -> "3,970"; None -> a dash."""
    if value is None:
        return MISSING
    places = 2 - floor(log10(abs(value))) if value else 0
    return f"{round(value, places):,.{max(0, places)}f}"


def is_target(row: Mapping[str, Any]) -> bool:
    """Whether a row compares with a limit that we set, not with something measured."""
    return row["name"].startswith(TARGETS)


def lower_is_better(row: Mapping[str, Any]) -> bool | None:
    """Which way a row's unit runs, read from its ratio; None where it has none, or both sides are equal."""
    ours, theirs, ratio = row["ours"], row["baseline"], row["ratio"]
    if None in (ours, theirs, ratio) or ours == theirs or not ours or not theirs:
        return None
    return abs(ratio - theirs / ours) < abs(ratio - ours / theirs)


def _cells(row: Mapping[str, Any]) -> list[str]:
    better = {True: "lower", False: "higher", None: MISSING}[lower_is_better(row)]
    compared = MISSING
    if row["baseline"] is not None:
        compared = (
            f"target {row['baseline']:g}" if is_target(row) else f"measured {three_digits(row['baseline'])}"
        )
    goal = MISSING if row["goal"] is None else f"{row['goal']:g}"
    return [
        row["name"], three_digits(row["ours"]), compared, better, three_digits(row["ratio"]), goal, row["unit"],
        f"{row['n']:,}",
    ]  # fmt: skip


def _machine_and_load(row: Mapping[str, Any]) -> tuple[str, str]:
    """The load is another at every bench, so it says nothing about whether machines are the same."""
    machine, _, load = row["machine"].rpartition(", load ")
    return (machine, load) if machine else (row["machine"], MISSING)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
