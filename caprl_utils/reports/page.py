"""What gathers the reports of a profile: claims.md, the page of examples, report.html (figures inside), and the map in
README.md.

Written from the Markdown and JSON reports that are there; the same reports give the same bytes.
"""

from __future__ import annotations

import base64
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

from caprl_utils import notebook, paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.files import note_access, write_atomic, write_json
from caprl_utils.models.base import open_backend
from caprl_utils.prism import probes
from caprl_utils.prism.evaluate import evaluate, trained_captioners
from caprl_utils.prism.gallery import save_png
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.scores import read_samples
from caprl_utils.prism.sources import Source, image_ids, images_of, joined_captions
from caprl_utils.prism.told import counts, false, sentences
from caprl_utils.reports import cards, claims, figures, numbers, tables
from caprl_utils.reports.claims import write_claims
from caprl_utils.reports.items import FOLLOW_UPS, NOTEBOOKS, Item, chosen, items
from caprl_utils.reports.numbers import Cell, Table, record_path
from caprl_utils.reports.paper import PRINTED_AVERAGE, printed_row
from caprl_utils.reports.trace import Records, sources_of
from caprl_utils.rl import judge_trial
from caprl_utils.rl.experiments import BASE_RUN, MAIN, prism_name, run_all
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

JOINED = f"{BASE_RUN}-joined"  # the run of captions of the base joined to the length of the trained captioner's
OUTSIDE = "extra_outside"  # the item that needs a reader which none of ours trained
PUBLISHED = "mini"  # the profile whose items README's map lists
APART = ("deviations", "lab-log", "bench/bench")  # reports with a page of their own
BREAK = "<hr />"  # what follows it in a chapter stands after all tables
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
NUMBER = re.compile(
    r"(?<!Table )(?<!Tables )(?<!Tables \d and )(?<!Figure )(?<![\w./:-])([+-]?\d+(?:,\d{3})*(?:\.\d+)?)"
    r"(?![\w/-]|[.:]\w| % interval)"
)
"""In running text; not part of a name, of a word, or what every interval is."""
VALUE_AND_INTERVAL = re.compile(r"^([^\[]+?) (\[[^\]]*\])(?:,? (.*))?$")
START, END = "<!-- map:start -->", "<!-- map:end -->"
MAPPED = ("paper", "one_gpu", "mini")  # the largest profile that has a result is shown; smoke never is
EXAMPLES = "examples"
NUM_PICTURES, NUM_FIRST = 12, 3
WRITERS = ("base", "CapRL", "strong captioner")  # rows of Table 3 whose captions stand there
_MARKS = {None: "{}", "true": "{} ✓", "repeat": "~~{}~~"}  # kind of a sentence -> how it stands; all others are false


def train(profile: Profile, names: Sequence[str]) -> list[str]:
    """Make the trainings of notebook 03 behind items (without names: all), test the verifier where it is asked, and let
    the reward's reader and one from outside read what further rows need; returns the items, without the latter's own
    where there is no such reader. Raises UserError where there is no training.
    """
    wanted = chosen(profile, names)
    experiments = [name for item in wanted for name in item.experiments]
    if names and not experiments:
        what = f"no training of notebook 03 stands behind {', '.join(names)}"
        raise UserError(f"{what}; make it: make {names[0]}")
    notebook.prepare_process(profile)
    run_all(profile.name, experiments, [name for item in wanted for name in item.read_twice])
    if FOLLOW_UPS in names:
        judge_trial.verify(profile, load_samples(profile))
    runs = [Path(run).name for item in wanted for row in item.rows for run in row.runs]
    joined = _joined(profile) if any(run.startswith(f"{JOINED}-by-") for run in runs) else None
    if joined and prism_name(JOINED, "reward_reader") in runs:
        reader = open_backend(profile.models.reward_reader, profile)
        evaluate(profile, prism_name(JOINED, "reward_reader"), joined, reader, load_samples(profile))
    if OUTSIDE not in names:
        return list(names)
    ending = f"-by-{probes.OUTSIDE}"
    kept = [run.removesuffix(ending) for run in runs if run.endswith(ending) and not run.startswith(JOINED)]
    if probes.read_outside(profile, kept, {JOINED: joined} if joined else {}):
        return list(names)
    print(probes.HOW_TO_GET)
    return [name for name in names if name != OUTSIDE]


def _joined(profile: Profile) -> Source | None:
    """Notebook 04's control for length, which is drawn already, where base and trained captioner were evaluated."""
    longer, home = list(trained_captioners(profile, [MAIN])), paths.RUNS / profile.name / "prism"
    if not longer or not all((home / run / "result.json").is_file() for run in (BASE_RUN, *longer)):
        return None
    source = joined_captions(profile, open_backend(profile.models.policy, profile), BASE_RUN, longer)
    # of all images, as notebook 04 asks for them: captions of some only would take the place of these
    found = cache(lambda: source.captions(images_of(load_samples(profile))))
    return replace(source, captions=lambda images: found())


