"""The one writer of tables and figures: an item becomes <name>.md, .csv, .json and its pictures, from finished runs.

The same results give the same bytes. Every cell keeps the record and the key that its number was read from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_experiment, names_of
from caprl_utils.errors import UserError
from caprl_utils.files import note_access
from caprl_utils.image_sources import open_images
from caprl_utils.prism import statistics
from caprl_utils.prism.benchmarks import averaged
from caprl_utils.prism.statistics import AVERAGE, Interval
from caprl_utils.prism.told import MEASURES, counts, false
from caprl_utils.registry import drawn_source
from caprl_utils.reports import claims, figures, numbers
from caprl_utils.reports import results as measuring
from caprl_utils.reports.items import CAPTIONERS, FOLLOW_UPS, Item, about_models, budget_label, chosen, items, texts
from caprl_utils.reports.numbers import Cell, Source, Table, cell_of, cells_of, from_record_path, plain, record_path
from caprl_utils.reports.paper import paper_table
from caprl_utils.reports.results import READERS, Curve, Mean, Measured, Results, keys_of, points, title_of
from caprl_utils.rl import judge_trial
from caprl_utils.rl.experiments import MAIN
from caprl_utils.runs import load_result
from caprl_utils.schema import RL, Profile

BASE, CAPRL = "base", "CapRL"  # rows of Table 3
LABEL_HEADS = {"prism": "Captioner", "rl": "Trained with", "pretraining": "Pretrained on"}
GAPS = "Difference in percentage points with 95 % interval"
JUDGES = {"vlm_judge": "VLM judge", "reward_judge": "rating judge"}
FOOTING = ("told", "false share", "not shown", "repeats", "tokens")  # of MEASURES
BY_REWARD = ", by the reward's reader"  # what labels of rows end with that it reads (configs/reports.yaml)
COSTS = {"reward_calls": "Reward calls a step", "seconds_reward": "Seconds waited for it", "seconds": "Seconds a step"}


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
    paper = paper_table(item.paper, f"The paper's {item.short}, accuracy (%)") if item.paper else None
    draw(results, stem)
    first = next(record for one in results.measured.values() for record in one.records.values())
    facts = {
        "profile": profile.name, "num_samples": first["n"], "claims": found, "summary": summary(results),
        "training_seeds": {label: one.training_seeds for label, one in results.measured.items()},
        "missing": results.missing,
    }  # fmt: skip
    records: dict[str, Any] = {}
    for one in (*results.measured.values(), *results.readers.values()):
        records |= {**one.records, **one.trainings, **one.more}
    named = {source.file for table in tables for _, cells in table.rows for cell in cells for source in cell.sources}
    more = {file for file in named - records.keys() if file.endswith("/result.json")}  # of judges and their like
    runs = runs_of(records | {file: load_result(from_record_path(file)) for file in more})
    every = [*tables, *[statements] * bool(tested), *[paper] * bool(paper)]
    return numbers.write(stem, facts, every, _markdown(results, tables, statements, paper), runs)


def runs_of(records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a report says of its runs: record, key, commit, seeds, n, hashes, names of the files with their rows."""
    kept, runs = ("key", "commit", "dirty", "seeds", "n", "unit", "hashes"), []
    for file in sorted(records):
        beside = from_record_path(file).parent.iterdir()
        rows = sorted(other.name for other in beside if other.suffix in (".parquet", ".jsonl"))
        runs.append({"file": file, **{key: records[file].get(key) for key in kept}, "rows": rows})
    return runs


