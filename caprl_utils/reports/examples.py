"""The page of examples: pictures and what the captioners of Table 3 wrote about them, every statement checked.

For rendered pictures, whose facts are known. The first pictures of each benchmark in turn, the first caption of each:
none is chosen for what it says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.files import write_atomic
from caprl_utils.prism.gallery import save_png
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.scores import read_samples
from caprl_utils.prism.sources import image_ids
from caprl_utils.prism.told import counts, false, sentences
from caprl_utils.records import Sample
from caprl_utils.reports import figures, numbers
from caprl_utils.reports.items import items
from caprl_utils.reports.numbers import Cell, Table
from caprl_utils.schema import Profile

NAME = "examples"
NUM_PICTURES, NUM_FIRST = 12, 3
CAPTIONERS = ("base", "CapRL", "strong captioner")  # rows of Table 3


def write(profile: Profile) -> Path | None:
    """Write examples.md with its pictures, and the first of them as a figure with what is answered from its captions,
    from the kept captions; None where runs are missing or facts not known.
    """
    runs = {row.label: paths.RUNS / profile.name / row.runs[0] for row in items(profile)["table3"].rows}
    captions = {label: _first_captions(runs[label]) for label in CAPTIONERS if (runs[label] / "result.json").is_file()}
    if not captions or not all(captions.values()):
        return None
    folder, rows = paths.reports_of(profile.name), []
    samples = list(_in_turn(load_samples(profile), set.intersection(*map(set, captions.values()))))
    _draw_first(profile, samples[0], {label: captions[label] for label in CAPTIONERS[:2]})
    for sample in samples:
        image_id = image_ids(sample)[0]
        file = f"{NAME}/{re.sub(r'[^A-Za-z0-9-]+', '-', image_id)}.png"
        save_png(sample.images[0](), folder / file)
        told = [Cell(marked(found[image_id][0]["caption"], sample.meta)) for found in captions.values()]
        rows.append((f"![{sample.meta['true_caption']}]({file})", told))
    first, more = (
        Table(NAME, caption, "Picture", list(captions), part, words=True)
        for caption, part in (("First captions", rows[:NUM_FIRST]), ("More pictures", rows[NUM_FIRST:]))
    )
    page = numbers.fill("examples.md", profile=profile, first=first, more=more, number=len(rows))
    write_atomic(folder / f"{NAME}.md", page)
    return folder / f"{NAME}.md"


def _first_captions(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Image id -> rows of its first caption, a question each, of images with known facts."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_samples(run):
        if row["caption_index"] == 0 and row["facts"] is not None:
            found.setdefault(row["image_id"], []).append(row)
    return found


def _draw_first(profile: Profile, sample: Sample, captions: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> None:
    """The strip of README: see `figures.plot_example`."""
    rows = {label: found[image_ids(sample)[0]] for label, found in captions.items()}
    told = {
        label: [(text, kind if kind in figures.EXAMPLE_LOOKS else "false")
                for text, kind in sentences(some[0]["caption"], sample.meta) if kind]
        for label, some in rows.items()
    }  # fmt: skip
    asked = [
        (some[0]["question"].partition("\n")[0], [row["score"] == 1 for row in some])
        for some in zip(*rows.values(), strict=False)
    ]
    figures.plot_example(sample.images[0](), told, asked, profile, paths.reports_of(profile.name) / "example")


def _in_turn(samples: Sequence[Sample], captioned: set[str]) -> Iterator[Sample]:
    """A sample of each of the first captioned images, the benchmarks in turn."""
    by_benchmark: dict[str, dict[str, Sample]] = {}
    for sample in samples:
        if (image_id := image_ids(sample)[0]) in captioned:
            by_benchmark.setdefault(sample.benchmark, {}).setdefault(image_id, sample)
    turns = (one for row in zip_longest(*(found.values() for found in by_benchmark.values())) for one in row if one)
    return (sample for sample, _ in zip(turns, range(NUM_PICTURES), strict=False))


_MARKS = {None: "{}", "true": "{} ✓", "repeat": "~~{}~~"}  # kind of a sentence -> how it stands; all others are false


def marked(caption: str, meta: Mapping[str, Any]) -> str:
    """A caption in Markdown behind a summary: ✓ true, bold ✗ false, struck through what was said before."""
    found = counts(caption, meta)
    plain = [(re.sub(r"([\\`*_~\[\]<>])", r"\\\1", text), kind) for text, kind in sentences(caption, meta)]
    told = " ".join(_MARKS.get(kind, "**{} ✗**").format(text) for text, kind in plain)
    return f"*{found['told']} of {found['facts']} facts, {false(found)} false.* {told}"
