"""Table 3, caption quality in the Prism framework: scores, paired differences, floors and ceilings, equal
lengths, best of n. Every cell keeps the record and the key that its number was read from.
"""

from math import sqrt
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.statistics import (
    AVERAGE,
    LENGTH_TOLERANCE,
    Interval,
    Matched,
    cluster_means,
    holm,
    length_matched,
    minimum_detectable_difference,
    variance_components,
)
from caprl_utils.reports import numbers
from caprl_utils.reports.claims import corrected, p_of, verdict
from caprl_utils.reports.results import BASE, CAPRL, CUT, Measured, Results
from caprl_utils.reports.table3_claims import CLAIMS
from caprl_utils.reports.tables import Cell, Source, Table

TOKENS = "Caption tokens"
LEAST_PAIRS = 10  # ours: an interval from fewer pairs of captions says nothing


def scores_table(results: Results, bounds: bool) -> Table:
    """Accuracy of every captioner (bounds=False) or of every floor and ceiling (bounds=True)."""
    shown = [m for m in results.measured.values() if m.entry.bound == bounds]
    columns = [[_score_cells(results, m, name) for m in shown] for name in (*results.benchmarks, AVERAGE)]
    texts = [numbers.percents([cell.value for cell in column]) for column in columns]
    rows = []
    for place, found in enumerate(shown):
        cells = [
            Cell(
                f"{t[place]} {numbers.interval(c[place].interval)}",
                c[place].value,
                c[place].interval,
                c[place].sources,
            )
            for c, t in zip(columns, texts, strict=True)
        ]
        rows.append((found.entry.label, [*cells, _token_cell(found)]))
    heads = [get_benchmark(name).name for name in results.benchmarks]
    caption = (
        "Floors, ceilings and a control for length, accuracy (%)"
        if bounds
        else "Accuracy (%) with 95 % interval"
    )
    columns_ = [*heads, "Average", TOKENS]
    notes = [] if bounds else missing_notes(results)
    return Table("bounds" if bounds else "table3", caption, "Captioner", columns_, rows, notes)


def missing_notes(results: Results) -> list[str]:
    """What of the whole table was not evaluated, by row and run."""
    rows = [
        f"{label} ({', '.join(names)})"
        for label, names in results.missing.items()
        if label not in results.measured
    ]
    seeds = [
        f"{label} is averaged over {len(results.measured[label].names)} of "
        f"{len(results.measured[label].names) + len(names)} training seeds; not evaluated: {', '.join(names)}."
        for label, names in results.missing.items()
        if label in results.measured
    ]
    return [*([f"Not evaluated, so not in the tables: {'; '.join(rows)}."] if rows else []), *seeds]


def _score_cells(results: Results, found: Measured, benchmark: str) -> Cell:
    keys = (AVERAGE,) if benchmark == AVERAGE else ("benchmarks", benchmark, "mean")
    interval = results.interval(found.entry.label, benchmark)
    value = found.mean_of(*keys)
    if value is None or abs(value - interval.value) > 1e-9:
        raise UserError(
            f"{found.files[0]}: {'/'.join(keys)} is {value}, its samples.parquet says {interval.value}; "
            "delete that run and make it again"
        )
    return Cell("", value, (interval.low, interval.high), found.sources(*keys))


def _token_cell(found: Measured) -> Cell:
    value = found.mean_of("caption_tokens")
    return Cell(numbers.number(value), value, None, found.sources("caption_tokens"))


def pairs_of(results: Results) -> list[tuple[str, str]]:
    """What is compared: CapRL with every other captioner, and its captions cut short with the base's."""
    others = [m.entry.label for m in results.measured.values() if not m.entry.bound]
    cut = [(CUT, BASE)] if CUT in results.measured else []
    return [*((CAPRL, label) for label in others if label != CAPRL), *cut]