def _markdown(results: Results, tables: list, statements: Table, paper: Table | None) -> str:
    """The page of an item, in the words of item.md.jinja; floors and ceilings say nothing of how was measured."""
    item, profile, named = results.item, results.profile, results.profile.models.named()
    prism = item.kind == "prism"
    by_group = prism or item.figures == ["growth"] or any(claim.benchmarks for claim in item.claims)
    parts = [results.parts[name] for name in results.scored]
    questions, images = (_range([getattr(p, name) for p in parts]) for name in ("num_rows", "num_clusters"))
    told = {"asked": f"{questions} questions about {images} images in each of the {len(parts)} benchmarks"}
    if item.kind == "pretraining":
        source = profile.pretraining.further.data
        ours = texts()["caption_sets"].get(source)
        told["writers"] = ours["writers"] if ours else f"The caption sets are files of the user ({source})."
    else:
        records = [record for found in results.unbound.values() for record in found.records.values()]
        told["readers"] = dict.fromkeys(f"{r['reader']['name']}, mode {r['reader']['mode']}" for r in records)
        told["captions"] = _range([record["captions_per_image"] for record in records])
    captioners = about_models(profile).get("captioners", "") if prism else ""
    if captioners:
        folders = [Path(paths.resolve_model(named[role].path)) for role in CAPTIONERS if role in named]
        made = [json.loads((folder / "record.json").read_text(encoding="utf-8")) for folder in folders]
        sizes = numbers.numbers(sorted({record["parameters"] / 1e6 for record in made}))
        captioners = captioners.format(sizes=" or ".join(sizes))
    return numbers.fill(
        "item.md", item=item, profile=profile, tables=tables, statements=statements, paper=paper, numbers=numbers,
        warning=claims.SMOKE_WARNING, groups=_groups(results) if by_group else (), probed=results.readers,
        counts={label: len(found.columns) for label, found in results.unbound.items() if found.row.seeds},
        training=main_training(profile) if item.figures == ["curves"] else None,
        captioners=captioners, signs=texts()["signs"], **told,
    )  # fmt: skip


def _groups(results: Results) -> list[tuple[str, list[str]]]:
    """Which benchmarks are called documents and charts, natural images, neither, and which are in no average."""
    found = texts()["groups"]
    rest = [key for key in results.scored if not any(key in group for group in found.values())]
    named = (("Documents and charts", found["documents"]), ("Natural images", found["natural"]))
    alone = averaged(rest)
    every = (*named, ("In the average alone", alone), ("In no average", [key for key in rest if key not in alone]))
    return [(name, [title_of(k) for k in results.scored if k in keys]) for name, keys in every]


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

    def gap(*pair: str) -> str:
        return cell_of(results.difference(*pair), (), numbers.gap).text

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
        if kind == "pareto" and (found := trade_off(results)):
            figures.plot_pareto(found, target, figures.counted(results), item.title)
        elif kind == "curves":
            step, curves = main_training(profile), curves_of(results)
            told = f"a step: {step.group_size} captions of each of {step.prompts_per_step} images"
            title = item.title if item.kind == "rl" else "Table 3: CapRL's training"
            wrong, note = false_over_steps(profile, curves), figures.about(profile, told)
            figures.plot_curves(curves, target, step.max_completion_tokens, note, wrong, title)
        elif kind in ("dots", "pareto"):  # of pictures whose facts are not known, accuracy alone
            shown = [label for label, found in results.unbound.items() if found.records]
            groups = [*results.scored, AVERAGE]
            parts = {label: [results.interval(label, group) for group in groups] for label in shown}
            series = {label: [(p.value, p.low, p.high) for p in found] for label, found in parts.items()}
            named = [label.rpartition(", ")[0] for label in shown] if item.kind == "pretraining" else [""]
            settings, heads = list(dict.fromkeys(named)), [title_of(group) for group in groups]
            figures.plot_dots(series, heads, target, figures.counted(results), item.title, settings)
        elif kind != "readers" or results.readers:
            plot = {"growth": figures.plot_growth, "readers": figures.plot_readers, "sets": figures.plot_sets}[kind]
            plot(results, target)


def curves_of(results: Results) -> list[Curve]:
    """The trainings behind an item; Table 3's are all CapRL's."""
    if results.item.kind != "prism":
        return [curve for found in results.measured.values() for curve in found.curves]
    found, seeds = results.measured[CAPRL], results.measured[CAPRL].training_seeds
    labels = ["CapRL"] if len(seeds) == 1 else [f"CapRL, seed {seed}" for seed in seeds]
    return [replace(curve, label=label) for curve, label in zip(found.curves, labels, strict=True)]


