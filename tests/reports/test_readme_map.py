import re

import pytest

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.reports import figures, readme_map, report3


@pytest.fixture
def readme(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n\n{readme_map.START}\nold\n{readme_map.END}\n\nThe end.\n", encoding="utf-8")
    return file


def test_the_map_is_filled_between_its_marks(readme, profile):
    assert not readme_map.update(readme, check=True)
    assert "old" in readme.read_text(encoding="utf-8")
    assert not readme_map.update(readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n") and text.endswith("\n\nThe end.\n") and "old" not in text
    assert readme_map.update(readme, check=True)
    assert "`make table3` | 39.9 to 48.3 | not yet |" in text
    assert "| 55.5 to 59.7; 58.7 to 62.2; 55.6 to 59.6 |" in text  # all of Table 1's settings
    assert "| 47.3, 47.6, 48.4, 48.3 |" in text and "| Commit of the runs |" in text


def test_a_result_puts_the_map_out_of_date(readme, finished, monkeypatch):
    for plot in ("plot_curves", "plot_dots"):  # drawing takes longest and the map shows no figure
        monkeypatch.setattr(figures, plot, lambda *arguments, **named: [])
    readme_map.update(readme)
    report3.write(finished, paths.REPORTS / "mini")
    assert not readme_map.update(readme, check=True)
    readme_map.update(readme)
    text = readme.read_text(encoding="utf-8")
    assert re.search(
        r"\[CapRL-3B against 3B \(base\): 40\.0 to 70\.0 \(\+30\.0 \[.*\]\)\]\(reports/mini/table3\.md\) \| mini \|",
        text,
    )


def test_missing_marks_are_told(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("no marks", encoding="utf-8")
    with pytest.raises(UserError, match="map:start"):
        readme_map.update(file)


def test_the_readme_of_the_repository_is_up_to_date():
    if not (paths.ROOT / "README.md").is_file():
        pytest.skip("no README.md yet")
    assert readme_map.update(paths.ROOT / "README.md", check=True), (
        "run: python -m caprl_utils.reports.readme_map"
    )