def differences_table(results: Results) -> Table:
    """Paired differences in percentage points with interval and Holm's p: over the benchmarks, and for the average
    over the table's tests.
    """
    pairs = pairs_of(results)
    averages = corrected(results, pairs, CLAIMS)
    heads = [get_benchmark(name).name for name in results.benchmarks]
    rows = []
    for ours, theirs in pairs:
        gaps = {name: results.difference(ours, theirs, name) for name in (*results.benchmarks, AVERAGE)}
        adjusted = holm({name: gaps[name].p_value for name in results.benchmarks})
        adjusted[AVERAGE] = p_of(averages, ours, theirs)
        texts = numbers.differences([gap.value for gap in gaps.values()])
        rows.append(
            (
                f"{ours.removeprefix('control: ')} − {theirs}",
                [
                    _gap_cell(results, ours, theirs, name, gap, text, adjusted[name])
                    for (name, gap), text in zip(gaps.items(), texts, strict=True)
                ],
            )
        )
    smallest = [detectable_difference(results, name) for name in results.benchmarks]
    notes = [
        "Paired by image: the same images are drawn for both captioners. p-values are corrected after Holm: those of "
        "single benchmarks over the benchmarks, that of the average over this table's rows and the other comparisons "
        "that the statements below make.",
        f"With these images a single benchmark shows a true difference of {CAPRL} from {BASE} from "
        f"{numbers.percent(min(smallest))} to {numbers.percent(max(smallest))} points on, at 80 % power.",
    ]
    caption = "Difference in percentage points with 95 % interval"
    return Table("differences", caption, "Comparison", [*heads, "Average"], rows, notes)


def detectable_difference(results: Results, benchmark: str) -> float:
    """Smallest true difference of CapRL from base that a benchmark's images show with 80 % power."""
    ours, theirs = (results.measured[label].scores[benchmark] for label in (CAPRL, BASE))
    gaps = cluster_means([ours[key] - theirs[key] for key in ours], [image for image, _ in ours])
    return minimum_detectable_difference(list(gaps.values()))


def variance_table(results: Results) -> Table:
    """Standard deviation of single scores by source, in points: questions, captions of one, training
    seeds.
    """
    rows = []
    for label in (BASE, CAPRL):
        found = results.measured[label]
        parts = variance_components(_score_array(found))
        values = [None if v is None else sqrt(v) for v in (parts.items, parts.captions, parts.seeds)]
        texts = [numbers.percent(v) for v in values]
        if parts.seeds == 0:  # an estimate below zero is given as 0, which is no measurement of "none"
            texts[-1] = f"not above the noise ({len(found.names)} trainings)"
        sources = tuple(
            Source(file.replace("result.json", "samples.parquet"), "score") for file in found.files
        )
        rows.append((label, [Cell(t, v, None, sources) for t, v in zip(texts, values, strict=True)]))
    notes = [
        "A dash where there is one draw. The reader adds no sampling noise of its own unless its mode is sampled.",
        *_averages_of_trainings(results.measured[CAPRL]),
    ]
    heads = ["Between questions", "Between captions", "Between training seeds"]
    caption = "Where scores vary: standard deviation in percentage points"
    return Table("variance", caption, "Captioner", heads, rows, notes)


def _averages_of_trainings(found: Measured) -> list[str]:
    """Each training's own average, where there are several."""
    if len(found.names) < 2:
        return []
    texts = numbers.percents([record["values"][AVERAGE] for record in found.records])
    each = ", ".join(f"{text} ({name})" for name, text in zip(found.names, texts, strict=True))
    return [f"Averages of the trainings of {found.entry.label}: {each}."]


def _score_array(found: Measured) -> list[list[list[list[float]]]]:
    """Scores as (questions, training seeds, captions, 1)."""
    by_run = []
    for rows in found.rows_of_runs:
        captions: dict[tuple[str, str], list[float]] = {}
        for row in sorted(rows, key=lambda row: row["caption_index"]):
            if row["score"] is not None:
                captions.setdefault((row["benchmark"], row["sample_id"]), []).append(row["score"])
        by_run.append(captions)
    return [[[[score] for score in run[key]] for run in by_run] for key in sorted(by_run[0])]


def _gap_cell(
    results: Results, ours: str, theirs: str, benchmark: str, gap: Interval, text: str, p: float
) -> Cell:
    bounds = (gap.low, gap.high)
    keys = (AVERAGE,) if benchmark == AVERAGE else ("benchmarks", benchmark, "mean")
    sources = results.measured[ours].sources(*keys) + results.measured[theirs].sources(*keys)
    return Cell(
        f"{text} {numbers.interval(bounds, signed=True)}, {numbers.p_value(p)}", gap.value, bounds, sources
    )


