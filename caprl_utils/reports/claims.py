"""Statements of the paper, each tested on our runs by an interval (`verdict`), never by a look; and the page of all.

What a profile's models cannot test is `NOT_TESTABLE`, with the reason; what rests on one training is undecided. The
page counts facts: a statement that repeats another's is linked to it. Beside each p stands the one corrected after
Holm over all facts; it decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from caprl_utils import paths
from caprl_utils.files import note_access
from caprl_utils.prism.statistics import AVERAGE, Interval, holm, t_interval
from caprl_utils.prism.told import MEASURES
from caprl_utils.reports import figures, numbers
from caprl_utils.reports.items import Claim, Item, items, texts
from caprl_utils.reports.numbers import Cell, Source, Table
from caprl_utils.reports.paper import PRINTED_AVERAGE, all_average_notes, paper_values
from caprl_utils.reports.results import Results, keys_of
from caprl_utils.reports.said import measure_of, resampled
from caprl_utils.schema import Profile

_UNITS = {"tokens": (1, " tokens"), "false count": (2, " statements a caption"), "reward": (3, "")}  # decimals, unit
WINDOW_STEPS = 10  # steps at either end of a training curve that are compared
LEAST_TRAININGS = 2  # on each trained side of a verdict
P_LEVEL = 0.05  # of corrected p-values; verdicts go by the interval
SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
NO_DIFFERENCE, NOT_TESTABLE, NOT_RUN = "no difference", "not testable here", "not run"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, UNDECIDED, NO_DIFFERENCE, NOT_TESTABLE, NOT_RUN)
ONE_TRAINING = "one training"
_BEYOND = {"as good": 1, "no gain": -1}  # kinds that ask for more than minus, or less than plus, the margin
_CSV = ["item", "statement", "paper_ours", "paper_theirs", "kind", "ours", "theirs", "difference", "low", "high", "p",
        "p_corrected", "images", "steps", "trainings_ours", "trainings_theirs", "verdict", "reason",
        "same_as"]  # fmt: skip
GAP, PAPER = "Difference, 95 % interval, p", "The paper's numbers"
HEADS = ("Statement", "Verdict", GAP, PAPER, "n", "p corrected")
SMOKE_WARNING = "Profile smoke: a handful of steps. These numbers mean nothing and stay out of reports/."


@dataclass(frozen=True)
class Finding:
    """A claim and what the data say about it; the interval is over trainings, and images or steps."""

    claim: Claim
    found: Interval
    verdict: str
    reason: str  # of a verdict that the interval does not give
    trainings: tuple[int, ...]  # of ours and of theirs; 0: it was not trained
    steps: int | None = None
    sources: tuple[Source, ...] = ()  # of the compared numbers

    def as_json(self) -> dict[str, Any]:
        """Raw values."""
        claim, found = self.claim, self.found
        return {
            **{key: getattr(claim, key) for key in ("text", "kind", "ours", "theirs", "same_as")},
            "value": found.value, "interval": [found.low, found.high], "p": found.p_value, "verdict": self.verdict,
            "reason": self.reason, "trainings": list(self.trainings), "images": found.num_clusters or None,
            "steps": self.steps, "sources": [asdict(source) for source in self.sources],
        }  # fmt: skip


def gap_text(kind: str, value: float, low: float, high: float, p: float | None = None) -> str:
    """A claim's difference with its unit and interval, and its p-value if it has one."""
    if kind in _UNITS:
        decimals, unit = _UNITS[kind]
        first, *ends = numbers.numbers([value, low, high], decimals)
        text = f"{'+' if value > 0 else ''}{first}{unit} [{', '.join(ends)}]"
    else:
        text = f"{numbers.difference(value)} points {numbers.interval((low, high), signed=True)}"
    return text if p is None else f"{text}, {numbers.p_value(p)}"


def margin(kind: str) -> float | None:
    """Within what a difference counts as none, in the unit of a kind of claims; None for those that name no margin."""
    shares = kind not in _UNITS
    return texts()["margins"].get("accuracy" if shares else kind, {}).get("within")


def test_all(results: Results) -> list[Finding]:
    """What the data say about an item's claims, those left out whose runs are not there or too short."""
    found = [(_test_reward if claim.kind == "reward" else _test)(claim, results) for claim in results.item.claims]
    return [finding for finding in found if finding is not None]