def tables_of(results: Results) -> list[Table]:
    """All tables of an item but the paper's."""
    first = [scores_table(results), gaps_table(results)]
    if results.item.kind == "pretraining":
        return [*first, captions_table(results)]
    first.append(said_table(results))
    if results.item.kind == "prism":
        more = scores_table(results, bounds=True), readers_table(results), best_table(results)
        return [*first, budget_table(results), *more, variance_table(results)]
    if results.item.figures == ["pareto"]:
        return [footing_table(results), verifier_table(results), *first]
    if results.item.figures == ["curves"]:
        return [*first, curve_table(results), judges_table(results)]
    return first


def scores_table(results: Results, bounds: bool = False) -> Table:
    """Accuracy with interval of every row, and its training. bounds: of floors, ceilings and controls instead."""
    item, measured = results.item, results.measured
    shown = {label: one for label, one in measured.items() if one.row.bound == bounds and not one.row.budget}
    columns = [_score_column(results, list(shown.values()), name) for name in results.groups]
    more = [_more_cells(item, found).values() for found in shown.values()]
    rows = [(label, [*(column[n] for column in columns), *more[n]]) for n, label in enumerate(shown)]
    heads = [*map(title_of, results.groups), *_more_cells(item, next(iter(measured.values())))]
    if bounds:
        caption = "Floors, ceilings and a control for length, accuracy (%)"
        return Table("bounds", caption, LABEL_HEADS[item.kind], heads, rows)
    caption, notes = f"{item.title}: accuracy (%) with 95 % interval", item.notes
    if item.kind == "prism":
        caption = "Accuracy (%) with 95 % interval"
        parts = "; ".join(f"{row.label}: {row.paper[0]}" for row in item.rows if row.paper)
        records = [record for found in measured.values() for record in found.records.values()]
        unread = sum(sum(record["unparsed"].values()) for record in records)
        notes = [f"In the paper: {parts}.", f"Answers that could not be read score 0: {unread} in all runs together."]
        gone = [f"{k} ({', '.join(v)})" for k, v in results.missing.items() if k not in measured]
        notes += [f"Not evaluated, so not in the tables: {'; '.join(gone)}."] if gone else []
        for label, names in ((label, results.missing.get(label)) for label in measured):
            if names:
                seeds = f"{len(measured[label].records)} of {len(measured[label].row.runs)} training seeds"
                notes.append(f"{label} is averaged over {seeds}; not evaluated: {', '.join(names)}.")
    unscored = ", ".join(title_of(name) for name in results.groups if name not in results.parts)
    lost = [f"{count} of {title_of(name)}" for name, count in results.left_out.items() if name in results.parts]
    notes = [*notes, *[f"Without scores, and not in the average: {unscored}."] * bool(unscored)]
    notes += [f"Samples that some row has no score for are left out of all: {', '.join(lost)}."] if lost else []
    return Table(item.name, caption, LABEL_HEADS[item.kind], heads, rows, notes)


def _score_column(results: Results, shown: Sequence[Measured], benchmark: str) -> list[Cell]:
    """Scores of rows on a benchmark: the values on record (or UserError where scores say otherwise); of VLMs, or with
    samples left out, the resampled.
    """
    if benchmark not in results.parts:
        return [Cell()] * len(shown)
    keys, parts, values = keys_of(benchmark), [results.interval(one.row.label, benchmark) for one in shown], []
    for found, part in zip(shown, parts, strict=True):
        value = found.mean_of(*keys)
        if value is None or results.left_out:
            value = part.value
        elif abs(value - part.value) > 1e-9:
            told = f"{'/'.join(keys)} is {value}, its samples.parquet says {part.value}"
            raise UserError(f"{next(iter(found.records))}: {told}; delete that run and make it again")
        values.append(part.value if results.item.kind == "pretraining" else value)
    answers = next(iter(results.measured.values())).samples("gold")  # what a row without a run is scored by
    return [
        Cell(f"{text} {numbers.interval((p.low, p.high))}", value, (p.low, p.high), found.sources(*keys) or answers)
        for found, p, value, text in zip(shown, parts, values, numbers.percents(values), strict=True)
    ]


