"""What `caprl score` does: a model, or a file of captions, scored beside a placebo, on a page of Markdown (ours)."""

from __future__ import annotations

import math
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from caprl_utils import paths
from caprl_utils.captions.export import CAPTION_KEYS, caption_in
from caprl_utils.errors import UserError
from caprl_utils.files import text_lines, write_atomic
from caprl_utils.hashing import value_hash
from caprl_utils.image_sources import IMAGE_KEYS
from caprl_utils.images import ImageItem, has_picture_name
from caprl_utils.models.base import open_backend
from caprl_utils.notebook import prepare_process
from caprl_utils.paths import shown
from caprl_utils.prism import told
from caprl_utils.prism.benchmarks import load_registry
from caprl_utils.prism.evaluate import STAGE, evaluate, evaluate_vqa
from caprl_utils.prism.loading import file_rows, load_samples
from caprl_utils.prism.metrics import MATH_VERIFY_VERSION, Score, all_rotations, as_list, mathvista_match
from caprl_utils.prism.scores import Scoring, read_samples, sample_scores, score_answers
from caprl_utils.prism.sources import Source, images_of, model_captions, other_image_captions, written_captions
from caprl_utils.prism.statistics import AVERAGE, bootstrap_models
from caprl_utils.records import Sample
from caprl_utils.schema import Profile

Rows = Sequence[Mapping[str, Any]]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
NAME_KEYS = ("image_id", *IMAGE_KEYS, "question_id", "id")  # ours: the first that names an image of the benchmarks
_NAMED = 10  # images without a caption named on the page
_SAID = ("told", "false share", "false count")
LOW_MASS = 0.5  # ours: below it the reader would rather not have said a letter
TOLERANCE = 1e-6  # of test vectors, which are rounded to six decimals
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
    prepare_process(profile, any_model=True)
    file = Path(captioner) if captioner.endswith(SUFFIXES) else None
    if file and (direct or not file.is_file()):
        raise UserError(f"{captioner}: " + ("--direct needs a model that looks" if direct else "no such file"))
    name = name or (file.stem if file else captioner)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "captions"
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
        if placebo := other_image_captions(source, images):
            evaluate(profile, f"{name}-placebo", placebo, reader, samples)
            others = read_samples(paths.RUNS / profile.name / STAGE / f"{name}-placebo")
        else:
            lines.append("no placebo: a benchmark has not two pictures with captions")
    folder = paths.RUNS / profile.name / record["stage"] / name
    parts = [f"# {name}, read by {record['reader']['name']}", *_tables(profile, record, read_samples(folder), others)]
    for what in ("set_aside", "left_out"):
        if reasons := [reason for found in record[what].values() for reason in found.values()]:
            lines.append(f"{what.replace('_', ' ')}: {len(reasons)} questions; first: {reasons[0]}")
    page = "\n\n".join([*parts, *lines])
    write_atomic(folder / "score.md", f"{page}\n{_NOTE}\n")
    return f"{page}\n\n{shown(folder)}"


def _tables(profile: Profile, record: Mapping[str, Any], rows: Rows, others: Rows) -> Iterator[str]:
    """The scores, and what answers and captions are like, of every benchmark; others: the placebo's rows."""
    import pandas as pd

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
    frame = pd.DataFrame(rows).astype({"score": float, "letter_mass": float})
    for key in values:
        own = frame[frame["benchmark"] == key]
        of_captions = own.groupby(["image_id", "caption_index"])["score"].mean()
        lengths = own.drop_duplicates(["image_id", "caption_index"])["caption"].str.len()
        cells = [
            _number(100 * (own["parsed"].isna() | (own["letter_mass"] < LOW_MASS)).mean()),
            str(own["score"].isna().sum()),
            _number(100 * of_captions.groupby("image_id").var().mean() ** 0.5), _number(lengths.mean(), 0),
        ]  # fmt: skip
        for name in _SAID:
            images, share = told.by_image(rows, name).get(key, {}), told.MEASURES[name].share
            mean = sum(images.values()) / len(images) if images else math.nan
            cells.append(_number(100 * mean if share else mean, 1 if share else 2))
        table.append([key, *cells])
    yield _markdown(table)


def _points(value: float | None, interval: Sequence[float] | None) -> str:
    """In percent."""
    told = "–" if value is None else _number(100 * value)
    return told + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def _number(value: float, decimals: int = 1) -> str:
    return "–" if value != value else f"{value:.{decimals}f}"  # NaN: there is none


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table with its heads first, padded, so that it can be read as text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


# Captions that somebody else made, from a file, matched to the images of benchmarks by what the file calls them


