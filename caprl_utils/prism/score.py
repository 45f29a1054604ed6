"""What `caprl score` does: a model, or a file of captions, scored beside a placebo, on a page of Markdown (ours)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.models.base import open_backend
from caprl_utils.notebook import prepare_process
from caprl_utils.prism import told
from caprl_utils.prism.controls import other_image_captions
from caprl_utils.prism.evaluate import STAGE, evaluate, evaluate_vqa
from caprl_utils.prism.given import SUFFIXES, given_captions
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.scores import LOW_MASS, read_samples, sample_scores
from caprl_utils.prism.sources import images_of, model_captions
from caprl_utils.prism.statistics import AVERAGE, bootstrap_models
from caprl_utils.schema import Profile

Rows = Sequence[Mapping[str, Any]]
_NAMED = 10  # images without a caption named on the page
_SAID = ("told", "false share", "false count")
_NOTE = """
Score: of the questions that the reader answers from the caption alone, with the 95 % interval over images. Placebo: the
same questions with the caption of another image of the benchmark, the nearest in length; gain: score - placebo, paired
by image. No letter: answers that name no option, or to which the reader gives letters less than half its probability.
Spread: how far the captions of one image differ in its score (standard deviation, points). Length: characters a
caption. Told, false: of the image's facts, and of the caption's statements, where facts are known."""


def score(
    profile: Profile, captioner: str, benchmarks: Sequence[str], num_samples: int | None, name: str | None, direct: bool
) -> str:  # fmt: skip
    """Score a model or a captions file on benchmarks (the profile's if none; KEY=PATH for local data); a model by VQA
    if `direct`. Writes score.md into the run's folder and returns it with the folder's name.
    """
    prepare_process(profile)
    file = Path(captioner) if captioner.endswith(SUFFIXES) else None
    if file and (direct or not file.is_file()):
        raise UserError(f"{captioner}: " + ("--direct needs a model that looks" if direct else "no such file"))
    name = name or re.sub(r"[^A-Za-z0-9.-]+", "-", file.stem if file else captioner).strip("-.")
    samples = load_samples(profile, benchmarks or None, num_samples)
    asked = profile.models.policy.model_copy(update={"path": captioner, "revision": None})
    lines, others = [], []
    if direct:
        record = evaluate_vqa(profile, name, open_backend(asked, profile), samples)
    else:
        images, reader = images_of(samples), open_backend(profile.models.prism_reader, profile)
        if file:
            source, lines = given_captions(file, images)
        else:
            source = model_captions(profile, open_backend(asked, profile), name)
        record = evaluate(profile, name, source, reader, samples)
        own = source.captions(images)
        if without := [image.id for image in images if image.id not in own]:
            lines.append(f"without a caption: {len(without)} of {len(images)} images: {', '.join(without[:_NAMED])}")
        try:
            placebo = other_image_captions(source)
            placebo.captions(images)
        except UserError as error:
            lines.append(f"no placebo: {error}")
        else:
            evaluate(profile, f"{name}-placebo", placebo, reader, samples)
            others = read_samples(paths.RUNS / profile.name / STAGE / f"{name}-placebo")
    folder = paths.RUNS / profile.name / record["stage"] / name
    parts = [f"# {name}, read by {record['reader']['name']}", *_tables(profile, record, read_samples(folder), others)]
    for what in ("set_aside", "left_out"):
        if reasons := [reason for found in record[what].values() for reason in found.values()]:
            lines.append(f"{what.replace('_', ' ')}: {len(reasons)} questions; first: {reasons[0]}")
    page = "\n\n".join([*parts, *lines])
    write_atomic(folder / "score.md", f"{page}\n{_NOTE}\n")
    return f"{page}\n\n{paths.shown(folder)}"


def _tables(profile: Profile, record: Mapping[str, Any], rows: Rows, others: Rows) -> Iterator[str]:
    """The scores, and what answers and captions are like, of every benchmark; others: the placebo's rows."""
    values, found = record["values"]["benchmarks"], {"captions": sample_scores(rows), "placebo": sample_scores(others)}
    both = found["captions"].keys() & found["placebo"].keys()
    common = {label: {key: scores[key] for key in values if key in both} for label, scores in found.items()}
    gaps = bootstrap_models(common, profile.prism.bootstrap_draws, profile.seed) if both else {}
    if len(both) < len(values):
        gaps.pop(AVERAGE, None)
    table = [["benchmark", "score", "placebo", "gain", "questions", "images"]]
    for key, part in (*values.items(), (AVERAGE, {"mean": record["values"]["average"]})):
        cells = [_points(part["mean"], record["intervals"].get(key)), "–", "–"]
        if gap := gaps.get(key):
            sides = gap.interval("placebo"), gap.difference("captions", "placebo")
            cells[1:] = (_points(side.value, (side.low, side.high)) for side in sides)
        table.append([key, *cells, *(str(part.get(name, "")) for name in ("num_samples", "num_images"))])
    yield _markdown(table)
    table = [["benchmark", "no letter (%)", "unscored", "spread", "length", *(told.MEASURES[m].head for m in _SAID)]]
    yield _markdown(table + [[key, *_said([row for row in rows if row["benchmark"] == key])] for key in values])


def _said(rows: Rows) -> list[str]:
    """The second table's cells of one benchmark."""
    silent = [
        row["parsed"] is None or (row["letter_mass"] is not None and row["letter_mass"] < LOW_MASS) for row in rows
    ]
    texts = {(row["image_id"], row["caption_index"]): row["caption"] for row in rows if row["caption"] is not None}
    of_image: dict[str, dict[int, list[float]]] = {}
    for row in (row for row in rows if row["score"] is not None):
        of_image.setdefault(row["image_id"], {}).setdefault(row["caption_index"], []).append(row["score"])
    spreads = [variance(map(fmean, captions.values())) for captions in of_image.values() if len(captions) > 1]
    cells = [f"{100 * fmean(silent):.1f}", str(sum(row["score"] is None for row in rows))]
    cells += [f"{100 * sqrt(fmean(spreads)):.1f}" if spreads else "–"]
    cells += [f"{fmean(map(len, texts.values())):.0f}" if texts else "–"]
    for name in _SAID:
        means = [*next(iter(told.by_image(rows, name).values()), {}).values()]
        share = told.MEASURES[name].share
        cells.append(f"{fmean(means) * (100 if share else 1):.{1 if share else 2}f}" if means else "–")
    return cells


def _points(value: float | None, interval: Sequence[float] | None) -> str:
    """In percent."""
    told = "–" if value is None else f"{100 * value:.1f}"
    return told + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table with its heads first, padded, so that it can be read as text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
