"""report.html: whole, alone, the same for the same reports; README's map; `caprl report`."""

import json
import os
import re
from functools import partial
from html.parser import HTMLParser

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.reports import page, tables
from tests.browser import CHROMIUM, WHY_SKIPPED, problems


class Tags(HTMLParser):
    """Start tags with their attributes; asserts that elements close in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] * (tag not in ("meta", "img", "br", "hr"))

    def handle_endtag(self, tag):
        assert tag in ("meta", "img", "br", "hr") or self.open.pop() == tag


def test_every_report_is_a_chapter_figures_lie_inside_and_nothing_is_loaded(finished, no_figures, recorded):
    tables.write(finished, "table3")
    page.write_claims(finished)
    paths.REPORTS.mkdir()
    (paths.REPORTS / "lab-log.md").write_text("# Lab log: what\n\n## One\n\n<script>alert(1)</script>\n")
    file = page.write_html(finished)
    text = file.read_text(encoding="utf-8")
    tags = Tags(text).tags
    sections = [attrs["id"] for tag, attrs in tags if tag == "section"]
    assert sections == ["claims", "table3", "claims-more", "records"] and recorded(text) > 150
    assert "rows: <code>runs/mini/prism/base-3b/samples.parquet</code>" in text
    ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
    inside = [attrs["href"][1:] for tag, attrs in tags if tag == "a" and attrs["href"].startswith("#")]
    assert set(sections) <= set(inside) and set(inside) <= ids
    images = [attrs["src"] for tag, attrs in tags if tag == "img"]
    assert len(images) == 3 and all(src.startswith("data:image/svg+xml;base64,") for src in images)
    assert 'class="verdict supported"' in text and "<small>[" in text
    log = file.with_name("lab-log.html").read_text(encoding="utf-8")
    assert Tags(log).tags and "&lt;script&gt;alert" in log and 'href="lab-log.html"' in text
    assert "Not measured at this profile yet: Table 1" in text
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe", "object")]
    assert not re.search(r"@import|url\(", text) and len(text) < 3_000_000
    assert page.write_html(finished).read_text(encoding="utf-8") == text
    (paths.reports_of("mini") / "table3_dots.svg").unlink()
    with pytest.raises(UserError, match=r"table3_dots.svg is missing"):
        page.write_html(finished)
    with pytest.raises(UserError, match="make reproduce PROFILE=one_gpu"):
        page.write_html(load_profile("one_gpu"))


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_SKIPPED)
def test_a_reader_sees_the_whole_page(finished, table5, trained):
    """Real figures and the widest tables, in a window of 1280 pixels; at 800 tables may scroll, the page may not."""
    trained("judge_unified", 5)
    trained("judge_vlm", 6)
    for name in ("table3", "table5", "figure1c"):
        tables.write(finished, name)
    page.write_claims(finished)
    file = page.write_html(finished)
    assert problems(file, 1280) == [] and problems(file, 800, fitting="none") == []


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_SKIPPED)
def test_what_is_wrong_with_a_page_is_seen(tmp_path):
    picture = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='40' height='20'/>"
    wrong = [
        '<p style="width: 2000px">far</p>',
        f'<img src="{picture}" width="300" height="20">',
        '<img src="none.png">',
        "<script>console.error('lost')</script>",
        '<div class="wide" style="overflow-x: auto"><hr style="width: 1500px"></div>',
    ]
    (tmp_path / "page.html").write_text(f"<html><head></head><body>{''.join(wrong)}</body></html>")
    told = " ".join(problems(tmp_path / "page.html", 1280))
    parts = ("px wide in a window", "stretched to 300 x 20", "broken picture", "lost", "cut: ")
    assert [part for part in parts if part not in told] == []


def test_all_reports_are_written_in_one_go_and_stay_under_runs_until_they_are_published(
    tmp_path, finished, no_figures, monkeypatch
):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{page.START}\nold\n{page.END}\n\nThe end.\n", encoding="utf-8")
    monkeypatch.setattr(paths, "ROOT", readme.parent)
    page.update_readme(readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n") and text.endswith("\n\nThe end.\n") and "\nold\n" not in text
    assert "`make table3` | 39.9 to 48.3 (+8.4) | not yet |" in text
    assert "| 55.5 to 59.7 (+4.2); 58.7 to 62.2 (+3.5); 55.6 to 59.6 (+4.0) |" in text  # all of Table 1's settings
    assert "| 47.3, 47.6, 48.4, 48.3 (+1.0) |" in text and "| Verdicts |\n" in text
    for wrong, message in {
        partial(page.publish, finished): r"no report in .*make reproduce PROFILE=mini",
        partial(page.publish, load_profile("smoke")): "profile smoke none that mean anything",
        partial(page.write_all, finished, ["table5"]): "table5 needs",
        partial(page.train, finished, ["table1"]): "no training of notebook 03 stands behind table1",
    }.items():
        with pytest.raises(UserError, match=message):
            wrong()
    names = [file.name for file in page.write_all(finished)]
    assert names == ["table3.md", "claims.md", "report.html", "README.md", "README.md"]
    assert not paths.REPORTS.exists() and readme.read_text(encoding="utf-8") == text
    published = page.publish(finished)
    assert {"table3.md", "claims.md", "report.html", "README.md"} <= {file.name for file in published}
    row = r"\[CapRL against base: 40\.0 to 70\.0 \(\+30\.0 \[.*\]\)\]\(reports/mini/table3\.md\) \| [^|]*\d supported"
    assert re.search(f"mini: {row}", text := readme.read_text(encoding="utf-8"))
    assert re.search(r"\d+ statements of the paper are \d+ facts: 1 supported, .*1 of those supported .* stand", text)
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(UserError, match="map:start"):
        page.update_readme(readme)


@pytest.mark.parametrize("profile", ["one_gpu"], indirect=True)
def test_notebook_06_ends_at_other_sizes_with_scores_missing(profile, prism_run, trained, monkeypatch, no_figures):
    """No 72B, no ceiling, a benchmark that nobody could score, a question that one captioner has no score for."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    prism_run("base-3b", right=8, unscored={"mmmu", ("chartqa", 0)})
    trained("caprl", right=14, tokens=40.0)
    prism_run("caprl-seed0", right=14, tokens=40.0, unscored={"mmmu"})
    cells = json.loads((paths.NOTEBOOKS / "06_tables_and_figures.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {"profile": profile.name, "seed": 0}
    for source in code[1:]:  # the first holds the parameters
        exec(source, names)
    text = (paths.reports_of(profile.name) / "table3.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith("| CapRL | 69.2 [")]  # 27 of 39
    assert " | – | " in row and "not in the average: MMMU." in text and "1 of ChartQA." in text
    assert "Not evaluated, so not in the tables: " in text


def test_the_readme_of_the_repository_is_up_to_date():
    part = f"{page.START}\n{page.readme_map()}\n{page.END}"
    assert part in (paths.ROOT / "README.md").read_text(encoding="utf-8"), "run: make publish"