def given_captions(file: Path, images: Sequence[ImageItem]) -> tuple[Source, list[str]]:
    """The captions of a file as a source, and lines for people: how they were matched, what was set aside.

    An image is named under one of `NAME_KEYS`: by its id, with or without the benchmark's name, by its file's name or
    that without suffix. It may have several captions (see `caption_in`), in rows or in a list. Raises UserError for a
    file that cannot be read, a benchmark without a caption, and two names that mean one image.
    """
    rows, find = file_rows(file), _finder([image.id for image in images])
    named = {key: [(name, row) for row in rows if (name := _name(row.get(key)))] for key in NAME_KEYS}
    key = next((key for key, some in named.items() if any(find(name) for name, _ in some)), "")
    found: dict[str, list[str]] = defaultdict(list)
    names: dict[str, str] = {}
    aside = Counter({f"without {key!r}": len(rows) - len(named.get(key, ()))})
    for name, row in named.get(key, ()):
        said, image = caption_in(row), find(name)
        texts = [text.strip() for text in (said if isinstance(said, list) else [said]) if isinstance(text, str)]
        if image and (other := names.setdefault(image, name)) != name:
            raise UserError(f"{shown(file)}: {other!r} and {name!r} both mean {image}; write whole ids")
        if image and any(texts):
            found[image] += filter(None, texts)
        else:
            aside["without a caption" if image else "of other images than these questions are about"] += 1
    if lacking := [image for image in images if image.kind not in {name.partition("/")[0] for name in found}]:
        silent = aside["without a caption"]
        untold = f"{silent} rows name an image and have no text under {', '.join(CAPTION_KEYS)}. " if silent else ""
        theirs = [name for some in named.values() for name, _ in some[:2]] or [f"none under {', '.join(NAME_KEYS)}"]
        raise UserError(
            f"{shown(file)} has no caption of {lacking[0].kind}. {untold}It names {', '.join(theirs[:4])}; its "
            f"images are {', '.join(image.id for image in lacking[:3])} (its name and a suffix may be left out). "
            "--benchmark names others"
        )
    captions = {image: written_captions(image, texts, file.name, lambda text: None) for image, texts in found.items()}
    told = [f"{sum(map(len, found.values()))} captions of {len(found)} images, matched by {key!r}"]
    told += [f"set aside: {count} rows {what}" for what, count in aside.items() if count]
    return Source(file.name, {"source": "given", "captions": value_hash(found)}, lambda images: captions), told


def _name(value: Any) -> str:
    """What a cell calls an image: a path or number, also in a list of one or beside bytes; "" for none."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    value = value.get("path") if isinstance(value, dict) else value
    return str(value).strip() if isinstance(value, (str, int)) else ""


def _finder(images: Sequence[str]) -> Callable[[str], str | None]:
    """What finds the one image that a name means, by the strictest form that fits any: whole, without suffix, the last
    part of its path, both. Where a name starts with a benchmark's key, the last part alone says nothing.
    """

    def forms(name: str) -> list[str]:
        whole = posixpath.normpath(name.replace("\\", "/"))
        bare = posixpath.splitext(whole)[0] if has_picture_name(whole) else whole
        return [whole, bare, posixpath.basename(whole), posixpath.basename(bare)]

    index: dict[str, set[str]] = {}
    for level in range(4):
        found: dict[str, set[str]] = defaultdict(set)
        for image in images:
            for name in (image, image.partition("/")[2]):
                found[forms(name)[level]].add(image)
        index = found | index

    def find(name: str) -> str | None:
        written = forms(name)
        written = written[:2] if written[0].partition("/")[0] in load_registry() else written
        means = next((index[form] for form in written if form in index), ())
        return next(iter(means)) if len(means) == 1 else None

    return find


# `caprl score --vectors`: both ways to score, checked against values worked out by hand


class Vector(BaseModel):
    """A line of a file of test vectors. prediction, gold: of a circular question lists over its rotations. expected:
    None for "no score"; meta.math_verify has it by version, of which the pinned one counts.
    """

    model_config = ConfigDict(strict=True)

    benchmark: str
    prediction: str | list[str]
    gold: Any
    mode: Scoring
    expected: float | None
    meta: dict[str, Any] | None = None

    def failure(self) -> str | None:
        """What is wrong; None where the scorer gives what is expected."""
        meta, several = self.meta or {}, isinstance(self.prediction, list)
        options, expected = tuple(as_list(meta.get("options")) or ()), self.expected
        pairs = zip(self.prediction, self.gold, strict=True) if several else [(self.prediction, self.gold)]
        asked = [(Sample("vector", self.benchmark, (), "", gold, options, meta), text) for text, gold in pairs]
        (sample, text), *_ = asked  # ValueError where there is none
        if self.mode == "standard" and self.benchmark == "mathvista" and len(text.split()) == 1:
            found: Score = mathvista_match(sample, text, extracted=True)  # the prediction is the final short answer
        else:
            found = all_rotations(score_answers(asked, self.mode))
        expected = meta.get("math_verify", {}).get(MATH_VERIFY_VERSION, expected)
        both = found.value is not None and expected is not None
        if abs(found.value - expected) <= TOLERANCE if both else found.value is expected:
            return None
        return (
            f"{self.benchmark} ({self.mode}) prediction {self.prediction!r} gold {self.gold!r}: expected {expected}, "
            f"got {found.value} (parsed {found.parsed!r}, {found.reason or 'no remark'})"
        )


def check_vectors(path: Path) -> tuple[int, list[str]]:
    """Score a JSONL file of vectors: how many passed, a line for each other. Raises UserError where there are none."""
    lines = dict(text_lines(path)) if path.is_file() else {}
    if not lines:
        raise UserError(f"no test vectors in {path}: one JSON object a line with {[*Vector.model_fields]}")
    failures = []
    for number, line in lines.items():
        try:
            failure = Vector.model_validate_json(line).failure()
        except (UserError, AttributeError, TypeError, ValueError) as error:  # no vector, or one of another form
            failure = " ".join(str(error).split())
        failures += [f"FAILED line {number} of {path}: {failure}"] if failure else []
    return len(lines) - len(failures), failures