def _test(claim: Claim, results: Results) -> Finding | None:
    sides = [results.measured.get(label) for label in (claim.ours, claim.theirs)]
    if None in sides or (gap := _gap(claim, results)) is None:
        return None
    groups = [name for name in (*claim.benchmarks, *claim.others) if name in results.parts] or [AVERAGE]
    if claim.kind in MEASURES:
        sources = tuple(source for side in sides for source in side.samples(MEASURES[claim.kind].column))
    else:
        sources = tuple(source for side in sides for name in groups for source in side.sources(*keys_of(name)))
    counts = tuple(0 if None in side.columns else len(side.columns) for side in sides)
    return _finding(claim, gap, counts, sources=sources)


def _test_reward(claim: Claim, results: Results) -> Finding | None:
    """Last minus first steps, over steps and trainings. What rewards of other rows vary by is on other scales."""
    side = results.measured.get(claim.ours)
    curves = side.curves if side and side.trainings else []
    rises = [rise(curve.rewards) for curve in curves]
    if not rises or None in rises:
        return None
    values, variances = zip(*rises, strict=True)
    many = len(rises)
    between = float(np.var(values, ddof=1)) / many if many > 1 else 0.0
    test = t_interval(value := _mean(values), sum(variances) / many**2, between, many - 1)
    sources = tuple(Source(curve.file, "reward") for curve in curves)
    found = Interval(value, *test[:2], 0, test[2], many)
    return _finding(claim, found, (many,), len(curves[0].rewards), sources)


def _finding(claim: Claim, found: Interval, *facts: Any, **more: Any) -> Finding:
    if claim.not_testable:
        return Finding(claim, replace(found, p_value=None), NOT_TESTABLE, claim.not_testable, *facts, **more)
    return Finding(claim, found, *verdict(found, claim.kind), *facts, **more)


def _gap(claim: Claim, results: Results) -> Interval | None:
    sides, beyond = (claim.ours, claim.theirs), _BEYOND.get(claim.kind, 0)
    if claim.kind in MEASURES:
        part = resampled(results, sides, claim.kind, (claim.share, 1.0))
        return part and results.contrast(part, *sides, results.spread(measure_of(claim.kind)))
    if claim.kind != "larger gain":
        null = -beyond * margin(claim.kind)
        return results.difference(*sides, claim.benchmarks, null=null, side=beyond)
    groups = (claim.benchmarks, claim.others)  # how much more ours gains on the first than on the second
    if not all(any(name in results.parts for name in group) for group in groups):
        return None
    first, second = (results.part_of(group) for group in groups)
    values = [results.mean_on(group) for group in groups]
    both = replace(
        first, means=first.means - second.means, samples=first.samples - second.samples,
        num_clusters=first.num_clusters + second.num_clusters, num_rows=first.num_rows + second.num_rows,
    )  # fmt: skip
    return results.contrast(both, *sides, results.spread(lambda record: values[0](record) - values[1](record)))


def verdict(found: Interval, kind: str = "accuracy") -> tuple[str, str]:
    """(verdict, reason) by the 95 % interval: a difference lies above zero; "no gain" ends below the margin, "as good"
    begins above minus that. Not supported: it lies on the other side of zero. No difference: within the margin.
    """
    if found.trainings is not None and found.trainings < LEAST_TRAININGS:
        return UNDECIDED, ONE_TRAINING
    low, high, near = found.low, found.high, margin(kind)
    yes = {"no gain": lambda: high < near, "as good": lambda: low > -near}.get(kind, lambda: low > 0)()
    no = low > 0 if kind == "no gain" else high < 0
    equal = near is not None and -near < low and high < near
    return (SUPPORTED if yes else NOT_SUPPORTED if no else NO_DIFFERENCE if equal else UNDECIDED), ""


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last `WINDOW_STEPS` steps."""
    return _mean(values[:WINDOW_STEPS]), _mean(values[-WINDOW_STEPS:])


def rise(rewards: Sequence[float]) -> tuple[float, float] | None:
    """(last minus first, its variance): means over `WINDOW_STEPS` at either end, steps independent; None below four."""
    width = min(WINDOW_STEPS, len(rewards) // 2)
    if width < 2:
        return None
    first, last = rewards[:width], rewards[-width:]
    return _mean(last) - _mean(first), float(np.var(first, ddof=1) + np.var(last, ddof=1)) / width


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Statement:
    """A claim of an item and what its report says of it (None: not run). corrected: its p after Holm over all facts."""

    id: str
    item: Item
    claim: Claim
    found: Mapping[str, Any] | None = None
    corrected: float | None = None

    @property
    def verdict(self) -> str:
        return self.found["verdict"] if self.found else NOT_RUN


def statements(item: Item, found: Sequence[Mapping[str, Any]]) -> list[Statement]:
    """An item's claims in order. found: what its report says of those that it tested."""
    there = {one["text"]: one for one in found}
    numbered = enumerate(item.claims, 1)
    return [Statement(f"{item.short} ({n})", item, claim, there.get(claim.text)) for n, claim in numbered]


