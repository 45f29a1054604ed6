"""What notebook 00 shows: a folder of example images, and their captions in the gallery.

Images of a user's own folder have no questions; the example images have, so for them a reader shows which
questions could be answered from the caption.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image

from caprl_utils.captions import Caption
from caprl_utils.files import write_atomic
from caprl_utils.images import open_image
from caprl_utils.models.base import Backend
from caprl_utils.prism import gallery, prism, prism_scores
from caprl_utils.prism.loaders import Sample
from caprl_utils.prism.prism_answers import ReaderMode, answer_all
from caprl_utils.runs import RowStore
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    import pandas as pd


def write_examples(profile: Profile, folder: Path, num_images: int) -> list[Sample]:
    """Write some images of the profile's benchmarks as PNG files; returns the questions about them.

    A question's `meta["file"]` is the name of its image in the folder.
    """
    samples: list[Sample] = []
    files: dict[str, str] = {}
    by_benchmark = [prism.load_samples(profile, [name]) for name in profile.prism.benchmarks]
    for sample in (sample for row in zip(*by_benchmark, strict=False) for sample in row):  # all kinds in turn
        image_id = prism.image_ids(sample)[0]
        if image_id not in files:
            if len(files) == num_images:
                continue
            files[image_id] = f"{sample.benchmark}/{image_id.rpartition('/')[2]}.png"
            _save(sample.images[0](), folder / files[image_id])
        samples.append(sample)
    return [
        Sample(s.id, s.benchmark, s.images, s.question, s.gold, s.options,
               {**s.meta, "file": files[prism.image_ids(s)[0]]})
        for s in samples
    ]  # fmt: skip


def gallery_items(
    captions: pd.DataFrame,
    folder: Path,
    label: str,
    samples: Sequence[Sample] = (),
    reader: Backend | None = None,
    reader_mode: ReaderMode = "choice",
) -> list[dict[str, Any]]:
    """Items for `gallery.write` and `gallery.cards`: one per captioned image, in the order of the captions.

    captions: rows of the captioning module (`captioning.work.SetRow`). label: what the captioner is called.
    samples: questions about some of the images (see `write_examples`); `reader` answers them from the captions
    alone.
    """
    texts: dict[str, list[str]] = {}
    for row in captions.sort_values(["image_id", "index"], kind="stable").itertuples():
        texts.setdefault(row.image_id, []).append(row.caption)
    asked = [sample for sample in samples if sample.meta["file"] in texts]
    rows = _read(asked, texts, reader, reader_mode) if asked and reader is not None else []
    items = {item["id"]: item for item in gallery.collect_rows(asked, {label: rows})}
    ids = {sample.meta["file"]: prism.image_ids(sample)[0] for sample in asked}
    shown = []
    for name, found in texts.items():
        item = (
            items[ids[name]]
            if name in ids
            else gallery.item_without_questions(name, partial(_open, folder / name))
        )
        shown.append(item | {"id": name, "captions": {label: found}})
    return shown


def _save(image: Image.Image, path: Path) -> None:
    """Write a PNG; one that is there already keeps its time, by which captioning knows its images."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    if not path.is_file() or path.read_bytes() != buffer.getvalue():
        write_atomic(path, buffer.getvalue())


def _open(path: Path) -> Image.Image:
    return open_image(path.read_bytes())


def _read(
    samples: Sequence[Sample], texts: Mapping[str, list[str]], reader: Backend, reader_mode: ReaderMode
) -> list[dict[str, Any]]:
    """Stages 2 and 3 of Prism for the example images: a row per question and caption, kept nowhere."""
    captions = {
        prism.image_ids(sample)[0]: [
            Caption(id=f"{sample.id}#{i}", image_id=sample.meta["file"], index=i, text=text, num_tokens=None,
                    finish_reason="stop", model="", model_hash="")
            for i, text in enumerate(texts[sample.meta["file"]])
        ]
        for sample in samples
    }  # fmt: skip
    tasks = prism.make_tasks(samples, captions, looks=False)
    with TemporaryDirectory() as folder, RowStore(Path(folder) / "answers.jsonl") as store:
        answers = answer_all(tasks, reader, reader_mode, store, seed=0)
    return prism_scores.score_rows(tasks, answers, prism.caption_facts(tasks, captions), "standard")
