"""All reports of a profile as one HTML file that needs nothing else: tables, figures, claims, deviations, lab log.

    python -m caprl_utils.reports.html --profile mini

Written from the Markdown reports, with their figures inside. The same reports give the same bytes.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from caprl_utils import paths
from caprl_utils.errors import UserError, command_line
from caprl_utils.files import note_access, write_atomic
from caprl_utils.reports import claims_page, report3
from caprl_utils.reports.ablation_items import ITEMS
from caprl_utils.reports.commands import profile_of
from caprl_utils.reports.statements import groups
from caprl_utils.schema import Profile

NAME = "report.html"
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
VALUE_AND_INTERVAL = re.compile(r"^([^\[]+?) (\[[^\]]*\])(?:,? (.*))?$")


@dataclass(frozen=True)
class Section:
    """One chapter: a Markdown text, where its links and figures start from, and its name in links."""

    name: str
    title: str
    body: Markup


def write(profile: Profile, folder: Path | None = None) -> Path:
    """Write report.html into the profile's report folder; returns the file.

    Raises UserError when there is no report yet, when a figure is missing, or for smoke numbers in reports/.
    """
    folder = report3.report_folder(profile) if folder is None else folder
    report3.refuse_smoke(profile, folder)
    parts = [("claims", _claims_file(profile, folder))]
    parts += [(name, folder / f"{name}.md") for name in item_names(profile)]
    if not any(file.is_file() for _, file in parts):
        raise UserError(
            f"no report in {paths.shown(folder)} yet; run `make reproduce PROFILE={profile.name}`"
        )
    missing = [group.title for group in groups(profile) if not (folder / f"{group.name}.md").is_file()]
    parts += [("deviations", paths.REPORTS / "deviations.md"), ("lab-log", paths.REPORTS / "lab-log.md")]
    parts.append(("bench", paths.REPORTS / "bench" / "bench.md"))
    sections = [section(name, file) for name, file in parts if file.is_file()]
    page = _template().render(
        profile=profile, sections=sections, missing=missing, counts=_counts(folder), commits=_commits(folder),
        warning=report3.SMOKE_WARNING if profile.name == "smoke" else None,
    )  # fmt: skip
    write_atomic(folder / NAME, page)
    return folder / NAME


def item_names(profile: Profile) -> list[str]:
    """Reports in the order of the page: the paper's tables and figures, then our own."""
    own = [item.name for item in ITEMS if item.name.startswith("extra")]
    return [*(group.name for group in groups(profile)), *own]


def section(name: str, file: Path) -> Section:
    """A Markdown report as a chapter; what it reads counts as an input of the notebook that asks."""
    note_access(file)
    title, body = _render(file.read_text(encoding="utf-8"), file.parent, name)
    return Section(name, re.sub(r",? \(?profile \w+\)?", "", title), body)


def _claims_file(profile: Profile, folder: Path) -> Path:
    beside = folder / "claims.md"
    return beside if beside.is_file() else claims_page.page_folder(profile) / "claims.md"


def _render(text: str, base: Path, prefix: str = "") -> tuple[str, Markup]:
    """(title, HTML without it) of a Markdown text whose figures lie in `base`."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    title = ""
    if tokens and tokens[0].type == "heading_open" and tokens[0].tag == "h1":
        title, tokens = tokens[1].content, tokens[3:]
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
            token.attrSet("id", f"{prefix}-{_slug(tokens[place + 1].content)}")
        elif token.type == "heading_close":
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
        elif token.type == "inline":
            for child in token.children or []:
                _complete(child, base)
            if tokens[place - 1].type == "td_open":
                _split_interval(token)
            _mark_verdict(token)
    html = parser.renderer.render(tokens, parser.options, {})
    html = html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return title, Markup(html)


def _complete(token: Token, base: Path) -> None:
    """Figures come inside the page; links to other reports lead to their chapter."""
    if token.type == "image":
        token.attrSet("src", data_uri(base / str(token.attrGet("src"))))
    elif token.type == "link_open":
        target = str(token.attrGet("href"))
        if not target.startswith(("http:", "https:", "#")):
            token.attrSet("href", f"#{Path(target).stem}")


def data_uri(file: Path) -> str:
    """A figure as an address that holds it. Raises UserError when it is missing."""
    if file.suffix not in TYPES or not file.is_file():
        raise UserError(f"the figure {paths.shown(file)} is missing; make its report again")
    return f"data:{TYPES[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _split_interval(token: Token) -> None:
    """ "+39.5 [34.0, 45.0], p < 0.001" in three lines: tables of eight columns fit on a screen."""
    found = VALUE_AND_INTERVAL.match(token.content)
    if found:
        small = "".join(f"<small>{Markup.escape(text)}</small>" for text in found.groups()[1:] if text)
        token.children = [Token("text", "", 0, content=found[1]), Token("html_inline", "", 0, content=small)]


def _mark_verdict(token: Token) -> None:
    children = token.children or []
    for opening, text in pairwise(children):
        if opening.type == "strong_open" and text.content in claims_page.VERDICTS:
            opening.attrSet("class", f"verdict {text.content.replace(' ', '-')}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _counts(folder: Path) -> Mapping[str, int]:
    file = folder / "claims.json"
    return json.loads(file.read_text(encoding="utf-8"))["facts"]["counts"] if file.is_file() else {}


def _commits(folder: Path) -> list[str]:
    """Short commits of the runs behind the reports; a star where the code had uncommitted changes."""
    found = set()
    for file in folder.glob("*.json"):
        for run in json.loads(file.read_text(encoding="utf-8")).get("runs", []):
            if run.get("commit"):
                found.add(f"{run['commit'][:10]}{'*' if run.get('dirty') else ''}")
    return sorted(found)


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("caprl_utils.reports", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja")


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    file = write(profile_of(argv, "html", __doc__))
    print(f"{paths.shown(file)} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
