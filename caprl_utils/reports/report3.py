"""Write Table 3: Markdown, CSV, JSON and its figures, from finished runs.

    python -m caprl_utils.reports.report3 --profile mini

The same results give the same bytes. Provenance (runs, keys, commits) stands in the JSON.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError, command_line
from caprl_utils.files import note_access, write_atomic
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.statistics import AVERAGE
from caprl_utils.reports import captioners, claims, figures, numbers, opening, table3
from caprl_utils.reports.commands import profile_of
from caprl_utils.reports.paper import paper_table
from caprl_utils.reports.results import BASE, CAPRL, Results, load
from caprl_utils.reports.table3_claims import CLAIMS
from caprl_utils.reports.tables import Table, json_text, record_path
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

EXPERIMENT = "caprl"  # the training whose curves stand beside the table
SMOKE_WARNING = "Profile smoke: a handful of steps. These numbers mean nothing and stay out of reports/."


def write(profile: Profile, folder: Path | None = None) -> dict[str, Any]:
    """Write table3.md, .csv, .json and the figures to the profile's report folder; returns what the JSON
    holds.

    Raises UserError when a result is missing, or when smoke numbers would enter reports/.
    """
    folder = report_folder(profile) if folder is None else folder
    refuse_smoke(profile, folder)
    results = load(profile, some_seeds=True)
    curves = training_curves(profile, results.training_seeds)
    findings = claims.test_all(CLAIMS, results, table3.pairs_of(results))
    tables = [
        table3.scores_table(results, bounds=False),
        table3.differences_table(results),
        table3.scores_table(results, bounds=True),
        table3.matched_table(results),
        table3.best_table(results),
        table3.variance_table(results),
    ]
    paper = paper_table("table3_prism.csv", "The paper's Table 3, accuracy (%)", ("caption_model",))
    limit, drawn = opening.main_training(profile).max_completion_tokens, opening.trained(profile)
    figures.plot_curves(curves, folder / "table3_curves", limit, drawn)
    groups = [*map(_name, results.benchmarks), "Average"]
    figures.plot_dots(dots(results), groups, folder / "table3_dots", opening.counted(results))
    facts = table3.facts(results) | {"claims": [finding.as_json() for finding in findings]}
    content = {
        "facts": facts,
        "tables": [table.as_json() for table in [*tables, paper]],
        "runs": provenance(results, profile),
    }
    write_atomic(folder / "table3.json", json_text(content))
    write_atomic(folder / "table3.csv", long_csv(tables))
    write_atomic(folder / "table3.md", markdown(results, facts, tables, paper, curves, findings))
    return content


def report_folder(profile: Profile) -> Path:
    """Where a profile's reports go."""
    return paths.reports_of(profile.name)


def refuse_smoke(profile: Profile, folder: Path) -> None:
    """Raise UserError when smoke numbers would be written into reports/."""
    if profile.name == "smoke" and folder.absolute().is_relative_to(paths.REPORTS):
        raise UserError(
            f"profile smoke does not write to {paths.shown(folder)}: its numbers are no results. "
            "Use PROFILE=mini, or another folder"
        )


def training_curves(
    profile: Profile, seeds: Sequence[int], experiment: str = EXPERIMENT
) -> list[figures.Curve]:
    """Reward and caption length over each training."""
    labels = ["CapRL"] if len(seeds) == 1 else [f"CapRL, seed {seed}" for seed in seeds]
    found = []
    for seed, label in zip(seeds, labels, strict=True):
        folder = paths.RUNS / profile.name / "rl" / f"{experiment}-seed{seed}"
        found.append(figures.read_curve(folder, label))
        note_access(folder / "curve.jsonl")
    return found


def dots(results: Results) -> list[figures.Dots]:
    """One series per captioner, without floors and ceilings."""
    groups = [*results.benchmarks, AVERAGE]
    series = []
    for label, found in results.measured.items():
        if not found.entry.bound:
            cells = [results.interval(label, group) for group in groups]
            series.append(figures.Dots(label, [c.value for c in cells], [(c.low, c.high) for c in cells]))
    return series


def long_csv(tables: Sequence[Table]) -> str:
    """All tables in one long CSV with one head."""
    first, *others = [table.csv() for table in tables]
    return first + "".join(text.split("\n", 1)[1] for text in others)


