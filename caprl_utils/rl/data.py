"""Curated questions as the data set that GRPOTrainer takes."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import paths, prompts
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed
from caprl_utils.records import Question
from caprl_utils.schema import Data, Profile

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("id", "image", "reward_model")


def data_file(profile: Profile, data: Data) -> Path:
    """Where the questions of a run lie. Raises UserError when they were not made yet."""
    file = paths.RUNS / profile.name / data.file
    if not file.is_file():
        raise UserError(
            f"no questions at {paths.shown(file)}: notebook 01_qa_curation makes them "
            f"(PROFILE={profile.name}), or put a parquet file in CapRL-QA-75K's schema there"
        )
    return file


def load_data(file: Path, data: Data, num_images: int, min_images: int = 1) -> Dataset:
    """Rows of a parquet file in CapRL-QA-75K's schema, as columns id, prompt, image and questions.

    prompt: [{"role": "user", "content": prompts.CAPTION}], to which TRL adds the image. image: decoded to PIL when
    read. questions: a list of Question rows as dictionaries. Of more than `num_images` images those with the smallest
    hash of their id are taken, so a smaller set is part of a larger one (Figure 5 right). Raises UserError for a bad
    row and when fewer than `min_images` remain.
    """
    import datasets

    cache = paths.RUNS / ".cache" / "datasets"
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(cache))
    if missing := [name for name in COLUMNS if name not in rows.column_names]:
        raise UserError(
            f"{paths.shown(file)} has no column {', '.join(missing)}; its columns: {rows.column_names}"
        )
    questions = [_questions(file, row, data) for row in rows.select_columns(["id", "reward_model"])]
    kept = _chosen(rows["id"], questions, data, num_images)
    if len(kept) < min_images:
        raise UserError(
            f"{paths.shown(file)}: {len(kept)} images of {len(rows)} remain, the run needs {min_images}; "
            "curate more images (images.num_images) or relax the experiment's section data"
        )
    ids = [rows["id"][i] for i in kept]
    chosen = rows.select(kept).select_columns(["image"]).cast_column("image", datasets.Image())
    chosen = chosen.add_column("id", ids)
    chosen = chosen.add_column("prompt", [[{"role": "user", "content": prompts.CAPTION}]] * len(kept))
    return chosen.add_column("questions", [[q.model_dump(mode="json") for q in questions[i]] for i in kept])


def _questions(file: Path, row: dict[str, Any], data: Data) -> list[Question]:
    where = f"{paths.shown(file)}, row {row['id']!r}"
    try:
        questions = [Question.from_ground_truth(q) for q in row["reward_model"]["ground_truth"]]
    except (KeyError, TypeError, ValueError) as error:
        problem = "; ".join(str(error).splitlines())
        raise UserError(
            f"{where}: reward_model.ground_truth is not in CapRL-QA-75K's schema ({problem})"
        ) from None
    if any(len(q.options) == len(prompts.LETTERS) for q in questions):
        raise UserError(f"{where}: {len(prompts.LETTERS)} options leave no letter for the extra option")
    if len(questions) < data.min_questions:
        return []
    if data.questions_per_image is None:
        return questions
    order = sorted(range(len(questions)), key=lambda i: _rank(f"{row['id']}/{questions[i].question}"))
    return [questions[i] for i in sorted(order[: data.questions_per_image])]


def _chosen(ids: list[str], questions: list[list[Question]], data: Data, num_images: int) -> list[int]:
    wanted = [
        i for i, name in enumerate(ids)
        if questions[i] and (not data.ids or any(fnmatchcase(name, pattern) for pattern in data.ids))
    ]  # fmt: skip
    limit = min(data.num_images or num_images, len(wanted))
    return sorted(sorted(wanted, key=lambda i: _rank(ids[i]))[: math.ceil(limit * data.image_share)])


def _rank(name: str) -> int:
    return derive_seed(name, bits=256)
