"""Write Tables 4 to 6, Figures 1c and 5 and our extra tables from finished runs.

    python -m caprl_utils.reports.ablations [table4 ...] --profile mini            from what is there
    python -m caprl_utils.reports.ablations [table4 ...] --profile mini --train    trains what is missing first

Each item becomes <name>.md, .csv and .json, figures PNG and SVG beside them. The same results give the same bytes.
Without names, items whose runs are not there are left out and told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError, command_line, nearest
from caprl_utils.files import note_access, write_atomic
from caprl_utils.notebook import prepare_process
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.statistics import AVERAGE
from caprl_utils.reports import claims, figures, numbers, opening, report3, table3
from caprl_utils.reports.ablation_items import BY_NAME, DOCUMENTS, ITEMS, NATURAL, Item, Row
from caprl_utils.reports.growth import plot_growth
from caprl_utils.reports.paper import paper_table
from caprl_utils.reports.results import Results, load
from caprl_utils.reports.summary import told
from caprl_utils.reports.tables import Cell, Source, Table, json_text, record_path
from caprl_utils.rl.experiments import run_all, run_name, seeds_of
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

MAKE = "make reproduce"


def write_all(
    profile: Profile, names: Sequence[str] = (), folder: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Write the items named, or all that have their runs; returns item -> what its JSON holds.

    Raises UserError for an unknown name, and for a named item whose runs are missing.
    """
    folder = report3.report_folder(profile) if folder is None else folder
    report3.refuse_smoke(profile, folder)
    for name in names:
        if name not in BY_NAME:
            close = nearest(name, list(BY_NAME))
            raise UserError(f"no item {name!r}{f'; did you mean {close[0]}?' if close else ''} "
                            f"There are {', '.join(BY_NAME)}")  # fmt: skip
    done = {}
    for item in ITEMS:
        if names and item.name not in names:
            continue
        if missing := missing_runs(profile, item):
            if names:
                raise UserError(
                    f"{item.name} needs {', '.join(missing)}; make them: {MAKE} PROFILE={profile.name}"
                )
            print(f"{item.name}: left out, not there yet: {', '.join(missing)}", file=sys.stderr)
            continue
        done[item.name] = write(profile, item, folder)
    return done


def missing_runs(profile: Profile, item: Item) -> list[str]:
    """Prism runs without which the item cannot be shown."""
    missing = []
    for row in item.rows:
        if row.label in item.needed or row.experiment is None:
            there = paths.RUNS / profile.name / "prism"
            names = row.entry().names(profile)
            missing += [name for name in names if not (there / name / "result.json").is_file()]
    return missing


def write(profile: Profile, item: Item, folder: Path) -> dict[str, Any]:
    """Write one item; returns what its JSON holds."""
    results = load(profile, [row.entry() for row in item.rows], needed=item.needed)
    shown = [row for row in item.rows if row.label in results.measured]
    trainings = {row.label: training_records(profile, row) for row in shown}
    curves = {row.label: found for row in shown if (found := read_curves(profile, row))}
    rewards = {label: found[0].rewards for label, found in curves.items()}
    findings = claims.test_all(item.claims, results, pairs_of(item, results), rewards)
    tables = [scores_table(item, results, trainings), gaps_table(item, results)]
    if item.figure == "curves":
        tables.append(curve_table(curves))
    images = draw(item, results, trainings, curves, folder)
    paper = (
        paper_table(item.paper[0], f"The paper's {item.title}, accuracy (%)", (item.paper[1],))
        if item.paper
        else None
    )
    facts = {
        "profile": profile.name, "claims": [finding.as_json() for finding in findings],
        "summary": told(item.brief, results), "training_seeds": training_seeds(trainings),
    }  # fmt: skip
    content = {
        "facts": facts,
        "tables": [table.as_json() for table in [*tables, *([paper] if paper else [])]],
        "runs": provenance(results, trainings),
    }
    write_atomic(folder / f"{item.name}.json", json_text(content))
    write_atomic(folder / f"{item.name}.csv", report3.long_csv(tables))
    page = markdown(item, results, trainings, tables, findings, paper, images)
    write_atomic(folder / f"{item.name}.md", page)
    return content


def training_records(profile: Profile, row: Row) -> list[tuple[str, Mapping[str, Any]]]:
    """(record_path, record) of the trainings behind a row; none for the base model."""
    if row.experiment is None:
        return []
    runs = [run_name(row.experiment, seed) for seed in seeds_of(profile, row.experiment)]
    folders = [paths.RUNS / profile.name / "rl" / run for run in runs]
    return [(record_path(folder / "result.json"), load_result(folder)) for folder in folders]


