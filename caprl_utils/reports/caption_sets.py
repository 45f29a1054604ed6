"""What the caption sets are like that VLMs are pretrained on, where our models wrote them: length, truth, ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from caprl_utils import paths
from caprl_utils.pretraining.prepare import run_name
from caprl_utils.pretraining.sets import CaptionSet
from caprl_utils.pretraining.stages import STAGE
from caprl_utils.reports import numbers
from caprl_utils.reports.tables import Cell, Source, Table, record_path
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

_SHARES = {
    "told": "Facts told right (%)", "wrong": "Statements wrong (%)", "cut": "Cut (%)", "looped": "Loops (%)",
}  # fmt: skip
_NOTES = (
    "Of a set before loops and cut captions are left out. Facts told right: of all facts of the pictures. Statements "
    "wrong: of all that a caption states, also of what the picture does not show. Tokens are the captioner's own.",
)

Records = Sequence[tuple[str, Mapping[str, Any]]]
"""(record_path, record) of runs."""


def record_of(profile: Profile, captions: CaptionSet | None) -> Records:
    """The run that made a caption set; nothing where it is not there or its captions are a user's."""
    if captions is None:
        return []
    folder = paths.RUNS / profile.name / STAGE / run_name(captions.slug)
    if not (folder / "result.json").is_file():
        return []
    record = load_result(folder)
    return [(record_path(folder / "result.json"), record)] if record["values"].get("captions") else []


def table(name: str, sets: Mapping[str, Records]) -> Table | None:
    """A row for each caption set. name: of the item. sets: name of a set -> what `record_of` found."""
    rows = [(label, _cells(*found[0])) for label, found in sets.items() if found]
    heads = ["Captions", "Tokens, mean", *_SHARES.values()]
    return Table(f"{name}_captions", "The caption sets", "Set", heads, rows, _NOTES) if rows else None


def _cells(file: str, record: Mapping[str, Any]) -> list[Cell]:
    values = record["values"]["captions"]
    texts = {"count": numbers.count(values["count"]), "tokens": numbers.number(values["tokens"])}
    texts |= {key: numbers.percent(values[key]) for key in _SHARES}
    return [
        Cell(text, values[key], None, (Source(file, f"values/captions/{key}"),))
        for key, text in texts.items()
    ]
