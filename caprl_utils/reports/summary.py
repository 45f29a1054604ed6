"""What an item found, in a line of the README's map: which rows are compared, and by how much they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from caprl_utils.prism.statistics import AVERAGE
from caprl_utils.reports import numbers
from caprl_utils.reports.results import Results


@dataclass(frozen=True)
class Brief:
    """Which of an item's rows stand for it; all averages over the benchmarks.

    ladder: labels whose values are told in this order, with the difference of the last from the first.
    text, pairs: comparisons of one kind, name -> (ours, theirs); every one is told, none is chosen.
    """

    ladder: Sequence[str] = ()
    text: str = ""
    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def told(brief: Brief, results: Results) -> str:
    """The line; rows that were not measured are left out of it."""
    if brief.ladder:
        return _ladder([label for label in brief.ladder if label in results.measured], results)
    known = {n: pair for n, pair in brief.pairs.items() if all(label in results.measured for label in pair)}
    return f"{brief.text} " + ", ".join(f"{name} {gap(results, *pair)}" for name, pair in known.items())


def gap(results: Results, ours: str, theirs: str) -> str:
    """A difference of averages in points with its interval: "+8.4 [+5.6, +11.2]"."""
    found = results.difference(ours, theirs, AVERAGE)
    return f"{numbers.difference(found.value)} {numbers.interval((found.low, found.high), signed=True)}"


def _ladder(labels: Sequence[str], results: Results) -> str:
    values = numbers.percents([results.interval(label, AVERAGE).value for label in labels])
    first, last = labels[0], labels[-1]
    if len(labels) == 2:
        return f"{last} against {first}: {' to '.join(values)} ({gap(results, last, first)})"
    return f"{', '.join(labels)}: {', '.join(values)} ({last} against {first}: {gap(results, last, first)})"
