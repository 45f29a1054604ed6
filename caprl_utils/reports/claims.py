"""Statements of the paper, each tested on our runs by an interval (`verdict`), never by a look; and the page of all.

What a profile's models have built in is no finding: its verdict is `BY_CONSTRUCTION`. The p-values beside verdicts of
accuracy are corrected after Holm over the item's tests and decide nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.files import note_access
from caprl_utils.prism.statistics import AVERAGE, Bootstrap, Interval, bootstrap_models, holm
from caprl_utils.prism.told import MEASURES, by_image
from caprl_utils.reports import numbers
from caprl_utils.reports.items import Claim, Item, items, texts
from caprl_utils.reports.numbers import Cell, Source, Table
from caprl_utils.reports.paper import PRINTED_AVERAGE, all_average_notes, paper_values
from caprl_utils.reports.results import Results, keys_of, shared
from caprl_utils.schema import Profile

MARGIN = 0.01  # ours: a gain of less than one point counts as none
_UNITS = {"tokens": (1, " tokens"), "false count": (2, " statements a caption"), "reward": (3, "")}  # decimals, unit
WINDOW_STEPS = 10  # steps at either end of a training curve that are compared
P_LEVEL = 0.05  # of corrected p-values; verdicts go by the interval
_Z95 = 1.959964
SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
BY_CONSTRUCTION, NOT_RUN = "by construction", "not run"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, UNDECIDED, BY_CONSTRUCTION, NOT_RUN)
_CSV = ["item", "statement", "paper_ours", "paper_theirs", "kind", "ours", "theirs", "difference", "low", "high", "p",
        "images", "steps", "verdict"]  # fmt: skip
SMOKE_WARNING = "Profile smoke: a handful of steps. These numbers mean nothing and stay out of reports/."


@dataclass(frozen=True)
class Finding:
    """A claim and what the data say about it; the interval is over images or steps."""

    claim: Claim
    value: float
    low: float
    high: float
    verdict: str
    runs: tuple[int, ...]  # evaluated runs of ours and of theirs (of a reward, trainings)
    images: int | None = None
    steps: int | None = None
    sources: tuple[Source, ...] = ()  # of the compared numbers
    p: float | None = None  # corrected, of accuracy alone

    def line(self, pairs: Sequence[tuple[str, str]]) -> str:
        """One line of the report. A value that is not among the differences above it (pairs) says what it is of."""
        claim, text = self.claim, printed(self.claim.kind, self.value, self.low, self.high, self.p)
        if claim.theirs and (claim.kind in MEASURES or (claim.ours, claim.theirs) not in pairs):
            text = f"{claim.subtraction}: {text}"
        reason = f" {claim.built_in[0].upper()}{claim.built_in[1:]}." if claim.built_in else ""
        return f"- {claim.text}: **{self.verdict}**, {text}.{reason}"

    def as_json(self) -> dict[str, Any]:
        """Raw values."""
        claim = {key: getattr(self.claim, key) for key in ("text", "kind", "ours", "theirs")}
        return {
            **claim, "value": self.value, "interval": [self.low, self.high], "p": self.p, "verdict": self.verdict,
            "reason": self.claim.built_in, "runs": list(self.runs), "images": self.images, "steps": self.steps,
            "sources": [asdict(source) for source in self.sources],
        }  # fmt: skip


def printed(kind: str, value: float, low: float, high: float, p: float | None = None) -> str:
    """A claim's difference with its unit and interval, and its p-value if it has one."""
    if kind in _UNITS:
        decimals, unit = _UNITS[kind]
        first, *ends = numbers.numbers([value, low, high], decimals)
        return f"{'+' if value > 0 else ''}{first}{unit} [{', '.join(ends)}]"
    text = f"{numbers.difference(value)} points {numbers.interval((low, high), signed=True)}"
    return text if p is None else f"{text}, {numbers.p_value(p)}"


Test = tuple[frozenset[str], tuple[str, ...]]  # what is compared, and on which benchmarks; () is the average


def test_of(ours: str, theirs: str, benchmarks: Sequence[str] = ()) -> Test:
    """The test of a pair, or of the claim on it: one and the same, whichever stands first."""
    return frozenset((ours, theirs)), tuple(benchmarks)


def corrected(results: Results) -> dict[Test, float]:
    """p-values after Holm over an item's tests: its pairs on the average, and claims of accuracy not built in."""
    stated = [c for c in results.item.claims if c.kind == "accuracy" and not c.built_in]
    asked = [*((*pair, ()) for pair in results.pairs), *((c.ours, c.theirs, c.benchmarks) for c in stated)]
    known = [test for test in asked if all(side in results.measured for side in test[:2])]
    return holm({test_of(*test): results.difference(*test).p_value for test in known})


def test_all(results: Results) -> list[Finding]:
    """What the data say about an item's claims, those left out whose runs are not there or too short."""
    adjusted = corrected(results)
    found = [_test(claim, results, adjusted) for claim in results.item.claims]
    return [finding for finding in found if finding is not None]


