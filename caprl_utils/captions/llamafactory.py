"""A caption set as training data of LLaMA-Factory, with image paths below one media folder.

The rows are those that `records.Conversation` reads: {"id", "messages": [user: "<image>PROMPT", assistant: CAPTION],
"images": [path]}, in a JSONL file with its entry in dataset_info.json beside it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from caprl_utils import prompts
from caprl_utils.captions.joined import bytes_of, file_name, files_home, job_of, suffix_of, with_captions
from caprl_utils.captions.places import Place
from caprl_utils.captions.released import RELEASED_KEY, read_released
from caprl_utils.captions.sets import read_captions, schema_of
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error
from caprl_utils.paths import shown
from caprl_utils.progress import track
from caprl_utils.records import about_image, mark_in, register

EMPTY, MISSING = "the caption is empty", "no such image below the media folder"
MAX_BAD_SHARE = 0.05  # ours: more captions set aside than this is a mistake somewhere, not chance


@dataclass(frozen=True)
class Captioned:
    """One caption of an image; `image` is its path below the media folder, or absolute."""

    id: str
    image: str
    caption: str


@dataclass(frozen=True)
class Written:
    """What was written. set_aside: reason -> captions left out; media: the folder that image paths start at."""

    rows: int
    set_aside: dict[str, int]
    media: Path

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.rows} rows, image paths below {shown(self.media)} (media_dir)",
            *(f"set aside: {count}, {reason}" for reason, count in sorted(self.set_aside.items())),
        ]


def write_llamafactory(
    captions: Path,
    file: Path,
    media: Path | None = None,
    job: Path | None = None,
    prompt: str = prompts.CAPTION,
    sound_only: bool = True,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Written:
    """Write a caption set as `file` (NAME.jsonl) and its entry NAME in dataset_info.json beside it.

    media: the folder that image paths start at (`media_dir`, our `pretraining.media_folder`). Images that are
    files of a folder or list stay where they are, and must be below it (its default is that folder); others
    (parquet, tar, data sets, rendered ones) are written to `images/NAME` in it (its default is the folder of
    `file`). A set of released captions has no job: there it must be named. job: the folder with job.json, where
    it is not beside `captions`. sound_only: leave out loops and cut captions. max_bad_share: of captions that may
    be set aside (empty, with one of `pretraining.data.MARKS` in the text, the image missing) before UserError.
    Raises UserError for an image outside `media`, naming it, and when no caption is left.
    """
    file = Path(file)
    if RELEASED_KEY in (schema_of(captions).metadata or {}):
        pairs = (
            Captioned(row["id"], row["image_key"], row["caption"])
            for row in read_captions(captions, sound_only)
        )
        return _write(pairs, file, _named(media), prompt, max_bad_share)
    job = job_of(captions, job)
    home = files_home(job)
    media = Path(media or home or file.parent).resolve()
    pairs = _of_job(captions, job, home, media, file.stem, sound_only)
    return _write(pairs, file, media, prompt, max_bad_share)


def released_llamafactory(
    files: Sequence[Path],
    file: Path,
    media: Path | None,
    prompt: str = prompts.CAPTION,
    limit: int | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Written:
    """Write released JSONL files (see `released.read_released`) as `write_llamafactory` writes a caption set.

    Loops stay in, as they were released: `released.write_released` marks them, and a set of it is written without.
    """
    rows = chain.from_iterable(read_released(one, limit) for one in files)
    pairs = (Captioned(str(number), row.image, row.caption) for number, row in enumerate(rows))
    return _write(pairs, file, _named(media), prompt, max_bad_share)


def _named(media: Path | None) -> Path:
    if media is None:
        raise UserError(
            "released captions name their images by path: name the folder of the images (--media)"
        )
    if not Path(media).is_dir():
        raise UserError(f"no media folder {shown(media)}; name the folder that the image paths start at")
    return Path(media).resolve()


def _write(pairs: Iterator[Captioned], file: Path, media: Path, prompt: str, max_bad_share: float) -> Written:
    """Stream the rows to `file`, a row in memory at a time; the file appears when it is whole."""
    if found := mark_in(prompt):
        raise UserError(f"the prompt holds {found}: leave it out, it is put before the prompt here")
    file, aside, rows = Path(file), Counter[str](), 0
    temporary = file.with_name(f".{file.name}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_as_user_error(file), open(temporary, "w", encoding="utf-8") as lines:
        for pair in track(pairs, "rows"):
            path = below(media, pair.image)
            if reason := _why_not(pair.caption, media / path):
                aside[reason] += 1
                continue
            lines.write(about_image(pair.id, path, [(prompt, pair.caption)]).model_dump_json() + "\n")
            rows += 1
        lines.flush()
        os.fsync(lines.fileno())
    written = Written(rows, dict(aside), media)
    if not rows or aside.total() > max_bad_share * (rows + aside.total()):
        temporary.unlink()
        raise UserError(
            f"{shown(file)} was not written: {'; '.join(written.lines())}. More than {max_bad_share:.0%} of the "
            "captions set aside, or none left; mend the cause, or allow more (--max-bad-share)"
        )
    temporary.replace(file)
    register(file)
    return written


def below(media: Path, image: str) -> str:
    """The path of an image relative to `media`, itself resolved. Raises UserError for one outside."""
    path = Path(os.path.normpath(media / image))
    if not path.is_relative_to(media):
        raise UserError(
            f"image {image} is outside the media folder {shown(media)}; name a folder that holds all images "
            "(--media, `media=`)"
        )
    return path.relative_to(media).as_posix()


def _why_not(caption: str, image: Path) -> str | None:
    if not caption.strip():
        return EMPTY
    if found := mark_in(caption):
        return f"the caption holds {found}, which LLaMA-Factory takes for a file"
    return None if image.is_file() else MISSING


def _of_job(
    captions: Path, job: Path, home: Path | None, media: Path, name: str, sound_only: bool
) -> Iterator[Captioned]:
    for some in with_captions(captions, job, sound_only):
        here = [place for place, _ in some]
        images = (
            (str(home / place.path) for place in here)
            if home
            else _as_files(here, job, media / "images" / name)
        )
        for (_, rows), image in zip(some, images, strict=True):
            yield from (Captioned(row["id"], image, row["caption"]) for row in rows)


def _as_files(some: Sequence[Place], job: Path, folder: Path) -> Iterator[str]:
    """Write the images of a shard to `folder`, those that are not there yet; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, data in zip(some, bytes_of(some, job), strict=True):
        target = folder / (file_name(place) + suffix_of(data))
        if not target.exists():
            temporary = target.with_name(f".{target.name}.tmp")
            temporary.write_bytes(data)
            temporary.replace(target)
        yield str(target)
