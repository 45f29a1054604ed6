"""report.html: whole, alone, and the same for the same reports; smoke stays out of reports/."""

import re
from html.parser import HTMLParser

import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.reports import claims_page, html, report3


@pytest.fixture
def reported(finished):
    """Table 3 and the claims are written, with a lab log beside them."""
    report3.write(finished)
    claims_page.write(finished)
    (paths.REPORTS / "lab-log.md").write_text("# Lab log: what\n\n## One\n\n<script>alert(1)</script>\n")
    return finished


class Tags(HTMLParser):
    """Start tags with their attributes; asserts that elements close in order."""

    VOID = {"meta", "img", "br", "hr"}

    def __init__(self, page):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_every_report_is_a_chapter_of_the_contents_and_figures_lie_inside(reported):
    page = html.write(reported).read_text(encoding="utf-8")
    tags = Tags(page).tags
    sections = [attrs["id"] for tag, attrs in tags if tag == "section"]
    assert sections == ["claims", "table3", "lab-log"]
    ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
    inside = [attrs["href"][1:] for tag, attrs in tags if tag == "a" and attrs["href"].startswith("#")]
    assert set(sections) <= set(inside) and set(inside) <= ids
    images = [attrs["src"] for tag, attrs in tags if tag == "img"]
    assert len(images) == 2 and all(src.startswith("data:image/svg+xml;base64,") for src in images)
    assert 'class="verdict supported"' in page and "<small>[" in page
    assert "Not measured at this profile yet: Table 1" in page and "&lt;script&gt;alert" in page


def test_nothing_is_loaded_from_outside(reported):
    page = html.write(reported).read_text(encoding="utf-8")
    tags = Tags(page).tags
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe", "object")]
    assert not re.search(r"@import|url\(", page)
    assert all(attrs["src"].startswith("data:") for _, attrs in tags if "src" in attrs)
    assert len(page) < 3_000_000


def test_the_same_reports_give_the_same_page(reported):
    assert html.write(reported).read_bytes() == html.write(reported).read_bytes()


def test_a_missing_figure_and_no_report_at_all_are_told(reported, profile):
    (paths.REPORTS / "mini" / "table3_dots.svg").unlink()
    with pytest.raises(UserError, match=r"table3_dots.svg is missing"):
        html.write(reported)
    with pytest.raises(UserError, match="make reproduce PROFILE=one_gpu"):
        html.write(load_profile("one_gpu"))


def test_smoke_stays_out_of_reports():
    with pytest.raises(UserError, match="smoke does not write"):
        html.write(load_profile("smoke"), paths.REPORTS / "mini")
