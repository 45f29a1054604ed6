"""Statements of the paper, each tested on our runs by an interval (`verdict`), never by a look; and the page of all.

What a profile's models cannot test is `NOT_TESTABLE`, with the reason; what rests on one training is undecided. The
page counts facts: a statement that repeats another's is linked to it. Beside each p stands the one corrected after
Holm over all facts; it decides nothing.
"""

from __future__ import annotations

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
from caprl_utils.reports.items import FOLLOW_UPS, GUESSER, Claim, Item, items, texts
from caprl_utils.reports.numbers import Cell, Source, Table
from caprl_utils.reports.paper import PRINTED_AVERAGE, all_average_notes, printed_row
from caprl_utils.reports.results import Mean, Results, keys_of
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
GAP, PAPER = "Difference, 95 % interval, p", "The paper's numbers"
HEADS = ("Statement", "Verdict", GAP, PAPER, "n", "p corrected")
SMOKE_WARNING = "Profile smoke: a handful of steps. These numbers mean nothing and stay out of reports/."


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

    @property
    def falls(self) -> bool:
        """Whether its verdict would not stand after correction. p of "as good" and "no gain" only speaks for them."""
        return self.corrected >= P_LEVEL and (self.verdict == SUPPORTED or self.claim.kind not in _BEYOND)


def margin(kind: str) -> float | None:
    """Within what a difference counts as none, in the unit of a kind of claims; None for those that name no margin."""
    shares = kind not in _UNITS
    return texts()["margins"].get("accuracy" if shares else kind, {}).get("within")


def test_all(results: Results) -> list[dict[str, Any]]:
    """What the data say about an item's claims, as its JSON holds it; without those whose runs are missing or short."""
    found = []
    for claim in results.item.claims:
        if tested := (_reward if claim.kind == "reward" else _test)(claim, results):
            gap, trainings, sources, *steps = tested
            why = claim.not_testable or at_the_floor(claim, results)
            decided = (NOT_TESTABLE, why) if why else verdict(gap, claim.kind)
            found.append({
                **{key: getattr(claim, key) for key in ("text", "kind", "ours", "theirs", "same_as")},
                "value": gap.value, "interval": [gap.low, gap.high], "p": None if why else gap.p_value,
                "verdict": decided[0], "reason": decided[1], "trainings": trainings,
                "images": gap.num_clusters or None, "steps": steps[0] if steps else None,
                "sources": [asdict(source) for source in sources],
            })  # fmt: skip
    return found


def _test(claim: Claim, results: Results) -> tuple[Interval, list[int], list[Source]] | None:
    """The difference of two rows, over images and trainings (none: 0), and where its numbers stand."""
    sides, measured = (claim.ours, claim.theirs), [results.measured.get(label) for label in (claim.ours, claim.theirs)]
    groups, beyond = (claim.benchmarks, claim.others), _BEYOND.get(claim.kind, 0)
    there = [any(name in results.parts for name in group) for group in groups]
    if None in measured or (claim.kind == "larger gain" and not all(there)):
        return None
    trainings = [0 if None in side.columns else len(side.columns) for side in measured]
    if claim.kind in MEASURES:
        mean = results.said(claim.kind, sides, (claim.share, 1.0))
        sources = [source for side in measured for source in side.samples(MEASURES[claim.kind].column)]
        return mean and (results.contrast(mean, *sides), trainings, sources)
    names = [name for name in (*claim.benchmarks, *claim.others) if name in results.parts] or [AVERAGE]
    sources = [source for side in measured for name in names for source in side.sources(*keys_of(name))]
    if claim.kind != "larger gain":
        gap = results.difference(*sides, claim.benchmarks, null=-beyond * margin(claim.kind), side=beyond)
        return gap, trainings, sources
    (first, of_first), (second, of_second) = map(results.accuracy, groups)  # how much more ours gains on the first
    both = replace(
        first, means=first.means - second.means, samples=first.samples - second.samples,
        num_clusters=first.num_clusters + second.num_clusters, num_rows=first.num_rows + second.num_rows,
    )  # fmt: skip
    mean = Mean(both, lambda record: of_first(record) - of_second(record))
    return results.contrast(mean, *sides), trainings, sources


