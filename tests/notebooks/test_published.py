"""What people read without running it: the published notebooks and README, opened in a browser."""

import re

import nbformat
import pytest
from nbconvert.filters import markdown2html

from caprl_utils import notebook, paths
from caprl_utils.config import load_profile
from tests.browser import CHROMIUM, WHY_SKIPPED, problems

COPIES = sorted((paths.ROOT / "reports" / "mini" / "notebooks").glob("*.ipynb"))


@pytest.mark.notebooks
@pytest.mark.skipif(CHROMIUM is None, reason=WHY_SKIPPED)
@pytest.mark.parametrize("file", COPIES, ids=lambda file: file.stem)
def test_its_page_shows_all_of_it_without_a_network(file, tmp_path, monkeypatch):
    """Pictures in their ratio, outputs whole at 1280 pixels, the page not wider than a window of 800; formulas."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    executed = tmp_path / "runs" / "smoke" / "notebooks" / file.name
    executed.parent.mkdir(parents=True)
    executed.write_bytes(file.read_bytes())
    [page] = notebook.publish(load_profile("smoke"))
    text = page.read_text(encoding="utf-8")
    formulas = [c.source.count("$") for c in nbformat.read(file, 4).cells if c.cell_type == "markdown"]
    assert ("<math" in text) == (sum(formulas) > 0) and "<script" not in text
    assert problems(page, 1280, fitting=".jp-OutputArea-output") == [] and problems(page, 800, fitting="none") == []


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_SKIPPED)
def test_readme_is_readable_in_a_column_as_github_shows_it(tmp_path):
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\[!\[.*?\]\(.*?\)\]\(.*?\)", "", text)  # a badge lies elsewhere
    style = "main {max-width: 980px; margin: auto} img {max-width: 100%} table, pre {display: block; overflow: auto}"
    head = f'<head><base href="{paths.ROOT.as_uri()}/"><style>{style}</style></head>'
    page = tmp_path / "readme.html"
    page.write_text(f"<html>{head}<body><main>{markdown2html(text)}</main></body></html>", encoding="utf-8")
    assert problems(page, 1280, fitting="none") == [] and problems(page, 800, fitting="none") == []
