"""The one writer of tables and figures: an item becomes <name>.md, .csv, .json and its pictures, from finished runs.

The same results give the same bytes. Every cell keeps the record and the key that its number was read from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_experiment, names_of
from caprl_utils.errors import UserError
from caprl_utils.prism import statistics
from caprl_utils.prism.benchmarks import averaged
from caprl_utils.prism.statistics import AVERAGE
from caprl_utils.prism.told import MEASURES
from caprl_utils.reports import claims, figures, numbers, said
from caprl_utils.reports import results as measuring
from caprl_utils.reports.items import CAPTIONERS, FOLLOW_UPS, Item, about_models, chosen, items, texts
from caprl_utils.reports.numbers import Cell, Source, Table
from caprl_utils.reports.paper import paper_table
from caprl_utils.reports.results import Curve, Measured, Results, keys_of, title_of
from caprl_utils.rl.experiments import MAIN
from caprl_utils.runs import load_result
from caprl_utils.schema import RL, Profile

BASE, CAPRL = "base", "CapRL"  # rows of Table 3
LABEL_HEADS = {"prism": "Captioner", "rl": "Trained with", "pretraining": "Pretrained on"}
GAPS = "Difference in percentage points with 95 % interval"


def write_all(profile: Profile, names: Sequence[str] = ()) -> list[str]:
    """Write the items named (or raise UserError), or all whose runs are there, others told; returns the names."""
    known, done = items(profile), []
    for name in names or known:
        if not names and (missing := measuring.missing_runs(profile, known[name])):
            told = f"{name}: left out, not there yet: {measuring.listed(missing)}"
            print(f"{told}; make it: make {known[name].target} PROFILE={profile.name}", file=sys.stderr)
        else:
            write(profile, name)
            done.append(name)
    return done


def write(profile: Profile, name: str) -> dict[str, Any]:
    """Write one item to the profile's folder; returns what its JSON holds. Raises UserError when a run is missing."""
    (item,) = chosen(profile, [name])
    stem = paths.reports_of(profile.name) / item.name
    results = measuring.load(profile, item)
    found, tables = claims.test_all(results), [table for table in tables_of(results) if table.rows]
    stated = "Our questions" if item.ours else "The paper's statements"
    stated = "Statements of follow-up papers" if item.name == FOLLOW_UPS else stated
    tested = [row for row in claims.statements(item, found) if row.found]
    heads = claims.HEADS[: 3 if item.ours else 5]
    statements = claims.claims_table(tested, f"{name}_statements", f"{stated}, as our data have them", heads)
    paper = [paper_table(item.paper, f"The paper's {item.short}, accuracy (%)")] if item.paper else []
    draw(results, stem)
    first = next(record for one in results.measured.values() for record in one.records.values())
    facts = {
        "profile": profile.name, "num_samples": first["n"], "claims": found, "summary": summary(results),
        "training_seeds": {label: one.training_seeds for label, one in results.measured.items()},
        "missing": results.missing,
    }  # fmt: skip
    text = _markdown(results, tables, statements, *paper or [None])
    return numbers.write(stem, facts, [*tables, *[statements] * bool(tested), *paper], text, _runs_of(results, tables))


def _runs_of(results: Results, tables: Sequence[Table]) -> list[dict[str, Any]]:
    """The runs behind an item: record, key, commit, seeds, n, hashes, names of the files with their rows."""
    kept = ("key", "commit", "dirty", "seeds", "n", "unit", "hashes")
    records: dict[str, Any] = {}
    for found in (*results.measured.values(), *results.readers.values()):
        records |= {**found.records, **found.trainings, **found.more}
    named = {source.file for table in tables for _, cells in table.rows for cell in cells for source in cell.sources}
    more = {file for file in named - records.keys() if file.endswith("/result.json")}  # of judges and their like
    records |= {file: load_result(numbers.from_record_path(file)) for file in more}
    runs = []
    for file in sorted(records):
        beside = numbers.from_record_path(file).parent.iterdir()
        rows = sorted(other.name for other in beside if other.suffix in (".parquet", ".jsonl"))
        runs.append({"file": file, **{key: records[file].get(key) for key in kept}, "rows": rows})
    return runs


def _markdown(results: Results, tables: list, statements: Table, paper: Table | None) -> str:
    """The page of an item, in the words of item.md.jinja."""
    item, profile = results.item, results.profile
    prism = item.kind == "prism"
    by_group = prism or item.figures == ["growth"] or any(claim.benchmarks for claim in item.claims)
    trained = {label: found for label, found in results.measured.items() if found.row.seeds and not found.row.bound}
    return numbers.fill(
        "item.md", item=item, profile=profile, tables=tables, statements=statements, paper=paper, numbers=numbers,
        warning=claims.SMOKE_WARNING, groups=_groups(results) if by_group else (), probed=results.readers,
        counts={label: len(found.columns) for label, found in trained.items()}, training=main_training(profile),
        captioners=_captioners(profile) if prism else "", **_measuring(results),
    )  # fmt: skip