def provenance(results: Results, profile: Profile) -> list[dict[str, Any]]:
    """The runs behind the table: record, key, commit, seeds, models' hashes."""
    kept = ("key", "commit", "dirty", "seeds", "hashes")
    found = [
        {"file": file, **{key: record.get(key) for key in kept}}
        for measured in results.measured.values()
        for file, record in zip(measured.files, measured.records, strict=True)
    ]
    for seed in results.training_seeds:
        folder = paths.RUNS / profile.name / "rl" / f"{EXPERIMENT}-seed{seed}"
        found.append({"file": record_path(folder / "curve.jsonl"), "seeds": [seed]})
        if (folder / "result.json").is_file():
            record = load_result(folder)
            file = record_path(folder / "result.json")
            found.append({"file": file, **{key: record.get(key) for key in kept}})
    return found


def markdown(
    results: Results,
    facts: dict[str, Any],
    tables: Sequence[Table],
    paper: Table,
    curves: Sequence[figures.Curve],
    findings: Sequence[claims.Finding],
) -> str:
    """The report as Markdown."""
    scores, gaps, bounds, *more = tables
    parts = [
        f"# Table 3, profile {facts['profile']}: caption quality in the Prism framework",
        *([f"> {SMOKE_WARNING}"] if facts["profile"] == "smoke" else []),
        _design(results),
        *([note] if (note := captioners.note(results.profile)) else []),
        scores.markdown(),
        gaps.markdown(),
        *([bounds.markdown()] if bounds.rows else []),
        *(table.markdown() for table in more),
        "![Accuracy per benchmark](table3_dots.svg)",
        "## What the data say",
        _words(results, facts, curves),
        "## The paper's statements, as our data have them",
        "\n".join(finding.line(table3.pairs_of(results)) for finding in findings),
        f"As good: worse by less than {claims.MARGIN:.0%} of the questions, over the whole interval.",
        "## The training run",
        "![Reward and caption length over training](table3_curves.svg)",
        "## The paper's values",
        "Other models, other benchmarks, other size: for orientation, never mixed with ours.",
        paper.markdown(),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _design(results: Results) -> str:
    word = "seed" if len(results.training_seeds) == 1 else "seeds"
    seeds = ", ".join(map(str, results.training_seeds))
    return (
        f"{opening.captioning(results)} CapRL was trained with {word} {seeds}, any other trained row once; how much "
        f"trainings differ is not in the intervals. {opening.groups(results)}"
    )


def _words(results: Results, facts: dict[str, Any], curves: Sequence[figures.Curve]) -> str:
    lines = [
        f"- CapRL above base on the average: {facts['verdict']} ({numbers.difference(facts['gain'])} points, "
        f"95 % interval {numbers.interval(facts['gain_interval'], signed=True)})."
    ]
    gaps = {name: results.difference(CAPRL, BASE, name) for name in results.benchmarks}
    above = [_name(name) for name, gap in gaps.items() if gap.low > 0]
    lines.append(
        f"- Interval above zero on {len(above)} of {len(gaps)} benchmarks: {', '.join(above) or 'none'}."
    )
    tokens = [results.measured[label].mean_of("caption_tokens") for label in (BASE, CAPRL)]
    base, caprl = numbers.numbers(tokens)
    lines.append(f"- Tokens per caption: {base} (base), {caprl} (CapRL).")
    for curve in curves:
        width = min(len(curve.rewards), claims.WINDOW_STEPS)
        ends = [sum(part) / width for part in (curve.rewards[:width], curve.rewards[-width:])]
        first, last = numbers.numbers(ends, decimals=3)
        lines.append(
            f"- {curve.label}: {len(curve.steps)} training steps; mean reward of the first {width} {first}, "
            f"of the last {width} {last}."
        )
    unparsed = sum(sum(counts.values()) for found in facts["unparsed"].values() for counts in found)
    lines.append(f"- Answers that could not be read: {unparsed} in all runs together; they score 0.")
    return "\n".join(lines)


def _name(benchmark: str) -> str:
    return get_benchmark(benchmark).name


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    profile = profile_of(argv, "report3", "Write Table 3.")
    write(profile)
    print(paths.shown(report_folder(profile) / "table3.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
