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
from caprl_utils.schema import Experiment

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


def defined_in(file: Path) -> set[str]:
    """Names that a module defines at its top level."""
    names = re.compile(r"^(?:def |class |async def )?([A-Za-z_]\w*)", re.MULTILINE)
    return set(names.findall(file.read_text(encoding="utf-8")))


def problems_of(text: str, folder: Path) -> list[str]:
    """What a text names that does not exist."""
    found = []
    for path in paths_in(text):
        file, _, name = path.partition(":")
        if not (paths.ROOT / file).exists():
            found.append(f"path {file}")
        elif name and name not in defined_in(paths.ROOT / file):
            found.append(f"{name} in {file}")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link and not (folder / link).exists():
            found.append(f"link {link}")
    for code in code_of(text):
        found += [f"target {t}" for t in re.findall(r"\bmake ([a-z0-9_-]+)", code) if t not in TARGETS]
        for module in re.findall(r"python -m (caprl_utils[\w.]*)", code):
            if importlib.util.find_spec(module) is None:
                found.append(f"module {module}")
        for profile in re.findall(r"(?:PROFILE=|--profile )([a-z]\w*)", code):
            if not (paths.PROFILES / f"{profile}.yaml").is_file():
                found.append(f"profile {profile}")
    for notebook in re.findall(r"\b0\d_[a-z][a-z0-9_]+", text):
        if not (paths.NOTEBOOKS / f"{notebook}.ipynb").is_file():
            found.append(f"notebook {notebook}")
    return found


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(paths.ROOT)))
def test_everything_that_a_document_names_exists(file):
    assert problems_of(text_of(file), file.parent) == []


def test_documents_are_all_read_and_name_something():
    named = {str(file.relative_to(paths.ROOT)): len(paths_in(text_of(file))) for file in DOCUMENTS}
    assert len(DOCUMENTS) >= 12 and named["CONTRIBUTING.md"] > 20 and named["README.md"] > 3


def test_the_start_page_lists_every_notebook_in_order():
    text = text_of(paths.NOTEBOOKS / "start.md")
    assert re.findall(r"\]\((\w+\.ipynb)\)", text) == [file.name for file in NOTEBOOKS]


def test_every_experiment_that_the_documents_name_exists():
    for file in DOCUMENTS:
        for name in re.findall(r"caprl(?:_utils)? train ([a-z]\w+)", text_of(file)):
            assert name in {*names_of(Experiment), *PRETRAINED}, f"{file.name}: {name}"


def test_the_reading_tour_is_short_and_what_it_names_is_there():
    """At most 12 files and 2,500 lines lead from an image to a cell of Table 3."""
    text = (paths.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tour = text.split("## Reading tour")[1].split("\n## ")[0]
    stops = re.findall(r"`(caprl_utils/[a-z_/]+\.py):(\w+)`", tour)
    assert len(stops) == len(re.findall(r"^\d+\.", tour, re.MULTILINE)) <= 12
    for file, name in stops:
        assert name in defined_in(paths.ROOT / file), f"{file}:{name}"
    lines = sum(len((paths.ROOT / file).read_text().splitlines()) for file, _ in stops)
    assert lines <= 2500, lines


@pytest.mark.parametrize("profile", ["one_gpu", "paper"])
def test_readme_and_plan_say_the_same_hours(profile):
    hours = sum(cost["gpu_hours"] for cost in read_yaml(ESTIMATES)[profile].values())
    (row,) = re.findall(rf"^\| `{profile}` \|.*", text_of(paths.ROOT / "README.md"), re.MULTILINE)
    assert f"some {hours:,} GPU-hours by estimate" in row
    assert not re.search(r"\b(day|hour)s?\b", load_profile(profile).description)