def _measuring(results: Results) -> dict[str, Any]:
    """How was measured; floors and ceilings aside."""
    parts = [results.parts[name] for name in results.scored]
    questions, images = (_range([getattr(p, name) for p in parts]) for name in ("num_rows", "num_clusters"))
    asked = f"{questions} questions about {images} images in each of the {len(parts)} benchmarks"
    if results.item.kind == "pretraining":
        named = results.profile.models.named()
        models = {role: named[role].path for role in CAPTIONERS if role in named}
        source = results.profile.pretraining.further.data
        ours = texts()["caption_writers"].get(source)
        writers = ours.format(**models) if ours else f"The caption sets are files of the user ({source})."
        return {"asked": asked, "writers": writers}
    shown = [found for found in results.measured.values() if not found.row.bound]
    records = [record for found in shown for record in found.records.values()]
    readers = dict.fromkeys(f"{r['reader']['name']}, mode {r['reader']['mode']}" for r in records)
    captions = _range([record["captions_per_image"] for record in records])
    return {"asked": asked, "readers": readers, "captions": captions}


def _groups(results: Results) -> list[tuple[str, list[str]]]:
    """Which benchmarks are called documents and charts, which natural images, which are neither, and which are in no
    average.
    """
    found = texts()["groups"]
    rest = [key for key in results.scored if not any(key in group for group in found.values())]
    named = (("Documents and charts", found["documents"]), ("Natural images", found["natural"]))
    alone = averaged(rest)
    every = (*named, ("In the average alone", alone), ("In no average", [key for key in rest if key not in alone]))
    return [(name, [title_of(k) for k in results.scored if k in keys]) for name, keys in every]


def _captioners(profile: Profile) -> str:
    """What the captioners are that the paper compares by size, where that must be said."""
    named, about = profile.models.named(), about_models(profile).get("captioners", "")
    if not about:
        return ""
    folders = [Path(paths.resolve_model(named[role].path)) for role in CAPTIONERS if role in named]
    records = [json.loads((folder / "record.json").read_text(encoding="utf-8")) for folder in folders]
    sizes = numbers.numbers(sorted({record["parameters"] / 1e6 for record in records}))
    return about.format(sizes=" or ".join(sizes))


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return numbers.count(low) if low == high else f"{numbers.count(low)} to {numbers.count(high)}"


def main_training(profile: Profile) -> RL:
    """Settings of the trainings whose curves are drawn: those of the profile, under the experiment's own."""
    if profile.name not in names_of(Profile):  # a profile of a user's file
        return profile.rl
    return load_experiment(MAIN, profile.name)[1].rl


def summary(results: Results) -> str:
    """What an item found, in a line of the README's map: of a ladder its values and gap, else its told pairs."""
    item = results.item

    def gap(ours: str, theirs: str) -> str:
        found = results.difference(ours, theirs)
        return numbers.gap(found.value, found.low, found.high)

    if not item.ladder:
        known = [(name, pair) for name, pair in item.told_pairs.items() if results.measured.keys() >= {*pair}]
        return f"{item.told} " + ", ".join(f"{name} {gap(*pair)}" for name, pair in known)
    labels = [label for label in item.ladder if label in results.measured]
    values = numbers.percents([results.interval(label, AVERAGE).value for label in labels])
    first, last = labels[0], labels[-1]
    if len(labels) == 2:
        return f"{last} against {first}: {' to '.join(values)} ({gap(last, first)})"
    return f"{', '.join(labels)}: {', '.join(values)} ({last} against {first}: {gap(last, first)})"