def _reward(claim: Claim, results: Results) -> tuple[Interval, list[int], list[Source], int] | None:
    """Last minus first steps, over steps and trainings. What rewards of other rows vary by is on other scales."""
    side = results.measured.get(claim.ours)
    curves = side.curves if side and side.trainings else []
    rises = [rise(curve.rewards) for curve in curves]
    if not rises or None in rises:
        return None
    values, variances = zip(*rises, strict=True)
    many = len(rises)
    between = float(np.var(values, ddof=1)) / many if many > 1 else 0.0
    low, high, p = t_interval(value := _mean(values), sum(variances) / many**2, between, many - 1)
    sources = [Source(curve.file, "reward") for curve in curves]
    return Interval(value, low, high, 0, p, many), [many], sources, len(curves[0].rewards)


def at_the_floor(claim: Claim, results: Results) -> str:
    """Why a difference says nothing of what two rows learned, where neither does better than who sees no image."""
    if GUESSER.label not in results.measured:
        return ""
    above = [results.difference(row, GUESSER.label, claim.benchmarks).low > 0 for row in (claim.ours, claim.theirs)]
    return "" if any(above) else "neither side is measurably above always giving the most frequent answer"


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


def statements(item: Item, found: Sequence[Mapping[str, Any]]) -> list[Statement]:
    """An item's claims in order. found: what its report says of those that it tested."""
    there = {one["text"]: one for one in found}
    numbered = enumerate(item.claims, 1)
    return [Statement(f"{item.short} ({n})", item, claim, there.get(claim.text)) for n, claim in numbered]


def _reported(item: Item, folder: Path, runs: dict[str, Mapping[str, Any]]) -> list[Statement]:
    """An item's statements, from its report where that is there; the runs behind it go to `runs`."""
    if content := numbers.read(file := folder / f"{item.name}.json"):
        note_access(file)
        runs |= {run["file"]: run for run in content["runs"]}
    return statements(item, content["facts"]["claims"] if content else [])


def write_claims(profile: Profile) -> dict[str, Any]:
    """Write every statement of the paper, and their plot, from the reports in a profile's folder; returns the JSON."""
    folder, runs = paths.reports_of(profile.name), {}
    rows = [row for item in items(profile).values() if not item.ours for row in _reported(item, folder, runs)]
    ps = {row.id: row.found["p"] for row in rows if row.found and not row.claim.same_as}
    corrected = holm({name: p for name, p in ps.items() if p is not None})
    rows = [replace(row, corrected=corrected.get(row.id)) for row in rows]
    facts = [row for row in rows if not row.claim.same_as]
    told = {
        "profile": profile.name, "statements": len(rows),
        "counts": {word: sum(row.verdict == word for row in facts) for word in VERDICTS}, "tests": len(corrected),
        "large_p": {word: [row.id for row in facts if row.verdict == word and row.falls] for word in VERDICTS[:2]},
        "printed_averages": all_average_notes(),
    }  # fmt: skip
    tested = [row for row in facts if row.found]
    first = {row.item.name: row.id for row in reversed(tested)}  # of every item, beside what data do not bear out
    shown = [row for row in tested if row.id == first[row.item.name] or row.verdict in (NOT_SUPPORTED, NO_DIFFERENCE)]
    findings = claims_table(shown, "findings", "Findings", HEADS[:3])
    later = [row for row in _reported(items(profile)[FOLLOW_UPS], folder, runs) if row.found]
    follow_ups = claims_table(later, "follow_ups", "Statements of follow-up papers", HEADS[:3])
    table = claims_table(rows, "claims", "Every statement of the paper", HEADS)
    forest: dict[str, list] = {}  # unit -> (label, value with its interval, verdict)
    for row in (row for row in rows if row.found):
        _, unit = _UNITS.get(row.claim.kind, (1, "percentage points"))
        scale = 1 if row.claim.kind in _UNITS else 100
        values = [scale * value for value in (row.found["value"], *row.found["interval"])]
        forest.setdefault(unit.strip() or "reward", []).append((f"{row.id}  {row.claim.text}", values, row.verdict))
    figures.plot_forest(forest, folder / "claims", "The paper's statements in our data", profile)
    text = numbers.fill(
        "claims.md", profile=profile, facts=told, findings=findings, table=table, follow_ups=follow_ups,
        warning=SMOKE_WARNING, cautions=texts()["cautions"].values(), margins=texts()["margins"],
        window=WINDOW_STEPS, level=P_LEVEL, least=LEAST_TRAININGS, signs=texts()["signs"],
    )  # fmt: skip
    of_runs, tables = [runs[file] for file in sorted(runs)], [findings, table, *[follow_ups] * bool(later)]
    return numbers.write(folder / "claims", told, tables, text, of_runs, [_line(row) for row in rows])


