"""What Tables 1 and 2 and Figure 4 share: VLMs after pretraining, measured by direct VQA.

Rows are final trainings of caprl_utils.pretraining; scores, intervals and paired differences are computed as for
Prism (results.py), so that a difference between two tables is never one of arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import command_line
from caprl_utils.files import write_atomic
from caprl_utils.pretraining.rows import MINI_WORLD
from caprl_utils.pretraining.sets import VANILLA, CaptionSet, chain, final_name, seeds_of
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.statistics import AVERAGE, holm
from caprl_utils.reports import caption_sets, claims, numbers, opening, report3
from caprl_utils.reports.commands import profile_of
from caprl_utils.reports.paper import paper_table
from caprl_utils.reports.results import Entry, Measured, Results, load
from caprl_utils.reports.summary import Brief, told
from caprl_utils.reports.tables import Cell, Source, Table, json_text, record_path
from caprl_utils.runs import load_result
from caprl_utils.schema import Pretraining, Profile

MAKER = "04_llamafactory_pretraining"
BASELINES = (
    "Who wrote the baselines' captions: ShareGPT4V's part is played by {policy}, short and noisy; DenseFusion's by "
    "{captioner_7b}, dense but erring; CapRL's are those of the RL-trained {policy}. All three describe images of the "
    "same kind."
)
FILES = "The caption sets are files of the user ({files})."
ROWS = "Vanilla goes without further pretraining. All rows of a setting share one alignment, for each training seed."
_WORDS = {1: "One training", 2: "Two trainings", 3: "Three trainings"}
SETS = (
    "The sets bear the names of the paper's (CapRL-1M: a million pairs of image and caption; CapRL-5M: five million); "
    "how many pairs ours have stands under Caption pairs."
)


@dataclass(frozen=True)
class Row:
    """One row: a setting with a caption set (None: Vanilla)."""

    setting: str
    captions: CaptionSet | None
    prefix: str = ""  # of the label, where a table has several settings

    @property
    def label(self) -> str:
        """As printed."""
        name = VANILLA if self.captions is None else self.captions.name
        share = "" if self.captions is None or self.captions.share == 1 else f" x {self.captions.share:g}"
        return f"{self.prefix}{name}{share}"

    def entry(self, settings: Pretraining) -> Entry:
        """Where its evaluations stand, one for each training seed."""
        seeds = seeds_of(settings, self.setting)
        first, *more = (final_name(self.setting, self.captions, seed) for seed in seeds)
        return Entry(self.label, first, more=tuple(more))


@dataclass(frozen=True)
class Item:
    """One table or figure: its rows, which of them are compared, and what the paper states about them."""

    name: str
    title: str
    rows: Sequence[Row]
    pairs: Sequence[tuple[str, str]]
    brief: Brief  # its line in the README's map
    claims: Sequence[claims.Claim]
    paper: tuple[str, tuple[str, ...]] | None = None
    notes: Sequence[str] = ()


def write(
    profile: Profile,
    item: Item,
    folder: Path | None = None,
    draw: Callable[[Results, Mapping[str, int], Path], list[str]] | None = None,
) -> dict[str, Any]:
    """Write <name>.md, .csv, .json and its figure from finished runs; returns what the JSON holds.

    draw: (results, label -> caption pairs, stem) -> names of SVG files. Raises UserError naming what is missing.
    """
    folder = report3.report_folder(profile) if folder is None else folder
    report3.refuse_smoke(profile, folder)
    entries = [row.entry(profile.pretraining) for row in item.rows]
    labels = [entry.label for entry in entries]
    results = load(profile, entries, needed=labels, stage="vqa", maker=MAKER)
    trainings = {row.label: _trainings(profile, row) for row in item.rows}
    findings = claims.test_all(item.claims, results, item.pairs)
    tables = [scores_table(item, results, trainings), gaps_table(item, results)]
    sets = {row.captions.name: trainings[row.label]["captions"] for row in item.rows if row.captions}
    if (captions := caption_sets.table(item.name, sets)) is not None:
        tables.append(captions)
    pairs = {label: found[0][1]["n"] if (found := trainings[label]["further"]) else 0 for label in labels}
    images = draw(results, pairs, folder / item.name) if draw else []
    paper = (
        paper_table(item.paper[0], f"The paper's {item.title}, accuracy (%)", item.paper[1])
        if item.paper
        else None
    )
    content = {
        "facts": {
            "profile": profile.name,
            "claims": [found.as_json() for found in findings],
            "summary": told(item.brief, results),
        },
        "tables": [table.as_json() for table in [*tables, *([paper] if paper else [])]],
        "runs": _provenance(results, trainings),
    }  # fmt: skip
    write_atomic(folder / f"{item.name}.json", json_text(content))
    write_atomic(folder / f"{item.name}.csv", report3.long_csv(tables))
    write_atomic(
        folder / f"{item.name}.md", _markdown(item, profile, results, tables, findings, paper, images)
    )
    return content


def scores_table(item: Item, results: Results, trainings: Mapping[str, Mapping[str, Any]]) -> Table:
    """Accuracy with interval per benchmark, and the caption pairs that each row was pretrained on."""
    labels = list(results.measured)
    columns = [[_score(results, label, name) for label in labels] for name in (*results.benchmarks, AVERAGE)]
    texts = [numbers.percents([cell.value for cell in column]) for column in columns]
    rows = []
    for place, label in enumerate(labels):
        cells = [
            Cell(f"{t[place]} {numbers.interval(c[place].interval)}", c[place].value, c[place].interval,
                 c[place].sources)
            for c, t in zip(columns, texts, strict=True)
        ]  # fmt: skip
        many = len(results.measured[label].names)
        rows.append((label, [*cells, Cell(str(many), many), _pairs_cell(trainings[label]["further"])]))
    names = (get_benchmark(name).name for name in results.benchmarks)
    heads = [*names, "Average", "Trainings", "Caption pairs"]
    return Table(
        item.name, f"{item.title}: accuracy (%) with 95 % interval", "Pretrained on", heads, rows,
        (SETS, *item.notes),
    )  # fmt: skip


def gaps_table(item: Item, results: Results) -> Table:
    """Paired differences in points; Holm's p over the item's differences of the average."""
    gaps = {pair: results.difference(*pair, AVERAGE) for pair in item.pairs}
    adjusted = holm({pair: gap.p_value for pair, gap in gaps.items()})
    rows = []
    for ours, theirs in item.pairs:
        cells = []
        for name in (*results.benchmarks, AVERAGE):
            gap = results.difference(ours, theirs, name)
            text = f"{numbers.difference(gap.value)} {numbers.interval((gap.low, gap.high), signed=True)}"
            text += f", {numbers.p_value(adjusted[ours, theirs])}" if name == AVERAGE else ""
            sources = tuple(s for side in (ours, theirs) for s in _sources(results.measured[side], name))
            cells.append(Cell(text, gap.value, (gap.low, gap.high), sources))
        rows.append((f"{ours} − {theirs}", cells))
    heads = [*(get_benchmark(name).name for name in results.benchmarks), "Average"]
    notes = ["Paired by image. p-values of the average are corrected after Holm over this table's rows. "
             f"{_trainings_note(item, results)}"]  # fmt: skip
    caption = "Difference in percentage points with 95 % interval"
    return Table(f"{item.name}_gaps", caption, "Comparison", heads, rows, notes)


def _trainings_note(item: Item, results: Results) -> str:
    """How many trainings stand behind the rows, and what that means for the intervals."""
    counts = {row.setting: len(results.measured[row.label].names) for row in item.rows}
    told = {
        many: _WORDS.get(many, f"{many} trainings") for many in sorted(set(counts.values()), reverse=True)
    }
    settings = {many: ", ".join(name for name, n in counts.items() if n == many) for many in told}
    if len(told) == 1:
        text = f"{next(iter(told.values()))} a row"
    else:
        first, *rest = (f"{words} a row in setting {settings[many]}" for many, words in told.items())
        text = ", ".join([first, *(part[0].lower() + part[1:] for part in rest)])
    averaged = " Scores of several are averaged question by question." if max(counts.values()) > 1 else ""
    return f"{text}: how much trainings with another seed differ is not in the intervals.{averaged}"


def _score(results: Results, label: str, benchmark: str) -> Cell:
    found = results.interval(label, benchmark)
    return Cell("", found.value, (found.low, found.high), _sources(results.measured[label], benchmark))


def _sources(found: Measured, benchmark: str) -> tuple[Source, ...]:
    return found.sources(*((AVERAGE,) if benchmark == AVERAGE else ("benchmarks", benchmark, "mean")))


def _pairs_cell(further: caption_sets.Records) -> Cell:
    if not further:
        return Cell("0", 0)
    many = further[0][1]["n"]  # all seeds train on the same rows
    return Cell(numbers.count(many), many, None, tuple(Source(file, "n") for file, _ in further))


def _trainings(profile: Profile, row: Row) -> dict[str, caption_sets.Records]:
    """Stage -> (record_path, record) of the trainings behind a row, one for each seed; none where a row goes without.

    "captions": of the run that made its caption set, where our models wrote it.
    """
    found: dict[str, list] = {"further": [], "sft": []}
    for seed in seeds_of(profile.pretraining, row.setting):
        for training in chain(row.setting, row.captions, seed):
            if training.stage in found:
                folder = paths.RUNS / profile.name / "pretraining" / training.name
                found[training.stage].append((record_path(folder / "result.json"), load_result(folder)))
    return {**found, "captions": caption_sets.record_of(profile, row.captions)}


def _who_captioned(profile: Profile) -> str:
    """Who wrote the caption sets: models of ours, or whoever made the files that are read."""
    source = profile.pretraining.further.data
    models = {role: profile.models[role].path for role in ("policy", "captioner_7b")}
    return f"{BASELINES.format(**models) if source == MINI_WORLD else FILES.format(files=source)} {ROWS}"


def _provenance(
    results: Results, trainings: Mapping[str, Mapping[str, caption_sets.Records]]
) -> list[dict[str, Any]]:
    """The runs behind an item: record, key, commit, seeds, hashes."""
    records = {f: r for m in results.measured.values() for f, r in zip(m.files, m.records, strict=True)}
    records |= {f: r for stages in trainings.values() for found in stages.values() for f, r in found}
    kept = ("key", "commit", "dirty", "seeds", "hashes")
    return [{"file": file, **{k: record.get(k) for k in kept}} for file, record in sorted(records.items())]


def _markdown(
    item: Item,
    profile: Profile,
    results: Results,
    tables: Sequence[Table],
    findings: Sequence[claims.Finding],
    paper: Table | None,
    images: Sequence[str],
) -> str:
    parts = [
        f"# {item.title}, profile {profile.name}",
        *([f"> {report3.SMOKE_WARNING}"] if profile.name == "smoke" else []),
        f"Each model looks at the image and answers; {opening.asked(results)}. {_who_captioned(profile)}",
        *(table.markdown() for table in tables),
        *(f"![{item.title}]({name})" for name in images),
    ]
    if findings:
        lines = [finding.line(item.pairs) for finding in findings]
        parts += ["## The paper's statements, as our data have them", "\n".join(lines)]
    if paper is not None:
        parts += [
            "## The paper's values",
            "Other models, other benchmarks, other size: for orientation, never mixed with ours.",
            paper.markdown(),
        ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


@command_line
def main(make: Callable[[Profile], dict[str, Any]], name: str, argv: Sequence[str]) -> int:
    """Command line of an item; returns the exit status."""
    profile = profile_of(argv, name)
    make(profile)
    print(paths.shown(report3.report_folder(profile) / f"{name}.md"))
    return 0