def draw(results: Results, stem: Path) -> None:
    """The item's pictures; each has the item's name, or the kind of picture behind it where there are several."""
    item, profile = results.item, results.profile
    for kind in item.figures:
        target = stem if len(item.figures) == 1 else stem.with_name(f"{stem.name}_{kind}")
        if kind == "pareto" and (found := said.trade_off(results)):
            figures.plot_pareto(found, target, figures.counted(results), item.title)
        elif kind == "curves":
            step, curves = main_training(profile), curves_of(results)
            told = f"a step: {step.group_size} captions of each of {step.prompts_per_step} images"
            title = item.title if item.kind == "rl" else "Table 3: CapRL's training"
            false, note = said.false_over_steps(profile, curves), figures.about(profile, told)
            figures.plot_curves(curves, target, step.max_completion_tokens, note, false, title)
        elif kind in ("dots", "pareto"):  # of pictures whose facts are not known, accuracy alone
            shown = [label for label, found in results.measured.items() if found.records and not found.row.bound]
            groups = [*results.scored, AVERAGE]
            parts = {label: [results.interval(label, group) for group in groups] for label in shown}
            series = {label: [(p.value, p.low, p.high) for p in found] for label, found in parts.items()}
            named = [label.rpartition(", ")[0] for label in shown] if item.kind == "pretraining" else [""]
            settings = list(dict.fromkeys(named))
            heads = [title_of(group) for group in groups]
            figures.plot_dots(series, heads, target, figures.counted(results), item.title, settings)
        elif kind == "growth":
            figures.plot_growth(results, target)
        elif kind == "readers" and results.readers:
            found = {role: said.points(profile, reader) for role, reader in results.readers.items()}
            figures.plot_readers(found, profile, target)
        elif kind == "sets":
            pairs = {label: _pairs(found) for label, found in results.measured.items()}
            figures.plot_sets(results, pairs, target)


def curves_of(results: Results) -> list[Curve]:
    """The trainings behind an item; Table 3's are all CapRL's."""
    if results.item.kind != "prism":
        return [curve for found in results.measured.values() for curve in found.curves]
    found, seeds = results.measured[CAPRL], results.measured[CAPRL].training_seeds
    labels = ["CapRL"] if len(seeds) == 1 else [f"CapRL, seed {seed}" for seed in seeds]
    return [replace(curve, label=label) for curve, label in zip(found.curves, labels, strict=True)]


def tables_of(results: Results) -> list[Table]:
    """All tables of an item but the paper's."""
    tables = [scores_table(results), gaps_table(results)]
    if results.item.kind != "pretraining":
        tables.append(said.said_table(results))
    if results.item.kind == "prism":
        bounds = scores_table(results, bounds=True)
        more = best_table(results), variance_table(results)
        return [*tables, said.budget_table(results), bounds, said.readers_table(results), *more]
    if results.item.kind == "pretraining":
        tables.append(captions_table(results))
    if results.item.figures == ["pareto"]:
        return [said.footing_table(results), said.verifier_table(results), *tables]
    if results.item.figures == ["curves"]:
        tables += [curve_table(results), said.judges_table(results)]
    return tables


def scores_table(results: Results, bounds: bool = False) -> Table:
    """Accuracy with interval of every row, and its training. bounds: of floors, ceilings and controls instead."""
    item = results.item
    shown = {label: found for label, found in results.measured.items() if found.row.bound == bounds}
    shown = {label: found for label, found in shown.items() if not found.row.budget}
    columns = [_score_column(results, list(shown.values()), name) for name in results.groups]
    more = [_more_cells(item, found).values() for found in shown.values()]
    rows = [(label, [*(column[n] for column in columns), *more[n]]) for n, label in enumerate(shown)]
    heads = [*results.heads, *_more_cells(item, next(iter(results.measured.values())))]
    name, caption, notes = item.name, f"{item.title}: accuracy (%) with 95 % interval", item.notes
    if bounds:
        name, caption = "bounds", "Floors, ceilings and a control for length, accuracy (%)"
    elif item.kind == "prism":
        parts = "; ".join(f"{row.label}: {row.paper[0]}" for row in item.rows if row.paper)
        records = [record for found in results.measured.values() for record in found.records.values()]
        unread = sum(sum(record["unparsed"].values()) for record in records)
        notes = [f"In the paper: {parts}.", f"Answers that could not be read score 0: {unread} in all runs together."]
        caption, notes = "Accuracy (%) with 95 % interval", [*notes, *_missing(results)]
    notes = () if bounds else [*notes, *results.notes()]
    return Table(name, caption, LABEL_HEADS[item.kind], heads, rows, notes)


def _missing(results: Results) -> list[str]:
    """What of the whole table was not evaluated, by row and run."""
    gone = [f"{k} ({', '.join(v)})" for k, v in results.missing.items() if k not in results.measured]
    notes = [f"Not evaluated, so not in the tables: {'; '.join(gone)}."] if gone else []
    for label, found in results.measured.items():
        if names := results.missing.get(label):
            seeds = f"{len(found.records)} of {len(found.row.runs)} training seeds"
            notes.append(f"{label} is averaged over {seeds}; not evaluated: {', '.join(names)}.")
    return notes