def _line(row: Statement) -> dict[str, Any]:
    """A statement in claims.csv: raw values, shares where they are accuracies, percentages of the paper."""
    claim, found, means = row.claim, row.found or {}, paper_means(row.item, row.claim) or (None, None)
    low, high = found.get("interval", (None, None))
    ours, theirs = [*found.get("trainings", ()), None, None][:2]
    paper = [None if mean is None else round(mean, 2) for mean in means]
    return {
        "item": row.id, "statement": claim.text, "paper_ours": paper[0], "paper_theirs": paper[1], "kind": claim.kind,
        "ours": claim.ours, "theirs": claim.theirs, "difference": found.get("value"), "low": low, "high": high,
        "p": found.get("p"), "p_corrected": row.corrected, "images": found.get("images"), "steps": found.get("steps"),
        "trainings_ours": ours, "trainings_theirs": theirs, "verdict": row.verdict, "reason": found.get("reason"),
        "same_as": claim.same_as,
    }  # fmt: skip


def claims_table(rows: Sequence[Statement], name: str, caption: str, heads: Sequence[str]) -> Table:
    """Statements, some of `HEADS` of each; every number with the runs that it was compared from."""
    body = []
    for row in rows:
        found, linked = row.found, f"; the fact of {row.claim.same_as}" if row.claim.same_as else ""
        cells = dict.fromkeys(HEADS, Cell()) | {"Statement": Cell(row.claim.text), "Verdict": Cell(NOT_RUN + linked)}
        if means := paper_means(row.item, row.claim):
            ours, theirs = numbers.percents([value / 100 for value in means])
            gap = numbers.difference(round(means[0] - means[1], 2) / 100)
            sign = "+" if row.claim.kind == "larger gain" else ""
            file = numbers.record_path(paths.PAPER / row.item.paper)
            cells[PAPER] = Cell(f"{sign}{ours} against {sign}{theirs} ({gap})", sources=(Source(file, ""),))
        elif row.item.paper is None:
            cells[PAPER] = Cell("a curve")
        if found:
            bounds, sources = tuple(found["interval"]), tuple(Source(**source) for source in found["sources"])
            what, p = "steps" if found["images"] is None else "images", row.corrected
            reason = f": {found['reason']}" if found["reason"] else ""
            count = f"{numbers.count(found[what])} {what}; trainings: {' against '.join(map(str, found['trainings']))}"
            gap = numbers.gap(found["value"], *bounds, *_UNITS.get(found["kind"], (None, " points")))
            gap += "" if found["p"] is None else f", {numbers.p_value(found['p'])}"
            cells["Verdict"] = Cell(f"**{row.verdict}**{reason}{linked}", row.verdict, None, sources)
            cells |= {GAP: Cell(gap, found["value"], bounds, sources), "n": Cell(count, found[what], None, sources)}
            cells["p corrected"] = Cell(numbers.MISSING if p is None else numbers.p_value(p), p, None, sources)
        body.append((row.id, [cells[head] for head in heads]))
    return Table(name, caption, "Item", heads, body, words=True)


def paper_means(item: Item, claim: Claim) -> tuple[float, float] | None:
    """The paper's percentages of ours and theirs: averages, means of the claim's benchmarks, of two groups gains."""
    if item.paper is None or claim.kind in (*MEASURES, "reward"):
        return None
    ours, theirs = (printed_row(item, label) for label in (claim.ours, claim.theirs))
    if ours is None or theirs is None:
        return None
    if claim.kind == "larger gain":
        groups = (claim.benchmarks, claim.others)
        return tuple(_printed_mean(ours, group) - _printed_mean(theirs, group) for group in groups)
    return _printed_mean(ours, claim.benchmarks), _printed_mean(theirs, claim.benchmarks)


def _printed_mean(row: Mapping[str, float], benchmarks: Sequence[str]) -> float:
    columns = [texts()["columns"].get(name) for name in benchmarks]
    return _mean([row[column] for column in columns if column in row] or [row[PRINTED_AVERAGE]])