def page(profile: Profile, folder: Path) -> tuple[dict[str, Any], str, str]:
    """(JSON, CSV, Markdown) over every statement of the paper, from the reports in the folder; draws them beside it."""
    runs: dict[str, Mapping[str, Any]] = {}
    rows = [row for item in items(profile).values() if not item.ours for row in _reported(item, folder, runs)]
    ps = {row.id: row.found["p"] for row in rows if row.found and not row.claim.same_as}
    corrected = holm({name: p for name, p in ps.items() if p is not None})
    rows = [replace(row, corrected=corrected.get(row.id)) for row in rows]
    supported = [row for row in rows if row.verdict == SUPPORTED and not row.claim.same_as]
    facts = {
        "profile": profile.name, "statements": len(rows), "counts": counted(rows), "tests": len(corrected),
        "supported_large_p": [row.id for row in supported if row.corrected >= P_LEVEL],
        "printed_averages": all_average_notes(),
    }  # fmt: skip
    first = claims_table(headlines(rows), "findings", "Findings", HEADS[:3])
    table = claims_table(rows, "claims", "Every statement of the paper", HEADS)
    figures.plot_forest(_forest(rows), folder / "claims", "The paper's statements in our data", profile)
    text = numbers.fill(
        "claims.md", profile=profile, facts=facts, findings=first, table=table, warning=SMOKE_WARNING,
        overview=_overview(rows), cautions=texts()["cautions"].values(), margins=texts()["margins"],
        window=WINDOW_STEPS, level=P_LEVEL, least=LEAST_TRAININGS,
    )  # fmt: skip
    content = {"facts": facts, "tables": [first.as_json(), table.as_json()], "runs": [runs[f] for f in sorted(runs)]}
    return content, numbers.csv_text([_CSV, *map(_csv_line, rows)]), text


def counted(rows: Sequence[Statement]) -> dict[str, int]:
    """Facts by verdict: statements that repeat another's fact are not among them."""
    return {word: sum(row.verdict == word and not row.claim.same_as for row in rows) for word in VERDICTS}


def headlines(rows: Sequence[Statement]) -> list[Statement]:
    """What the page begins with: the first fact of every item, and whatever the data do not bear out."""
    facts = [row for row in rows if row.found and not row.claim.same_as]
    first = {row.item.name: row.id for row in reversed(facts)}
    return [row for row in facts if row.id == first[row.item.name] or row.verdict in (NOT_SUPPORTED, NO_DIFFERENCE)]


def _overview(rows: Sequence[Statement]) -> list[tuple[str, str, list[int]]]:
    """Of each item with statements (item's page or "", title, statements, facts, facts by verdict), and of all."""
    found = []
    for item in [*dict.fromkeys(row.item.name for row in rows), None]:
        own = [row for row in rows if item in (row.item.name, None)]
        link = item if item and any(row.found for row in own) else ""
        counts = counted(own)
        found.append((link, own[0].item.title if item else "All", [len(own), sum(counts.values()), *counts.values()]))
    return found