def _score_column(results: Results, shown: Sequence[Measured], benchmark: str) -> list[Cell]:
    if benchmark not in results.parts:
        return [Cell(numbers.MISSING)] * len(shown)
    values, cells = [_score(results, found, benchmark) for found in shown], []
    answers = next(iter(results.measured.values())).samples("gold")  # what a row without a run is scored by
    for found, value, text in zip(shown, values, numbers.percents(values), strict=True):
        part = results.interval(found.row.label, benchmark)
        bounds, sources = (part.low, part.high), found.sources(*keys_of(benchmark)) or answers
        cells.append(Cell(f"{text} {numbers.interval(bounds)}", value, bounds, sources))
    return cells


def _cells(texts: Sequence[str], values: Sequence, sources: Sequence[Sequence[Source]]) -> list[Cell]:
    """Cells of a row without intervals."""
    return [Cell(t, v, None, tuple(s)) for t, v, s in zip(texts, values, sources, strict=True)]


def _score(results: Results, found: Measured, benchmark: str) -> float:
    """The value on record (or UserError if scores say otherwise); of VLMs, or with samples left out, the resampled."""
    mean, keys = results.interval(found.row.label, benchmark).value, keys_of(benchmark)
    value = found.mean_of(*keys)
    if value is None or results.left_out:
        return mean
    if abs(value - mean) > 1e-9:
        told = f"{'/'.join(keys)} is {value}, its samples.parquet says {mean}"
        raise UserError(f"{next(iter(found.records))}: {told}; delete that run and make it again")
    return mean if results.item.kind == "pretraining" else value


def _more_cells(item: Item, found: Measured) -> dict[str, Cell]:
    """Column -> what is told of a row besides its scores."""
    first = next(iter(found.trainings.values()), None)
    if item.kind == "pretraining":
        trained = len(found.records) or None
        cells = {"Trainings": Cell(numbers.count(trained), trained)}
        facts = {"Caption pairs": (_pairs(found) if trained else None, "n")}
    else:
        tokens, sources = found.mean_of("caption_tokens"), found.sources("caption_tokens")
        cells, facts = {"Caption tokens": Cell(numbers.number(tokens), tokens, None, sources)}, {}
    if item.kind == "rl":
        facts["Training images"] = (first and first["n"], "n")
        facts["Steps"] = (first and first["values"]["steps"], "values/steps")
        facts["Trainings"] = (len(found.trainings) or None, "values/steps")
    for head, (value, key) in facts.items():
        sources = tuple(Source(file, key) for file in found.trainings)
        cells[head] = Cell(numbers.count(value), value, None, sources)
    return cells


def _pairs(found: Measured) -> int:
    """Caption pairs that a VLM was trained on; all seeds train on the same rows."""
    return next((record["n"] for record in found.trainings.values()), 0)


def gaps_table(results: Results) -> Table:
    """Differences with p; in Table 3 also of single benchmarks, after Holm over these."""
    table3 = results.item.kind == "prism"
    rows = []
    for ours, theirs in results.pairs:
        gaps = {name: results.difference(ours, theirs, [name]) for name in (*results.scored, AVERAGE)}
        values = [gap.value for gap in gaps.values()]
        texts = numbers.differences(values) if table3 else [numbers.difference(value) for value in values]
        ps = statistics.holm({name: gaps[name].p_value for name in results.scored}) if table3 else {}
        ps[AVERAGE] = gaps[AVERAGE].p_value
        cells = dict.fromkeys(results.groups, Cell(numbers.MISSING))
        for (name, gap), text in zip(gaps.items(), texts, strict=True):
            bounds, p = (gap.low, gap.high), f", {numbers.p_value(ps[name])}" if name in ps else ""
            shown = f"{text} {numbers.interval(bounds, signed=True)}{p}"
            sources = [results.measured[label].sources(*keys_of(name)) for label in (ours, theirs)]
            cells[name] = Cell(shown, gap.value, bounds, sources[0] + sources[1])
        rows.append((f"{ours} − {theirs}".replace("control: ", ""), list(cells.values())))
    name = "differences" if table3 else f"{results.item.name}_gaps"
    notes = [_note("gaps") + (_note("single") if table3 else ""), *_spread_note(results)]
    return Table(name, GAPS, "Comparison", results.heads, rows, notes)


def _spread_note(results: Results) -> list[str]:
    """How much trainings differ on the average, with the degrees of freedom, if anything was trained."""
    if not any(found.row.seeds for found in results.measured.values()):
        return []
    if (spread := results.spread(results.mean_on())) is None:
        return [_note("no_spread")]
    single, paired = numbers.percent(sqrt(spread.single)), numbers.percent(sqrt(2 * spread.paired))
    rows = sum(len(records) > 1 for _, records in results.kin)
    kind = "pretraining" if results.item.kind == "pretraining" else "reinforcement learning"
    facts = {"single_df": spread.single_df, "paired_df": spread.paired_df, "own": statistics.OWN_SPREAD}
    return [_note("spread", single=single, paired=paired, rows=rows, kind=kind, **facts)]


