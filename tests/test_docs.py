"""What the documents name is there: paths, make targets, notebooks, profiles, configs, modules, functions."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from caprl_utils import paths
from caprl_utils.__main__ import PRETRAINED
from caprl_utils.config import load_profile, names_of, read_yaml
from caprl_utils.run import ESTIMATES
from caprl_utils.schema import Experiment, Profile

MAKEFILE = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
DOCUMENTS = [
    *(paths.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "notebooks/start.md")),
    *sorted(paths.REPORTS.glob("*.md")), *sorted(paths.REPORTS.glob("*/*.md")), *NOTEBOOKS,
]  # fmt: skip
TARGETS = {
    target for line in re.findall(r"^([A-Za-z0-9_ -]+):(?!=)", MAKEFILE, re.MULTILINE) for target in line.split()
} | {file.stem for file in NOTEBOOKS}
PLACEHOLDERS = re.compile(r"[<>{}*]|NAME|NN|PORT|FOLDER|ITEM")
FOLDERS = {path.name for path in paths.ROOT.iterdir() if path.is_dir() and path.name != "runs"}


def text_of(file: Path) -> str:
    """The Markdown of a document; of a notebook its Markdown cells."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def code_of(text: str) -> list[str]:
    """Everything set as code: spans and blocks."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [*(line for block in blocks for line in block.splitlines()), *re.findall(r"`([^`\n]+)`", rest)]


def paths_in(text: str) -> set[str]:
    """Words in code that begin with a folder of the repository; those under runs/ are made, not kept."""
    words = {word.strip(".,;()\"'") for code in code_of(text) for word in code.split()}
    inside = {word for word in words if "/" in word and word.split("/")[0] in FOLDERS and "://" not in word}
    return {word for word in inside if not PLACEHOLDERS.search(word)}


def problems_of(text: str, folder: Path) -> list[str]:
    """What a text names that does not exist; a name behind a module's path must stand at its top level."""
    found = []
    for path in paths_in(text):
        file, _, name = path.partition(":")
        if not (paths.ROOT / file).exists():
            found.append(f"path {file}")
        elif name and not re.search(rf"^(def |class )?{name}\b", (paths.ROOT / file).read_text(), re.MULTILINE):
            found.append(f"{name} in {file}")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    found += [f"link {link}" for link in links if "://" not in link and not (folder / link).exists()]
    code = "\n".join(code_of(text))
    modules = re.findall(r"python -m (caprl_utils[\w.]*)", code)
    found += [f"module {name}" for name in modules if importlib.util.find_spec(name) is None]
    named = {
        "target": (re.findall(r"\bmake ([a-z0-9_-]+)", code), TARGETS),
        "profile": (re.findall(r"(?:PROFILE=|--profile )([a-z]\w*)", code), names_of(Profile)),
        "experiment": (re.findall(r"caprl(?:_utils)? train ([a-z]\w+)", text), {*names_of(Experiment), *PRETRAINED}),
        "notebook": (re.findall(r"\b0\d_[a-z][a-z0-9_]+", text), {file.stem for file in NOTEBOOKS}),
    }
    return found + [f"{what} {name}" for what, (names, there) in named.items() for name in names if name not in there]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(paths.ROOT)))
def test_everything_that_a_document_names_exists(file):
    assert problems_of(text_of(file), file.parent) == []


def test_documents_are_all_read_and_the_start_page_lists_every_notebook_in_order():
    named = {str(file.relative_to(paths.ROOT)): len(paths_in(text_of(file))) for file in DOCUMENTS}
    assert len(DOCUMENTS) >= 12 and named["CONTRIBUTING.md"] > 20 and named["README.md"] > 3
    listed = re.findall(r"\]\((\w+\.ipynb)\)", text_of(paths.NOTEBOOKS / "start.md"))
    assert listed == [file.name for file in NOTEBOOKS]


def test_the_reading_tour_is_short():
    """At most 12 files and 2,500 lines lead from an image to a cell of Table 3."""
    text = (paths.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tour = text.split("## Reading tour")[1].split("\n## ")[0]
    stops = re.findall(r"`(caprl_utils/[a-z_/]+\.py):\w+`", tour)
    assert len(stops) == len(re.findall(r"^\d+\.", tour, re.MULTILINE)) <= 12
    assert sum(len((paths.ROOT / file).read_text().splitlines()) for file in stops) <= 2500


@pytest.mark.parametrize("profile", ["one_gpu", "paper"])
def test_readme_and_plan_say_the_same_hours(profile):
    hours = sum(cost["gpu_hours"] for cost in read_yaml(ESTIMATES)[profile].values())
    (row,) = re.findall(rf"^\| `{profile}` \|.*", text_of(paths.ROOT / "README.md"), re.MULTILINE)
    assert f"some {hours:,} GPU-hours by estimate" in row
    assert not re.search(r"\b(day|hour)s?\b", load_profile(profile).description)
