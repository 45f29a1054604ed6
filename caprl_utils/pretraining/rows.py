"""Rows of a data set before their tokens are counted: of a user's file, or rendered and captioned by our models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import prompts
from caprl_utils.files import write_atomic
from caprl_utils.hashing import code_hashes, value_hash
from caprl_utils.pretraining import data
from caprl_utils.pretraining.data import BadRow, Example
from caprl_utils.pretraining.sets import IMAGE_SETS, CaptionSet, Training, rows_of
from caprl_utils.pretraining.stages import STAGE
from caprl_utils.progress import track
from caprl_utils.registry import drawn_source
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    from PIL.Image import Image


MINI_WORLD = "mini-world"


@dataclass(frozen=True)
class Rows:
    """Rows of a data set before their tokens are counted. bad: a line for each that cannot be trained on."""

    examples: Sequence[Example]
    bad: Sequence[str] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    captions: Mapping[str, float] | None = None


def image_source(profile: Profile, images: str) -> str:
    """A rendered image set as `captioning` names it; each has a seed of its own, so no two share an image."""
    settings = profile.pretraining
    count = {
        "align": settings.align.num_rows, "sft": settings.sft.num_rows, "caprl": settings.further.num_rows_large,
    }.get(images, settings.further.num_rows)  # fmt: skip
    return f"{MINI_WORLD}:{STAGE}:{count}:{_image_seed(profile, images)}"


def _image_seed(profile: Profile, images: str) -> int:
    return 100 * profile.seed + 1 + IMAGE_SETS.index(images)


def make_rows(
    profile: Profile, training: Training, file: Path | None, captions: Path | None, media: Path
) -> Rows:
    """The rows of a data set, sampled by the profile's seed.

    file: of the user; None where the set is rendered. captions: written for it, where our models write them. media:
    where rendered images go.
    """
    settings = profile.pretraining
    if file is not None:
        drawn = data.sample(data.read_rows(file), training.num_rows(settings), profile.seed)
        bad = [str(row) for row in drawn if isinstance(row, BadRow)]
        return Rows([row for row in drawn if isinstance(row, Example)], bad)
    if training.captions is not None:
        return _captioned(profile, training.captions, captions, media)
    source, count = drawn_source(MINI_WORLD), training.num_rows(settings)
    rows = source.training_rows(training.stage, count, _image_seed(profile, training.stage))
    home = _image_folder(profile, training.stage)
    return Rows([
        data.about_image(name, _save(media, home, name, image), turns)
        for name, image, turns in track(rows, training.stage, count)
    ])  # fmt: skip


def _captioned(profile: Profile, chosen: CaptionSet, file: Path, media: Path) -> Rows:
    """Caption pairs of a set: a seeded sample of the images; loops and cut captions are left out, as exports do."""
    written, home = _captions(file), _image_folder(profile, chosen.images)
    total, seed = (int(part) for part in image_source(profile, chosen.images).split(":")[2:])
    count = min(rows_of(chosen, profile.pretraining), total)
    chosen_numbers = data.sample(range(total), count, profile.seed)
    examples, left_out, known = [], Counter(), []
    for number in track(chosen_numbers, chosen.slug):
        name, image, _, meta = drawn_source(MINI_WORLD).image_at(STAGE, number, None, seed)
        row = written.get(name)
        known.append((meta, row))
        if reason := _unfit(row):
            left_out[reason] += 1
            continue
        path = _save(media, home, name, image)
        examples.append(data.about_image(name, path, [(prompts.CAPTION, row["caption"])]))
    return Rows(examples, left_out=dict(left_out), captions=described(known))


def _unfit(row: Mapping[str, Any] | None) -> str | None:
    """Why a caption is not trained on, or None. row: of a caption set (see captioning.work.SetRow)."""
    from caprl_utils.captions.sets import is_sound

    if row is None or not row["caption"].strip():
        return "no caption"
    if not is_sound(row):
        return "loop" if row["looped"] else "cut"
    return "holds a mark of a medium" if data.mark_in(row["caption"]) else None


def described(known: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> dict[str, float]:
    """What the captions of rendered images are like: their length in the captioner's tokens, and how true they are.

    known: what is true of an image (see `registry.DrawnSource`) with its row. Of the images' facts the share that is
    told right; of the statements of a caption, each counted once, the share that is wrong; the shares of captions
    that were cut or loop.
    """
    there = [(meta, row) for meta, row in known if row is not None]
    told = [
        (_sentences(meta["facts"]), _sentences(meta["known"]), _statements(row["caption"]))
        for meta, row in there
    ]
    right = sum(len(facts & said) for facts, _, said in told)
    wrong = sum(len(said - facts - guessed) for facts, guessed, said in told)
    many = max(1, len(there))
    return {
        "count": len(there),
        "tokens": sum(row["num_tokens"] for _, row in there) / many,
        "told": right / max(1, sum(len(facts) for facts, _, _ in told)),
        "wrong": wrong / max(1, sum(len(said) for _, _, said in told)),
        "cut": sum(row["finish_reason"] == "length" for _, row in there) / many,
        "looped": sum(row["looped"] for _, row in there) / many,
    }


def _sentences(facts: Mapping[str, str]) -> set[str]:
    return {f"The {key} is {value}." for key, value in facts.items()}


def _statements(text: str) -> set[str]:
    """Sentences of a caption of the mini world but the one that introduces it."""
    sentences = (sentence.strip() for sentence in text.replace(". ", ".\n").split("\n"))
    return {sentence for sentence in sentences if sentence.startswith("The ")}


def _captions(file: Path) -> dict[str, dict[str, Any]]:
    """Image id -> its row of the caption set."""
    from caprl_utils.captions.sets import read_captions

    return {row["image_id"]: row for row in read_captions(file)}


def _image_folder(profile: Profile, images: str) -> str:
    """Folder of a rendered image set below the media; another seed or another renderer has another."""
    drawn_by = code_hashes(drawn_source(MINI_WORLD).recipe)
    return f"{images}-{value_hash([_image_seed(profile, images), drawn_by])[:8]}"


def _save(media: Path, images: str, name: str, image: Image) -> str:
    """Write an image once; returns its path below the media folder."""
    import io

    path = f"{images}/{name}.png"
    if not (media / path).is_file():
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        write_atomic(media / path, buffer.getvalue())
    return path