def _reported(item: Item, folder: Path, runs: dict[str, Mapping[str, Any]]) -> list[Statement]:
    """An item's statements, from its report where that is there; the runs behind it go to `runs`."""
    file = folder / f"{item.name}.json"
    if not file.is_file():
        return statements(item, [])
    note_access(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    runs |= {run["file"]: run for run in content["runs"]}
    return statements(item, content["facts"].get("claims", []))


def claims_table(rows: Sequence[Statement], name: str, caption: str, heads: Sequence[str]) -> Table:
    """Statements, some of `HEADS` of each; every number with the runs that it was compared from."""
    body = [(row.id, [cells[head] for head in heads]) for row, cells in ((row, _cells(row)) for row in rows)]
    return Table(name, caption, "Item", heads, body, words=True)


def _cells(row: Statement) -> dict[str, Cell]:
    """All of a statement's cells by their heads."""
    found, linked = row.found, f"; the fact of {row.claim.same_as}" if row.claim.same_as else ""
    of_paper = paper_means(row.item, row.claim)
    printed_in = (Source(numbers.record_path(paths.PAPER / row.item.paper), ""),) if of_paper else ()
    cells = dict.fromkeys(HEADS, Cell(numbers.MISSING)) | {
        "Statement": Cell(row.claim.text), "Verdict": Cell(f"{row.verdict}{linked}"),
        PAPER: Cell(paper_text(row.item, row.claim), None, None, printed_in),
    }  # fmt: skip
    if found is None:
        return cells
    bounds, sources = tuple(found["interval"]), tuple(Source(**source) for source in found["sources"])
    what, reason = "steps" if found["images"] is None else "images", f": {found['reason']}" if found["reason"] else ""
    count = f"{numbers.count(found[what])} {what}; trainings: {' against '.join(map(str, found['trainings']))}"
    gap, p = gap_text(found["kind"], found["value"], *bounds, found["p"]), row.corrected
    return cells | {
        "Verdict": Cell(f"**{row.verdict}**{reason}{linked}", row.verdict, None, sources),
        GAP: Cell(gap, found["value"], bounds, sources), "n": Cell(count, found[what], None, sources),
        "p corrected": Cell(numbers.MISSING if p is None else numbers.p_value(p), p, None, sources),
    }  # fmt: skip


def _forest(rows: Sequence[Statement]) -> list[figures.Line]:
    """What of the statements that were tested is drawn, each in its unit."""
    lines = []
    for row in (row for row in rows if row.found):
        _, unit = _UNITS.get(row.claim.kind, (1, ""))
        scale = 1 if row.claim.kind in _UNITS else 100
        values = [scale * value for value in (row.found["value"], *row.found["interval"])]
        unit = unit.strip() or ("reward" if scale == 1 else "percentage points")
        lines.append(figures.Line(f"{row.id}  {row.claim.text}", unit, *values, row.verdict))
    return lines


def _csv_line(row: Statement) -> list[Any]:
    claim, found = row.claim, row.found or {}
    means = [round(mean, 2) for mean in paper_means(row.item, claim) or ()] or [None, None]
    low, high = found.get("interval", (None, None))
    trainings = [*found.get("trainings", ()), None, None][:2]
    told = [row.id, claim.text, *means, claim.kind, claim.ours, claim.theirs, found.get("value"), low, high]
    over = [found.get("p"), row.corrected, found.get("images"), found.get("steps"), *trainings]
    return [*told, *over, row.verdict, found.get("reason"), claim.same_as]


def paper_means(item: Item, claim: Claim) -> tuple[float, float] | None:
    """The paper's percentages of ours and theirs: averages, means of the claim's benchmarks, of two groups gains."""
    if item.paper is None or claim.kind in (*MEASURES, "reward"):
        return None
    values, labels = paper_values(item.paper), {row.label: row.paper for row in item.rows}
    ours, theirs = (values.get(labels.get(label)) for label in (claim.ours, claim.theirs))
    if ours is None or theirs is None:
        return None
    if claim.kind == "larger gain":
        groups = (claim.benchmarks, claim.others)
        return tuple(_printed_mean(ours, group) - _printed_mean(theirs, group) for group in groups)
    return _printed_mean(ours, claim.benchmarks), _printed_mean(theirs, claim.benchmarks)


def _printed_mean(row: Mapping[str, float], benchmarks: Sequence[str]) -> float:
    columns = [texts()["columns"].get(name) for name in benchmarks]
    return _mean([row[column] for column in columns if column in row] or [row[PRINTED_AVERAGE]])


def paper_text(item: Item, claim: Claim) -> str:
    """What the paper prints for a statement: "48.3 against 39.9 (+8.4)"."""
    means = paper_means(item, claim)
    if means is None:
        return "a curve" if item.paper is None else numbers.MISSING
    ours, theirs = numbers.percents([value / 100 for value in means])
    gap = numbers.difference(round(means[0] - means[1], 2) / 100)
    sign = "+" if claim.kind == "larger gain" else ""
    return f"{sign}{ours} against {sign}{theirs} ({gap})"