def write_all(profile: Profile, names: Sequence[str] = ()) -> list[Path]:
    """Write the items named, or all whose runs are there; then claims, the HTML page and cards of what is there."""
    names = [*tables.write_all(profile, names), "claims"]
    write_claims(profile)
    written = [paths.reports_of(profile.name) / f"{name}.md" for name in names]
    if "table3" in names and (page := write_examples(profile)):
        written.append(page)
    return [*written, write_html(profile), *cards.write_all(profile)]


def write_examples(profile: Profile) -> Path | None:
    """Write the page of examples with its pictures: what captioners of Table 3 wrote about the first pictures of each
    benchmark in turn, the first caption of each, every statement checked; none is chosen for what it says. The first
    picture is a figure too, with what is answered from its captions. None where runs are missing or facts not known.
    """
    runs = {row.label: paths.RUNS / profile.name / row.runs[0] for row in items(profile)["table3"].rows}
    captions: dict[str, dict[str, list[dict[str, Any]]]] = {}  # captioner -> image -> rows, a question each
    for label in (label for label in WRITERS if (runs[label] / "result.json").is_file()):
        captions[label] = {}
        for row in read_samples(runs[label]):
            if row["caption_index"] == 0 and row["facts"] is not None:
                captions[label].setdefault(row["image_id"], []).append(row)
    if not captions or not all(captions.values()):
        return None
    captioned, by_benchmark = set.intersection(*map(set, captions.values())), {}
    for sample in load_samples(profile):
        if (image_id := image_ids(sample)[0]) in captioned:
            by_benchmark.setdefault(sample.benchmark, {}).setdefault(image_id, sample)
    turns = zip_longest(*(found.values() for found in by_benchmark.values()))
    samples = list(islice((one for turn in turns for one in turn if one), NUM_PICTURES))
    folder, rows = paths.reports_of(profile.name), []
    of_first = {label: captions[label][image_ids(samples[0])[0]] for label in WRITERS[:2]}
    figures.plot_example(samples[0], of_first, profile, folder / "example")
    for sample in samples:
        image_id = image_ids(sample)[0]
        file = f"{EXAMPLES}/{re.sub(r'[^A-Za-z0-9-]+', '-', image_id)}.png"
        save_png(sample.images[0](), folder / file)
        told = [Cell(marked(found[image_id][0]["caption"], sample.meta)) for found in captions.values()]
        rows.append((f"![{sample.meta['true_caption']}]({file})", told))
    first, more = (
        Table(EXAMPLES, caption, "Picture", list(captions), part, words=True)
        for caption, part in (("First captions", rows[:NUM_FIRST]), ("More pictures", rows[NUM_FIRST:]))
    )
    page = numbers.fill("examples.md", profile=profile, first=first, more=more, number=len(rows))
    write_atomic(folder / f"{EXAMPLES}.md", page)
    records = {record_path(runs[label] / "result.json"): load_result(runs[label]) for label in captions}
    write_json(folder / f"{EXAMPLES}.json", {"runs": tables.runs_of(records)})
    return folder / f"{EXAMPLES}.md"


def marked(caption: str, meta: Mapping[str, Any]) -> str:
    """A caption in Markdown behind a summary: ✓ true, bold ✗ false, struck through what was said before."""
    found = counts(caption, meta)
    plain = [(re.sub(r"([\\`*_~\[\]<>])", r"\\\1", text), kind) for text, kind in sentences(caption, meta)]
    told = " ".join(_MARKS.get(kind, "**{} ✗**").format(text) for text, kind in plain)
    return f"*{found['told']} of {found['facts']} facts, {false(found)} false.* {told}"


def publish(profile: Profile) -> list[Path]:
    """Copy a profile's reports and executed notebooks into reports/, and its results into README's map; returns what
    was written. Raises UserError for profile smoke, whose numbers mean nothing, and where there is no report.
    """
    made, target = paths.reports_of(profile.name), paths.REPORTS / profile.name
    if profile.name == "smoke" or not paths.IN_CHECKOUT:
        raise UserError("only a checkout has reports to publish, and profile smoke none that mean anything")
    if not (made / "report.html").is_file():
        raise UserError(f"no report in {paths.shown(made)}; run `make reproduce PROFILE={profile.name}`")
    pages = notebook.publish(profile)
    shutil.copytree(made, target, dirs_exist_ok=True)
    update_readme(paths.ROOT / "README.md")
    return [*sorted(target.iterdir()), *pages, paths.ROOT / "README.md"]