def _test(claim: Claim, results: Results, adjusted: Mapping[Test, float]) -> Finding | None:
    if claim.kind == "reward":
        return _test_reward(claim, results)
    sides = [results.measured.get(label) for label in (claim.ours, claim.theirs)]
    if None in sides or (gap := _gap(claim, results)) is None:
        return None
    word = BY_CONSTRUCTION if claim.built_in else verdict(gap.low, gap.high, claim.kind)
    stated = claim.kind == "accuracy" and not claim.built_in
    p = adjusted.get(test_of(claim.ours, claim.theirs, claim.benchmarks)) if stated else None
    groups = [name for name in (*claim.benchmarks, *claim.others) if name in results.parts] or [AVERAGE]
    if claim.kind in MEASURES:
        sources = tuple(source for side in sides for source in side.samples(MEASURES[claim.kind].column))
    else:
        sources = tuple(source for side in sides for name in groups for source in side.sources(*keys_of(name)))
    runs = tuple(len(side.records) for side in sides)
    return Finding(claim, gap.value, gap.low, gap.high, word, runs, gap.num_clusters, sources=sources, p=p)


def _test_reward(claim: Claim, results: Results) -> Finding | None:
    """By the first training of the row."""
    side = results.measured.get(claim.ours)
    curve = side.curves[0] if side and side.trainings else None
    if curve is None or (risen := rise(curve.rewards)) is None:
        return None
    sources = (Source(curve.file, "reward"),)
    return Finding(claim, *risen, verdict(*risen[1:]), (1,), steps=len(curve.rewards), sources=sources)


def _gap(claim: Claim, results: Results) -> Interval | None:
    if claim.kind in MEASURES:  # resampled by image, as the scores are
        shares = {claim.ours: claim.share, claim.theirs: 1.0}
        found = {label: by_image(results.measured[label].rows, claim.kind, shares[label]) for label in shares}
        draws, seed, common = results.profile.prism.bootstrap_draws, results.profile.seed, shared(found)[0]
        if not any(common.values()):  # the facts of these images are not known
            return None
        return bootstrap_models(common, draws, seed)[AVERAGE].difference(claim.ours, claim.theirs)
    if claim.kind != "larger gain":
        return results.difference(claim.ours, claim.theirs, claim.benchmarks)
    groups = (claim.benchmarks, claim.others)  # how much more ours gains on the first than on the second
    if not all(any(name in results.parts for name in group) for group in groups):
        return None
    first, second = (results.part_of(group) for group in groups)
    both = Bootstrap(
        first.models, first.means - second.means, first.samples - second.samples,
        first.num_clusters + second.num_clusters, first.num_rows + second.num_rows,
    )  # fmt: skip
    return both.difference(claim.ours, claim.theirs)


def verdict(low: float, high: float, kind: str = "accuracy") -> str:
    """By the 95 % interval: a difference lies above zero; "no gain" ends below `MARGIN`, "as good" begins above minus
    that. Not supported: it lies on the other side of zero."""
    if kind == "no gain":
        yes, no = high < MARGIN, low > 0
    elif kind == "as good":
        yes, no = low > -MARGIN, high < 0
    else:
        yes, no = low > 0, high < 0
    return SUPPORTED if yes else NOT_SUPPORTED if no else UNDECIDED


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last `WINDOW_STEPS` steps."""
    return _mean(values[:WINDOW_STEPS]), _mean(values[-WINDOW_STEPS:])


def rise(rewards: Sequence[float]) -> tuple[float, float, float] | None:
    """(last minus first, low, high): means over `WINDOW_STEPS` at either end, steps independent; None below four."""
    width = min(WINDOW_STEPS, len(rewards) // 2)
    if width < 2:
        return None
    parts = (rewards[:width], rewards[-width:])
    first, last = map(_mean, parts)
    spread = sum(sum((r - _mean(part)) ** 2 for r in part) / (width - 1) / width for part in parts)
    value, half = last - first, _Z95 * math.sqrt(spread)
    return value, value - half, value + half


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Statement:
    """One line of the page: a claim of an item, what the item's report says of it (None: not run), and where there."""

    id: str
    item: Item
    claim: Claim
    found: Mapping[str, Any] | None = None
    place: Source | None = None

    @property
    def verdict(self) -> str:
        return self.found["verdict"] if self.found else NOT_RUN