def _more_cells(item: Item, found: Measured) -> dict[str, Cell]:
    """Column -> what is told of a row besides its scores."""
    first, records = next(iter(found.trainings.values()), None), numbers.sources(found.trainings, "n")
    if item.kind == "pretraining":
        trained = len(found.records) or None
        pairs = plain(found.trained_on if trained else None, records, numbers.count)
        return {"Trainings": plain(trained, (), numbers.count), "Caption pairs": pairs}
    cells = {"Caption tokens": plain(found.mean_of("caption_tokens"), found.sources("caption_tokens"))}
    if item.kind == "rl":
        steps = numbers.sources(found.trainings, "values", "steps")
        cells["Training images"] = plain(found.trained_on if first else None, records, numbers.count)
        cells["Steps"] = plain(first and first["values"]["steps"], steps, numbers.count)
        cells["Trainings"] = plain(len(found.trainings) or None, steps, numbers.count)
    return cells


def gaps_table(results: Results) -> Table:
    """Differences with p; in Table 3 also of single benchmarks, after Holm over these. Below: how much trainings differ
    on the average, if anything was trained.
    """
    table3, rows = results.item.kind == "prism", []
    for ours, theirs in results.pairs:
        gaps = {name: results.difference(ours, theirs, [name]) for name in (*results.scored, AVERAGE)}
        values = [gap.value for gap in gaps.values()]
        printed = numbers.differences(values) if table3 else [numbers.difference(value) for value in values]
        ps = statistics.holm({name: gaps[name].p_value for name in results.scored}) if table3 else {}
        ps[AVERAGE] = gaps[AVERAGE].p_value
        cells = dict.fromkeys(results.groups, Cell())
        for (name, gap), text in zip(gaps.items(), printed, strict=True):
            bounds, p = (gap.low, gap.high), f", {numbers.p_value(ps[name])}" if name in ps else ""
            shown = f"{text} {numbers.interval(bounds, signed=True)}{p}"
            sources = [results.measured[label].sources(*keys_of(name)) for label in (ours, theirs)]
            cells[name] = Cell(shown, gap.value, bounds, sources[0] + sources[1])
        rows.append((f"{ours} − {theirs}".replace("control: ", ""), list(cells.values())))
    notes = [_note("gaps") + (_note("single") if table3 else "")]
    if any(found.row.seeds for found in results.measured.values()):
        notes.append(_note("no_spread"))
        if spread := measuring.spread_of(results.kin, results.accuracy().value):
            facts = spread._asdict() | {"single": numbers.percent(sqrt(spread.single)), "own": statistics.OWN_SPREAD}
            facts["paired"] = numbers.percent(sqrt(2 * spread.paired))
            kind = "pretraining" if results.item.kind == "pretraining" else "reinforcement learning"
            many = sum(len(records) > 1 for _, records in results.kin)
            notes[-1] = _note("spread", rows=many, kind=kind, **facts)
    name = "differences" if table3 else f"{results.item.name}_gaps"
    return Table(name, GAPS, "Comparison", [title_of(name) for name in results.groups], rows, notes)


def _note(name: str, **values: Any) -> str:
    return texts()["notes"][name].format(**values)