def matched_table(results: Results) -> Table:
    """The differences again, on captions of equal length alone; a dash where there are no pairs."""
    settings = results.profile.prism
    ours, theirs = (results.measured[side].rows for side in (CAPRL, BASE))
    matched = length_matched(ours, theirs, settings.bootstrap_draws, results.profile.seed)
    cells = [_matched_cell(results, matched, name) for name in (*results.benchmarks, AVERAGE)]
    heads = [get_benchmark(name).name for name in results.benchmarks]
    notes = [
        f"Captions of the same image whose tokens differ by at most {LENGTH_TOLERANCE:.0%}; "
        f"{numbers.percent(matched.share)} % of the captions found a partner, the rest is left out. No interval from "
        f"fewer than {LEAST_PAIRS} pairs, and none of an average over such benchmarks."
    ]
    caption = "Difference in percentage points between captions of equal length"
    rows = [(f"{CAPRL} − {BASE}", cells)]
    return Table("length_matched", caption, "Comparison", [*heads, "Average"], rows, notes)


def _matched_cell(results: Results, matched: Matched, name: str) -> Cell:
    if name not in matched.parts:
        return Cell(numbers.MISSING)
    gap = matched.parts[name].difference("ours", "theirs")
    fewest = min(matched.pairs.values()) if name == AVERAGE else matched.pairs[name]
    bounds = (gap.low, gap.high) if fewest >= LEAST_PAIRS else None
    shown = f" {numbers.interval(bounds, signed=True)}" if bounds else ""
    num_pairs = matched.pairs.get(name, sum(matched.pairs.values()))
    sources = tuple(
        Source(file.replace("result.json", "samples.parquet"), name)
        for side in (CAPRL, BASE)
        for file in results.measured[side].files
    )
    text = f"{numbers.difference(gap.value)}{shown}, {num_pairs} pairs"
    return Cell(text, gap.value, bounds, sources)


def best_table(results: Results) -> Table:
    """Mean over an image's captions beside the best of n, averages over the benchmarks (%)."""
    shown = [m for m in results.measured.values() if not m.entry.bound]
    first = shown[0].records[0]["values"]["benchmarks"][results.benchmarks[0]]
    counts = list(first["best_of"])
    rows = []
    for found in shown:
        values = [found.mean_of(AVERAGE)]
        sources = [found.sources(AVERAGE)]
        for k in counts:
            each = [found.mean_of("benchmarks", name, "best_of", k) for name in results.benchmarks]
            values.append(None if None in each else sum(each) / len(each))
            named = [found.sources("benchmarks", name, "best_of", k) for name in results.benchmarks]
            sources.append(tuple(source for group in named for source in group))
        texts = numbers.percents(values)
        cells = [Cell(t, v, None, s) for t, v, s in zip(texts, values, sources, strict=True)]
        rows.append((found.entry.label, cells))
    notes = [
        "Best of n needs the right answer to choose by: an upper bound on choosing, not a score of the "
        "captioner. Unbiased where more captions were drawn than n.",
    ]
    heads = ["Mean", *(f"Best of {k}" for k in counts)]
    return Table("best_of", "Mean and best of n captions, average (%)", "Captioner", heads, rows, notes)


def facts(results: Results) -> dict[str, Any]:
    """What the report says in words: n, captions, seeds, and CapRL against base on the average."""
    base = results.measured[BASE].records[0]
    gap = results.difference(CAPRL, BASE, AVERAGE)
    return {
        "profile": results.profile.name,
        "num_samples": {name: base["n"][name] for name in results.benchmarks},
        "num_images": {name: base["values"]["benchmarks"][name]["num_images"] for name in results.benchmarks},
        "captions_per_image": base["captions_per_image"],
        "reader": base["reader"]["mode"],
        "training_seeds": results.training_seeds,
        "missing": {label: list(names) for label, names in results.missing.items()},
        "draws": results.profile.prism.bootstrap_draws,
        "unparsed": {m.entry.label: [r["unparsed"] for r in m.records] for m in results.measured.values()},
        "gain": gap.value,
        "gain_interval": [gap.low, gap.high],
        "verdict": verdict(gap.low, gap.high),
    }