def page(profile: Profile, folder: Path) -> tuple[dict[str, Any], str, str]:
    """(JSON, CSV, Markdown) over every statement of the paper: its verdict is that of its report in the folder."""
    runs: dict[str, Mapping[str, Any]] = {}
    by_item = [(i, _statements(profile, i, folder, runs)) for i in items(profile).values() if not i.ours]
    rows = [row for _, group in by_item for row in group]
    supported, given = ([row for row in rows if row.verdict == word] for word in (SUPPORTED, BY_CONSTRUCTION))
    reasons = dict.fromkeys(row.claim.built_in for row in given)
    facts = {
        "profile": profile.name,
        "counts": {word: sum(row.verdict == word for row in rows) for word in VERDICTS},
        "supported_one_training": [row.id for row in supported if max(row.found["runs"]) == 1],
        "supported_large_p": [row.id for row in supported if (row.found.get("p") or 0.0) >= P_LEVEL],
        "printed_averages": all_average_notes(),
    }
    table = claims_table(rows)
    overview = [*((item.name, item.title, group) for item, group in by_item if group), ("", "All", rows)]
    text = numbers.fill(
        "claims.md", profile=profile, facts=facts, table=table, overview=overview,
        built_in={reason: [row.id for row in given if row.claim.built_in == reason] for reason in reasons},
        cautions=texts()["cautions"].values(), warning=SMOKE_WARNING, margin=f"{MARGIN:.0%}", window=WINDOW_STEPS,
        level=P_LEVEL,
    )  # fmt: skip
    content = {"facts": facts, "tables": [table.as_json()], "runs": [runs[file] for file in sorted(runs)]}
    return content, numbers.csv_text([_CSV, *map(_csv_line, rows)]), text


def _statements(profile: Profile, item: Item, folder: Path, runs: dict) -> list[Statement]:
    """An item's, from its report where that is there; the runs behind it go to `runs`, as the report names them."""
    file, there = folder / f"{item.name}.json", {}
    if file.is_file():
        note_access(file)
        content = json.loads(file.read_text(encoding="utf-8"))
        report = numbers.record_path(paths.reports_of(profile.name) / file.name)
        for place, found in enumerate(content["facts"].get("claims", [])):
            there[found["text"]] = (found, Source(report, f"facts/claims/{place}"))
        if any(claim.text in there for claim in item.claims):
            runs |= {run["file"]: run for run in content["runs"]}
    short = item.title.split(":")[0]
    numbered = enumerate(item.claims, 1)
    return [Statement(f"{short} ({n})", item, claim, *there.get(claim.text, ())) for n, claim in numbered]


def claims_table(rows: Sequence[Statement]) -> Table:
    """The page's one table; every number with the runs it was compared from."""
    heads = ["Statement", "Verdict", "Difference, 95 % interval, p", "The paper's numbers", "Our test", "n"]
    body = []
    for row in rows:
        decided, gap, count = _found_cells(row)
        of_paper, test = Cell(paper_text(row.item, row.claim)), Cell(test_text(row.claim))
        body.append((row.id, [Cell(row.claim.text), decided, gap, of_paper, test, count]))
    return Table("claims", "Statements of the paper", "Item", heads, body, words=True)


def _csv_line(row: Statement) -> list[Any]:
    claim, found = row.claim, row.found or {}
    means = [round(mean, 2) for mean in paper_means(row.item, claim) or ()] or [None, None]
    low, high = found.get("interval", (None, None))
    over = [found.get(key) for key in ("p", "images", "steps")]
    told = [row.id, claim.text, *means, claim.kind, claim.ours, claim.theirs]
    return [*told, found.get("value"), low, high, *over, row.verdict]


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


def test_text(claim: Claim) -> str:
    """Which rows are compared in what."""
    if claim.kind == "reward":
        return f"reward of {claim.ours}, last minus first steps, above 0"
    gain = "gain in accuracy, first minus second group of benchmarks"
    measured = {kind: measure.head.lower() for kind, measure in MEASURES.items()}
    what = {**measured, "larger gain": gain}.get(claim.kind, "accuracy")
    limit = {"no gain": f"below {MARGIN:.0%}", "as good": f"above −{MARGIN:.0%}"}.get(claim.kind, "above 0")
    where = " on those benchmarks" if claim.benchmarks and claim.kind != "larger gain" else ""
    return f"{what}{where}: {claim.subtraction} {limit}"


def _found_cells(row: Statement) -> tuple[Cell, Cell, Cell]:
    """Verdict, difference, and over how much."""
    found = row.found
    if found is None:
        return Cell(NOT_RUN), Cell(numbers.MISSING), Cell(numbers.MISSING)
    bounds = tuple(found["interval"])
    sources = tuple(Source(**source) for source in found.get("sources", []))
    text = printed(found["kind"], found["value"], *bounds, found.get("p"))
    what, count = "steps", f"{found['steps']} steps of one training"
    if found["images"] is not None:
        ours, theirs = found["runs"]
        what, count = "images", f"{numbers.count(found['images'])} images; {ours} against {theirs} evaluated"
    place, key = row.place.file, row.place.key
    return (
        Cell(f"**{row.verdict}**", row.verdict, None, (Source(place, f"{key}/verdict"),)),
        Cell(text, found["value"], bounds, sources),
        Cell(count, found[what], None, (Source(place, f"{key}/{what}"),)),
    )