def captions_table(results: Results) -> Table:
    """What the caption sets are like that VLMs are pretrained on, where our models wrote them."""
    heads = {"count": "Captions", **{name: measure.head for name, measure in MEASURES.items()}, "cut": "Cut (%)",
             "looped": "Loops (%)"}  # fmt: skip
    prints = dict.fromkeys(heads, numbers.percent) | {"count": numbers.count}
    prints |= {name: numbers.number for name, measure in MEASURES.items() if not measure.share}
    rows: dict[str, list[Cell]] = {}
    for found in (found for found in results.measured.values() if found.row.captions):
        for file, values in ((file, record["values"].get("captions")) for file, record in found.more.items()):
            if values:
                sources = {key: [Source(file, f"values/captions/{key}")] for key in heads}
                rows[found.row.captions[0]] = [plain(values[key], sources[key], prints[key]) for key in heads]
    name = f"{results.item.name}_captions"
    return Table(name, "The caption sets", "Set", [*heads.values()], list(rows.items()), [_note("captions")])


def curve_table(results: Results) -> Table:
    """Reward and caption length at either end of each training."""
    rows = []
    for curve in curves_of(results):
        rewards, lengths = claims.ends(curve.rewards), claims.ends(curve.lengths)
        printed = [*numbers.numbers(rewards, decimals=3), *numbers.numbers(lengths)]
        sources = [[Source(curve.file, key)] for key in ("reward", "reward", "completion_tokens", "completion_tokens")]
        rows.append((curve.label, cells_of([*rewards, *lengths], sources, printed)))
    heads = ["Reward, first steps", "last steps", "Caption tokens, first steps", "last steps"]
    notes = [_note("curves", steps=claims.WINDOW_STEPS)]
    return Table(f"{results.item.name}_curves", "The trainings", "Reward", heads, rows, notes)


def best_table(results: Results) -> Table:
    """Mean over an image's captions beside the best of n, averages over the benchmarks (%)."""
    first = next(iter(results.measured[BASE].records.values()))["values"]["benchmarks"]
    counts, rows = list(first[results.scored[0]]["best_of"]), []
    for label, found in results.unbound.items():
        values, sources = [found.mean_of(AVERAGE)], [found.sources(AVERAGE)]
        for k in counts:
            places = [("benchmarks", name, "best_of", k) for name in averaged(results.scored)]
            each = [found.mean_of(*keys) for keys in places]
            values.append(None if None in each else sum(each) / len(each))
            sources.append([source for keys in places for source in found.sources(*keys)])
        rows.append((label, cells_of(values, sources, numbers.percents(values))))
    heads, caption = ["Mean", *(f"Best of {k}" for k in counts)], "Mean and best of n captions, average (%)"
    return Table("best_of", caption, "Captioner", heads, rows, [_note("best_of")])


def variance_table(results: Results) -> Table:
    """Standard deviation of single scores between questions and captions of one, in points, of each row's first run."""
    rows = []
    for label, found in ((label, results.measured[label]) for label in (BASE, CAPRL)):
        scores: dict[tuple[str, str], list[float]] = {}
        for row in (row for row in next(iter(found.by_run.values())) if row["score"] is not None):
            scores.setdefault((row["benchmark"], row["sample_id"]), []).append(row["score"])
        most = max(map(len, scores.values()))
        parts = statistics.variance_components([one for _, one in sorted(scores.items()) if len(one) == most])
        values = [None if part is None else sqrt(part) for part in parts]
        rows.append((label, [plain(value, found.samples("score"), numbers.percent) for value in values]))
    notes = [_note("variance")]
    if len(found.records) > 1:
        averages = numbers.percents([record["values"][AVERAGE] for record in found.records.values()])
        names = [Path(file).parent.name for file in found.records]
        each = ", ".join(f"{text} ({name})" for name, text in zip(names, averages, strict=True))
        notes.append(f"Averages of the trainings of {CAPRL}: {each}.")
    caption = "Where scores vary: standard deviation in percentage points"
    return Table("variance", caption, "Captioner", ["Between questions", "Between captions"], rows, notes)