def read_curves(profile: Profile, row: Row) -> list[figures.Curve]:
    """The curves of a row's trainings."""
    found = []
    records = training_records(profile, row)
    for number, (file, _) in enumerate(records, 1):
        folder = paths.RUNS / profile.name / "rl" / Path(file).parent.name
        label = row.label if len(records) == 1 else f"{row.label}, training {number}"
        found.append(figures.read_curve(folder, label))
        note_access(folder / "curve.jsonl")
    return found


def scores_table(item: Item, results: Results, trainings: Mapping[str, Sequence]) -> Table:
    """Accuracy with interval as in Table 3, and what each row was trained on."""
    table = table3.scores_table(results, bounds=False)
    rows = []
    for label, cells in table.rows:
        records = trainings[label]
        images = [record["n"] for _, record in records]
        steps = [record["values"]["steps"] for _, record in records]
        sources = [tuple(Source(file, key) for file, _ in records) for key in ("n", "values/steps")]
        more = [
            Cell(
                numbers.count(images[0]) if images else numbers.MISSING,
                images[0] if images else None,
                None,
                sources[0],
            ),
            Cell(
                numbers.count(steps[0]) if steps else numbers.MISSING,
                steps[0] if steps else None,
                None,
                sources[1],
            ),
            Cell(str(len(records)) if records else numbers.MISSING, len(records) or None, None, sources[1]),
        ]
        rows.append((label, [*cells, *more]))
    heads = [*table.columns, "Training images", "Steps", "Trainings"]
    return Table(
        item.name, f"{item.title}: accuracy (%) with 95 % interval", "Trained with", heads, rows, item.notes
    )


def pairs_of(item: Item, results: Results) -> list[tuple[str, str]]:
    """Those of an item's comparisons whose rows were measured."""
    return [pair for pair in item.pairs if all(label in results.measured for label in pair)]


def gaps_table(item: Item, results: Results) -> Table:
    """Paired differences in points with interval; Holm's p over the item's tests."""
    pairs = pairs_of(item, results)
    adjusted = claims.corrected(results, pairs, item.claims)
    rows = []
    for ours, theirs in pairs:
        cells = []
        for name in (*results.benchmarks, AVERAGE):
            gap = results.difference(ours, theirs, name)
            keys = (AVERAGE,) if name == AVERAGE else ("benchmarks", name, "mean")
            sources = results.measured[ours].sources(*keys) + results.measured[theirs].sources(*keys)
            text = f"{numbers.difference(gap.value)} {numbers.interval((gap.low, gap.high), signed=True)}"
            if name == AVERAGE:
                text += f", {numbers.p_value(claims.p_of(adjusted, ours, theirs))}"
            cells.append(Cell(text, gap.value, (gap.low, gap.high), sources))
        rows.append((f"{ours} − {theirs}", cells))
    heads = [*(get_benchmark(name).name for name in results.benchmarks), "Average"]
    more = " and the statements' tests on groups of benchmarks" if len(adjusted) > len(pairs) else ""
    notes = [
        f"Paired by image. p-values of the average are corrected after Holm over this table's rows{more}; how much "
        "trainings with another seed differ is not in the intervals where a row has one training."
    ]
    return Table(
        f"{item.name}_gaps",
        "Difference in percentage points with 95 % interval",
        "Comparison",
        heads,
        rows,
        notes,
    )


def curve_table(curves: Mapping[str, Sequence[figures.Curve]]) -> Table:
    """Reward and caption length at either end of each training."""
    rows = []
    for found in curves.values():
        for curve in found:
            values = []
            for column in (curve.rewards, curve.lengths):
                width = min(claims.WINDOW_STEPS, len(column))
                values += [sum(column[:width]) / width, sum(column[-width:]) / width]
            texts = [*numbers.numbers(values[:2], decimals=3), *numbers.numbers(values[2:])]
            keys = ("reward", "reward", "completion_tokens", "completion_tokens")
            cells = [
                Cell(text, value, None, (Source(curve.file, key),))
                for text, value, key in zip(texts, values, keys, strict=True)
            ]
            rows.append((curve.label, cells))
    heads = ["Reward, first steps", "last steps", "Caption tokens, first steps", "last steps"]
    notes = [f"Means over {claims.WINDOW_STEPS} steps. Rewards of different judges are on different scales."]
    return Table("figure1c_curves", "The trainings", "Reward", heads, rows, notes)