def write_html(profile: Profile) -> Path:
    """Write report.html, and a page for each of `APART`, into the report folder; returns it. Every number of its tables
    leads to its runs at the page's end. Raises UserError without any report, or a figure.
    """
    folder, known, records = paths.reports_of(profile.name), items(profile), Records()
    there = [name for name in ("claims", EXAMPLES, *known) if (folder / f"{name}.md").is_file()]
    if not there:
        raise UserError(f"no report in {paths.shown(folder)}; run `make reproduce PROFILE={profile.name}`")
    first, rest = [], []
    for name in there:
        title, body = chapter(folder / f"{name}.md", records)
        body, *more = body.split(BREAK)
        first.append((name, title, body))
        for heading, rest_of in (part.split("</h3>", 1) for part in more):
            rest.append((f"{name}-more", heading.rsplit(">", 1)[1], Markup(rest_of)))
    apart = {file.stem: chapter(file) for file in (paths.REPORTS / f"{name}.md" for name in APART) if file.is_file()}
    missing = [item.title for name, item in known.items() if not item.ours and name not in there]
    told = {"profile": profile, "warning": claims.SMOKE_WARNING if profile.name == "smoke" else None, "apart": apart}
    for name, (title, body) in apart.items():
        page = numbers.fill("report.html", sections=[(name, title, body)], records=None, **told)
        write_atomic(folder / f"{name}.html", page)
    page = numbers.fill("report.html", sections=[*first, *rest], records=records, missing=missing, **told)
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def chapter(file: Path, records: Records | None = None) -> tuple[str, Markup]:
    """(title, HTML without it) of a Markdown report, its figures inside; tables as its JSON has them, if there is one.
    records: takes the runs behind their cells, which then lead there.
    """
    note_access(file)
    tokens, title = MARKDOWN.parse(file.read_text(encoding="utf-8")), ""
    if tokens and tokens[0].type == "heading_open" and tokens[0].tag == "h1":
        title, tokens = tokens[1].content, tokens[3:]
    content = numbers.read(file.with_suffix(".json"))
    runs, tables = (content.get(key, []) if isinstance(content, dict) else [] for key in ("runs", "tables"))
    by_caption = {f"**{table['caption']}**": table for table in tables}
    shown, known, every = _shown(tables), {run["file"]: run for run in runs}, [{"file": run["file"]} for run in runs]
    for place, token in enumerate(tokens):
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
        if token.type == "heading_open":
            slug = re.sub(r"[^a-z0-9]+", "-", tokens[place + 1].content.lower()).strip("-")
            token.attrSet("id", f"{file.stem}-{slug}")
        elif token.type == "table_open" and (table := by_caption.get(tokens[place - 2].content)):
            ends = next(n for n in range(place, len(tokens)) if tokens[n].type == "table_close")
            html = _table(table, known, records)
            tokens[place : ends + 1] = [Token("html_block", "", 0, content=html)]
        elif token.type == "inline":
            _complete(token, file.parent)
            if records and runs and tokens[place - 1].type != "heading_open":
                token.children = _linked(token, lambda text: records.anchor(shown.get(text, every), known))
    html = MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})
    html = re.sub("<table>.*?</table>", r'<div class="wide">\g<0></div>', html, flags=re.DOTALL)
    return re.sub(r",? \(?profile \w+\)?", "", title), Markup(html)