def said_table(results: Results) -> Table:
    """Every measure of what captions say with its interval, of rows and comparisons; none where facts are not known."""
    shown = results.unbound.keys() | {side for pair in results.pairs for side in pair}
    measured = ((label, found) for label, found in results.measured.items() if label in shown)
    labels = [label for label, found in measured if any(row["facts"] is not None for row in found.rows)]
    means = {name: results.said(name, labels) for name in MEASURES} if labels else {}
    sides = [*((label,) for label in labels), *(pair for pair in results.pairs if {*pair} <= {*labels})]
    rows = [(" − ".join(side), [_said(results, name, mean, *side) for name, mean in means.items()]) for side in sides]
    heads = [measure.head for measure in MEASURES.values()]
    name = f"{results.item.name}_said"
    return Table(name, "What the captions say", "Captions of", heads, rows, [_note("said")])


def _said(results: Results, name: str, mean: Mean | None, ours: str, theirs: str | None = None) -> Cell:
    """A row's value, its interval beside the raw number alone; or a difference, with its interval in print."""
    if mean is None:
        return Cell()
    measure, found = MEASURES[name], results.contrast(mean, ours, theirs)
    sources = [s for side in (ours, theirs) if side for s in results.measured[side].samples(measure.column)]
    if theirs:
        return cell_of(found, sources, partial(numbers.gap, decimals=measure.decimals))
    text = numbers.percent(found.value) if measure.share else numbers.numbers([found.value], measure.decimals)[0]
    return Cell(text, found.value, (found.low, found.high), tuple(sources))


def budget_table(results: Results) -> Table:
    """Averages under each token budget and of joined captions, and how far ours is ahead."""
    budgets = sorted({found.row.budget for found in results.measured.values() if found.row.budget})
    there, (ours, theirs) = results.measured, results.item.pairs[0]
    cut = {label: [*(budget_label(label, n) for n in budgets), label] for label in results.unbound}
    rows = [(label, [_average(results, name) for name in names]) for label, names in cut.items()]
    joined = next((name for name, found in there.items() if found.row.runs[0].endswith("-joined")), None)
    if joined:
        rows.append((joined, [*[Cell()] * len(budgets), _average(results, joined)]))
    sides = zip(cut[ours], cut[theirs], strict=True)
    rows.append((f"{ours} − {theirs}", [_average(results, *pair) for pair in sides]))
    length = numbers.number(there[joined].mean_of("caption_tokens")) if joined else numbers.MISSING
    heads = [*(f"First {n} tokens" for n in budgets), "Whole captions"]
    notes = [_note("budgets", joined=length)]
    caption = "From the first tokens of each caption: accuracy (%) with 95 % interval"
    return Table("budgets", caption, "Captioner", heads, rows if budgets else [], notes)


def _average(results: Results, ours: str, theirs: str | None = None) -> Cell:
    """Average accuracy of a row, or of a comparison the difference; a dash where one was not evaluated."""
    sides = [side for side in (ours, theirs) if side]
    if not results.measured.keys() >= {*sides}:
        return Cell()
    sources = [source for side in sides for source in results.measured[side].sources(AVERAGE)]
    if theirs:
        return cell_of(results.difference(ours, theirs), sources, numbers.gap)
    return cell_of(results.interval(ours, AVERAGE), sources)


def false_over_steps(profile: Profile, curves: Sequence[Curve]) -> list[list[float]]:
    """False statements a caption at every step of each training, by the captions that are kept of it (the group of one
    image); empty where none are kept or the facts of the images are not known.
    """
    files = [from_record_path(curve.file).with_name("samples.jsonl") for curve in curves]
    if not drawn_source(profile.images.source) or not all(file.is_file() for file in files):
        return []
    metas, found = {image.id: image.meta for image in open_images(profile)}, []
    for curve, file in zip(curves, files, strict=True):
        note_access(file)
        by_step: dict[int, list[int]] = {}
        for row in map(json.loads, file.read_bytes().splitlines()):
            by_step.setdefault(row["step"], []).append(false(counts(row["caption"], metas[row["image_id"]])))
        found.append([sum(by_step[step]) / len(by_step[step]) for step in curve.steps])
    return found