def _note(name: str, **values: Any) -> str:
    return texts()["notes"][name].format(**values)


def captions_table(results: Results) -> Table:
    """What the caption sets are like that VLMs are pretrained on, where our models wrote them."""
    heads = {"count": "Captions", **{name: measure.head for name, measure in MEASURES.items()}, "cut": "Cut (%)",
             "looped": "Loops (%)"}  # fmt: skip
    plain = {name: numbers.number for name, measure in MEASURES.items() if not measure.share}
    prints, rows = {"count": numbers.count, **plain}, {}
    sets = [found for found in results.measured.values() if found.row.captions]
    for name, file, record in [(s.row.captions[0], *entry) for s in sets for entry in s.more.items()]:
        if values := record["values"].get("captions"):
            printed = [prints.get(key, numbers.percent)(values[key]) for key in heads]
            sources = [[Source(file, f"values/captions/{key}")] for key in heads]
            rows[name] = _cells(printed, [values[key] for key in heads], sources)
    name = f"{results.item.name}_captions"
    return Table(name, "The caption sets", "Set", [*heads.values()], list(rows.items()), [_note("captions")])


def curve_table(results: Results) -> Table:
    """Reward and caption length at either end of each training."""
    rows = []
    for curve in curves_of(results):
        rewards, lengths = claims.ends(curve.rewards), claims.ends(curve.lengths)
        printed = [*numbers.numbers(rewards, decimals=3), *numbers.numbers(lengths)]
        keys = ("reward", "reward", "completion_tokens", "completion_tokens")
        sources = [[Source(curve.file, key)] for key in keys]
        rows.append((curve.label, _cells(printed, [*rewards, *lengths], sources)))
    heads = ["Reward, first steps", "last steps", "Caption tokens, first steps", "last steps"]
    notes = [_note("curves", steps=claims.WINDOW_STEPS)]
    return Table(f"{results.item.name}_curves", "The trainings", "Reward", heads, rows, notes)


def best_table(results: Results) -> Table:
    """Mean over an image's captions beside the best of n, averages over the benchmarks (%)."""
    first = next(iter(results.measured[BASE].records.values()))["values"]["benchmarks"]
    counts, rows = list(first[results.scored[0]]["best_of"]), []
    for label, found in [(name, one) for name, one in results.measured.items() if not one.row.bound]:
        values, sources = [found.mean_of(AVERAGE)], [found.sources(AVERAGE)]
        for k in counts:
            places = [("benchmarks", name, "best_of", k) for name in averaged(results.scored)]
            each = [found.mean_of(*keys) for keys in places]
            values.append(None if None in each else sum(each) / len(each))
            sources.append([source for keys in places for source in found.sources(*keys)])
        rows.append((label, _cells(numbers.percents(values), values, sources)))
    heads, caption = ["Mean", *(f"Best of {k}" for k in counts)], "Mean and best of n captions, average (%)"
    return Table("best_of", caption, "Captioner", heads, rows, [_note("best_of")])


def variance_table(results: Results) -> Table:
    """Standard deviation of single scores by source, in points: questions, captions of one."""
    rows = []
    for label, found in ((label, results.measured[label]) for label in (BASE, CAPRL)):
        parts = statistics.variance_components(_score_array(next(iter(found.by_run.values()))))
        values = [None if part is None else sqrt(part) for part in parts]
        rows.append((label, _cells([numbers.percent(v) for v in values], values, [found.samples("score")] * 2)))
    notes = [_note("variance")]
    if len(found.records) > 1:
        averages = numbers.percents([record["values"][AVERAGE] for record in found.records.values()])
        names = [Path(file).parent.name for file in found.records]
        each = ", ".join(f"{text} ({name})" for name, text in zip(names, averages, strict=True))
        notes.append(f"Averages of the trainings of {CAPRL}: {each}.")
    caption = "Where scores vary: standard deviation in percentage points"
    return Table("variance", caption, "Captioner", ["Between questions", "Between captions"], rows, notes)


def _score_array(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Scores of one run as (questions, captions), of the questions that have all."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in (row for row in rows if row["score"] is not None):
        found.setdefault((row["benchmark"], row["sample_id"]), []).append(row["score"])
    most = max(map(len, found.values()))
    return [scores for _, scores in sorted(found.items()) if len(scores) == most]