def _shown(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, str]]]:
    """Every number with decimals that a table prints -> the sources of the cells where it stands."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in (row for table in tables for row in table["rows"]):
        for cell, sources in zip(row["cells"], sources_of(row), strict=True):
            for text in NUMBER.findall(cell["text"]) if sources else ():
                found.setdefault(text, []).extend(sources)
    return {text: sources for text, sources in found.items() if "." in text}


def _linked(token: Token, anchor: Callable[[str], str]) -> list[Token]:
    """Running text whose numbers lead to their records: the runs of the cells that show it, else all of the report."""
    children, inside = [], False
    for child in token.children or []:
        inside = child.type == "link_open" or (inside and child.type != "link_close")
        if child.type != "text" or inside:
            children.append(child)
            continue
        for place, text in enumerate(NUMBER.split(child.content)):
            link = f'<a class="number" href="#{anchor(text)}">{text}</a>' if place % 2 else ""
            children.append(Token("html_inline" if link else "text", "", 0, content=link or text))
    return children


def _table(table: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], records: Records | None) -> str:
    """A report's table as HTML; its cells lead to their records if these are kept. known: the report's runs."""
    rows = []
    for row in table["rows"]:
        cells = []
        for cell, sources in zip(row["cells"], sources_of(row), strict=True):
            keys = dict.fromkeys(source["key"] for source in sources if source["key"])
            anchor = records.anchor(sources, known) if records and cell["text"] != numbers.MISSING else ""
            cells.append((_inline(cell["text"]), anchor, ", ".join(keys)))
        rows.append((_inline(row["label"]), cells))
    return numbers.fill("table.html", table=table, rows=rows)


def _inline(text: str) -> Markup:
    """A cell's Markdown as HTML: a number's interval and p on lines below it, verdicts in their colour."""
    if found := VALUE_AND_INTERVAL.match(text):
        return Markup(escape(found[1])) + Markup("").join(
            Markup("<small>{}</small>").format(t) for t in found.groups()[1:] if t
        )
    (token,) = MARKDOWN.parseInline(text)
    _complete(token, Path())
    return Markup(MARKDOWN.renderer.render([token], MARKDOWN.options, {}))


def _complete(token: Token, base: Path) -> None:
    """Figures come inside (or UserError), links to reports lead to their chapter or page, verdicts get a colour."""
    for child in token.children or []:
        if child.type == "image":
            file = base / str(child.attrGet("src"))
            if not file.is_file():
                raise UserError(f"the figure {paths.shown(file)} is missing; make its report again")
            kind, held = {".svg": "svg+xml", ".png": "png"}[file.suffix], base64.b64encode(file.read_bytes()).decode()
            child.attrSet("src", f"data:image/{kind};base64,{held}")
        elif child.type == "link_open":
            target = str(child.attrGet("href"))
            if not target.startswith(("http:", "https:", "#")):
                file, _, part = target.partition("#")
                child.attrSet("href", f"#{Path(file).stem}{part and '-'}{part}")
    for opening, text in pairwise(token.children or []):
        if opening.type == "strong_open" and text.content in claims.VERDICTS:
            opening.attrSet("class", f"verdict {text.content.replace(' ', '-')}")


def readme_map() -> str:
    """Paper item, notebook, target, the paper's values and difference, ours at a profile, verdicts on what the paper
    states; then how many facts have which verdict. From reports/ alone.
    """
    heads = ["Paper item", "Notebook", "Target", "Paper", "Ours", "Verdicts"]
    rows = [heads, [":---"] * len(heads)]
    for item in (item for item in items(load_profile(PUBLISHED)).values() if not item.ours):
        files = {profile: paths.REPORTS / profile / f"{item.name}.json" for profile in MAPPED}
        profile = next((profile for profile, file in files.items() if file.is_file()), None)
        ours = ["not yet", ""]
        if profile:
            facts = numbers.read(files[profile])["facts"]
            found = Counter(claim["verdict"] for claim in facts["claims"])
            told = f"{profile}: [{facts['summary']}](reports/{profile}/{item.name}.md)"
            ours = [told, ", ".join(f"{number} {word}" for word, number in found.items())]
        rows.append([item.title, f"`{NOTEBOOKS[item.kind]}`", f"`make {item.target}`", _printed(item), *ours])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if content := numbers.read(paths.REPORTS / PUBLISHED / "claims.json"):
        facts = content["facts"]
        told = ", ".join(f"{number} {word}" for word, number in facts["counts"].items() if number)
        firm = [f"{facts['counts'][word] - len(ids)} of those {word}" for word, ids in facts["large_p"].items()]
        counted = f"{facts['statements']} statements of the paper are {sum(facts['counts'].values())} facts"
        corrected = f"{' and '.join(firm)} stand after correction for {facts['tests']} tests"
        lines += ["", f"{counted}: {told}; {corrected} ([claims](reports/{PUBLISHED}/claims.md))."]
    return "\n".join(lines)


def _printed(item: Item) -> str:
    """The averages of the paper that stand beside our summary: "39.9 to 48.3"."""
    if item.name.startswith("figure"):
        return "curves"
    ladders = [item.ladder] if item.ladder else [(theirs, ours) for ours, theirs in item.told_pairs.values()]
    told = [[printed_row(item, label)[PRINTED_AVERAGE] for label in ladder] for ladder in ladders]
    return "; ".join(
        f"{(' to ' if len(row) == 2 else ', ').join(f'{value:.1f}' for value in row)} ({row[-1] - row[0]:+.1f})"
        for row in told
    )


def update_readme(readme: Path) -> None:
    """Put the map between its marks. Raises UserError where these are not there once each, in order."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UserError(f"{paths.shown(readme)} needs the lines {START} and {END}, once each, in this order")
    before, after = text.split(START)[0], text.split(END)[1]
    write_atomic(readme, f"{before}{START}\n{readme_map()}\n{END}{after}")