def readers_table(results: Results) -> Table:
    """Every probe with what both readers made of it."""
    found = {role: points(results.profile, reader) for role, reader in results.readers.items()}
    rows = []
    for name, (tokens, *_) in next(iter(found.values()), {}).items():
        cells = []
        for role, reader in results.readers.items():
            cells += [cell_of(part, reader.samples("score")) for part in found[role][name][1:]]
        rows.append((name, [plain(tokens, reader.samples("num_tokens")), *cells]))
    heads = [head for role in found for head in (READERS[role], f"{READERS[role]}, questions with options")]
    caption = "Are the readers valid? Accuracy (%) with 95 % interval from captions made of known facts"
    return Table("readers", caption, "Caption", ["Tokens", *heads], rows, [_note("readers")])


def judges_table(results: Results) -> Table:
    """How often either judge scores the better of two captions higher, where that was tried (`rl.judge_trial`)."""
    trials, cells = {name: found for role, name in JUDGES.items() if (found := _trial(results, role))}, {}
    for file, values in trials.values():
        for pair, share in values["pairs"].items():
            cells.setdefault(pair, []).append(plain(share, [Source(file, f"values/pairs/{pair}")], numbers.percent))
    caption = "Are the judges valid? How often the better of two captions of known facts is scored higher (%)"
    return Table("judges", caption, "Better and worse", [*trials], list(cells.items()), [_note("judges")])


def _trial(results: Results, role: str) -> tuple[str, Mapping[str, Any]] | None:
    """Record and values of the trial of a judge, if there was one."""
    file = paths.RUNS / results.profile.name / judge_trial.STAGE / role / "result.json"
    return (record_path(file), load_result(file)["values"]) if file.is_file() else None


def footing_table(results: Results) -> Table:
    """What each reward taught, by both readers and by the known facts, and its cost. Each row is over its own images:
    one that states nothing leaves the others whole.
    """
    rows = []
    for label, found in results.unbound.items():
        cells = [_average(results, label), _average(results, f"{label}{BY_REWARD}")]
        cells += [_said(results, name, results.said(name, [label]), label) for name in FOOTING]
        for key in COSTS:
            values = [record["values"].get(key) for record in found.trainings.values()]
            known = bool(values) and None not in values
            sources = numbers.sources(found.trainings, "values", key)
            cells.append(plain(sum(values) / len(values), sources) if known else Cell())
        rows.append((label, cells))
    measures = (MEASURES[name].head for name in FOOTING)
    heads = ["Accuracy (%)", "by the reward's reader", *measures, *COSTS.values()]
    caption = "What each reward teaches: accuracy (%) with 95 % interval, what captions say, cost"
    return Table(f"{results.item.name}_footing", caption, "Trained with", heads, rows, [_note("footing")])


def trade_off(results: Results) -> dict[str, tuple[Interval, Interval, float]]:
    """Row -> (facts told, share of false statements, tokens a caption), of rows that state something."""
    found = {}
    for label, one in results.unbound.items():
        means = [results.said(name, [label]) for name in ("told", "false share")]
        if None not in means:
            found[label] = *(results.contrast(mean, label) for mean in means), one.mean_of("caption_tokens")
    return found


def verifier_table(results: Results) -> Table:
    """How often the verifier of the correctness reward errs, where that was tried (`rl.judge_trial.verify`)."""
    (file, values), rows = _trial(results, judge_trial.VERIFIER) or ("", {}), []
    for kind, found in values.items():
        sentences, error = (Source(file, f"values/{kind}/{key}") for key in ("sentences", "error"))
        cells = [plain(found["sentences"], [sentences], numbers.count)]
        rows.append((kind, [*cells, plain(found["error"], [error], numbers.percent)]))
    caption = "The verifier's own error on held-out pictures: sentences that it takes for the opposite (%)"
    notes = [_note("verifier")]
    return Table("verifier", caption, "Sentence", ["Sentences", "Taken for the opposite (%)"], rows, notes)