def draw(
    item: Item,
    results: Results,
    trainings: Mapping[str, Sequence],
    curves: Mapping[str, Sequence[figures.Curve]],
    folder: Path,
) -> list[str]:
    """Draw the item's figure; returns the names of its SVG files."""
    stem, profile = folder / item.name, results.profile
    if item.figure == "curves":
        everything = [curve for found in curves.values() for curve in found]
        limit = opening.main_training(profile).max_completion_tokens
        figures.plot_curves(everything, stem, limit, opening.trained(profile))
    elif item.figure == "dots":
        groups = [*(get_benchmark(n).name for n in results.benchmarks), "Average"]
        figures.plot_dots(report3.dots(results), groups, stem, opening.counted(results))
    elif item.figure == "growth":
        plot_growth(growth(results, trainings), stem, opening.counted(results))
    return [f"{item.name}.svg"] if item.figure else []


def growth(
    results: Results, trainings: Mapping[str, Sequence]
) -> dict[str, list[tuple[int, float, float, float]]]:
    """Line -> (training images, accuracy, low, high); the base model stands at 0 images."""
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    groups = {"average": (), "documents and charts": DOCUMENTS, "natural images": NATURAL}
    for label, found in results.measured.items():
        images = trainings[label][0][1]["n"] if trainings[label] else 0
        for name, benchmarks in groups.items():
            if benchmarks and not any(b in results.parts for b in benchmarks):
                continue
            part = claims.part_of(results, benchmarks).interval(found.entry.label)
            lines.setdefault(name, []).append((images, part.value, part.low, part.high))
    return {name: sorted(points) for name, points in lines.items()}


def training_seeds(trainings: Mapping[str, Sequence]) -> dict[str, list[int]]:
    """Row -> seeds of its trainings."""
    return {label: [seed for _, r in records for seed in r["seeds"]] for label, records in trainings.items()}


def provenance(results: Results, trainings: Mapping[str, Sequence]) -> list[dict[str, Any]]:
    """The runs behind an item: record, key, commit, seeds, models' hashes."""
    kept = ("key", "commit", "dirty", "seeds", "hashes")
    records = {file: r for m in results.measured.values() for file, r in zip(m.files, m.records, strict=True)}
    records |= {file: record for found in trainings.values() for file, record in found}
    return [
        {"file": file, **{key: record.get(key) for key in kept}} for file, record in sorted(records.items())
    ]


def markdown(
    item: Item,
    results: Results,
    trainings: Mapping[str, Sequence],
    tables: Sequence[Table],
    findings: Sequence[claims.Finding],
    paper: Table | None,
    images: Sequence[str],
) -> str:
    """The report as Markdown."""
    profile = results.profile
    parts = [
        f"# {item.title}, profile {profile.name}",
        *([f"> {report3.SMOKE_WARNING}"] if profile.name == "smoke" else []),
        opening.ablation(item, results, trainings),
        *(table.markdown() for table in tables),
        *(f"![{item.title}]({name})" for name in images),
        *([opening.caption_limits(profile)] if item.figure == "curves" else []),
    ]
    if findings:
        whose = "The paper's statements" if not item.name.startswith("extra") else "Our questions"
        lines = [finding.line(pairs_of(item, results)) for finding in findings]
        parts += [f"## {whose}, as our data have them", "\n".join(lines)]
        if any(finding.claim.kind == "no gain" for finding in findings):
            parts.append(f"No gain: less than {claims.MARGIN:.0%} of the questions, over the whole interval.")
    if paper is not None:
        parts += [
            "## The paper's values",
            "Other models, other benchmarks, other size: for orientation, never mixed with ours.",
            paper.markdown(),
        ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def experiments_of(names: Sequence[str]) -> list[str]:
    """The experiments behind the items named, each once."""
    rows = [row for item in ITEMS if item.name in names for row in item.rows]
    return list(dict.fromkeys(row.experiment for row in rows if row.experiment is not None))


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m caprl_utils.reports.ablations", description="Write Tables 4 to 6, Figures 1c and 5."
    )
    parser.add_argument("names", nargs="*", help=f"items (default: all there are): {', '.join(BY_NAME)}")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--train", action="store_true", help="first make the trainings that the items need")
    arguments = parser.parse_args(argv)
    profile = load_profile(arguments.profile)
    if arguments.train:
        prepare_process(profile)
        run_all(arguments.profile, experiments_of(arguments.names))
    written = write_all(profile, arguments.names)
    for name in written:
        print(paths.shown(report3.report_folder(profile) / f"{name}.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
