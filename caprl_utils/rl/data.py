"""Curated questions as the data set that GRPOTrainer takes, and the one way to open its pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from caprl_utils import paths, prompts
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed
from caprl_utils.images import BadImage, BadImageError, ImageItem, in_threads
from caprl_utils.records import Question
from caprl_utils.rl.readers import askable
from caprl_utils.schema import Data, Profile

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

log = logging.getLogger(__name__)
COLUMNS = ["id", "image", "reward_model"]
Refusal = Callable[["Image"], str | None]  # why the model cannot take a picture; None when it can
_rank = partial(derive_seed, bits=256)


class TrainingSet(NamedTuple):
    """What a run trains on: its rows, how their pictures are opened, and the rows set aside with their reasons."""

    rows: Dataset
    pictures: Callable[[dict[str, Any] | None], Image]
    set_aside: dict[str, str]


def data_file(profile: Profile, data: Data) -> Path:
    """Where the questions of a run lie. Raises UserError when they were not made yet."""
    file = paths.RUNS / profile.name / data.file
    if not file.is_file():
        raise UserError(
            f"no questions at {paths.shown(file)}: notebook 01_qa_curation makes them "
            f"(PROFILE={profile.name}), or put a parquet file in CapRL-QA-75K's schema there"
        )
    return file


def load_data(
    file: Path, data: Data, num_images: int, min_images: int = 1, max_pixels: int | None = None,
    refusal: Refusal | None = None,
) -> TrainingSet:  # fmt: skip
    """Rows of a parquet file in CapRL-QA-75K's schema, as columns id, prompt (TRL adds the image), image ({bytes,
    path}) and questions (Question rows as dictionaries). Of more than `num_images` images those with the smallest hash
    of their id are taken, so a smaller set is part of a larger one (Figure 5 right). A bad row is set aside: no
    questions that can be read and, with `refusal`, a picture that cannot be opened or taken. Raises UserError when
    fewer than `min_images` remain.
    """
    import datasets

    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(paths.RUNS / ".cache" / "datasets"))
    if missing := [name for name in COLUMNS if name not in rows.column_names]:
        raise UserError(f"{paths.shown(file)} has no column {', '.join(missing)}; its columns: {rows.column_names}")
    rows = rows.select_columns(COLUMNS).cast_column("image", datasets.Image(decode=False))
    ids, bad, pictures = [str(name) for name in rows["id"]], {}, partial(_picture, file.parent, max_pixels)
    questions = [_questions(ids[i], cell, data, bad) for i, cell in enumerate(rows["reward_model"])]
    patterns = data.ids or ["*"]
    wanted = [i for i, name in enumerate(ids) if questions[i] and any(fnmatchcase(name, p) for p in patterns)]
    limit = min(data.num_images or num_images, len(wanted))
    kept = sorted(sorted(wanted, key=lambda i: _rank(ids[i]))[: math.ceil(limit * data.image_share)])

    def why_not(i: int) -> str | None:
        try:
            return refusal(pictures(rows[i]["image"]))
        except BadImageError as error:
            return str(error)

    if refusal is not None:
        refused = {i: reason for i, reason in zip(kept, in_threads(why_not, kept), strict=True) if reason}
        bad |= {ids[i]: reason for i, reason in refused.items()}
        kept = [i for i in kept if i not in refused]
    told = "; ".join(f"{name}: {reason}" for name, reason in list(bad.items())[:5])
    if bad:
        log.warning("%d of %d rows of %s are set aside: %s", len(bad), len(rows), paths.shown(file), told)
    if len(kept) < min_images:
        raise UserError(
            f"{paths.shown(file)}: {len(kept)} images of {len(rows)} remain, the run needs {min_images}; "
            "curate more images (images.num_images) or relax the experiment's section data"
            + (f". {len(bad)} rows are bad: {told}" if bad else "")
        )
    chosen = rows.select(kept).select_columns(["image"]).add_column("id", [ids[i] for i in kept])
    chosen = chosen.add_column("prompt", [[{"role": "user", "content": prompts.CAPTION}]] * len(kept))
    asked = [[q.model_dump(mode="json") for q in questions[i]] for i in kept]
    return TrainingSet(chosen.add_column("questions", asked), pictures, bad)


def _questions(name: str, cell: dict[str, Any] | None, data: Data, bad: dict[str, str]) -> list[Question]:
    """The questions that a run takes of a row; none, with a reason in `bad`, when they cannot be read."""
    try:
        questions = askable(cell["ground_truth"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        problem = "; ".join(str(error).splitlines())
        bad[name] = f"reward_model.ground_truth is not in CapRL-QA-75K's schema ({problem})"
        return []
    if len(questions) < data.min_questions:
        return []
    order = sorted(range(len(questions)), key=lambda i: _rank(f"{name}/{questions[i].question}"))
    return [questions[i] for i in sorted(order[: data.questions_per_image])]


def _picture(folder: Path, max_pixels: int | None, image: dict[str, Any] | None) -> Image:
    """RGB pixels of a cell {bytes, path}, scaled down to `max_pixels`: one limit for the trainer, vLLM and a judge. A
    row without bytes names a picture below its file's folder. Raises BadImageError.
    """
    data, name = ((image or {}).get(key) for key in ("bytes", "path"))
    if not data and name:
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise BadImageError(BadImage.OUTSIDE)
        try:
            data = target.read_bytes()
        except OSError:
            raise BadImageError(BadImage.UNREADABLE, name) from None
    return ImageItem("", lambda: data or b"").open(max_pixels)
