"""The authors' CapRL-Evaluation-Files, and folders of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import Benchmark
from caprl_utils.prism.loaders.images import inside, open_image
from caprl_utils.prism.loaders.sample import Loaded, Rejected, Sample

EVALUATION_FILES = "internlm/CapRL-Evaluation-Files"
VISION_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
USER_START = f"<|im_start|>user\n{VISION_SLOT}"
_TURN_END = "<|im_end|>"


def load_caprl_file(facts: Benchmark, path: Path, root: Path | None = None) -> Loaded:
    """Samples from one JSON (or JSONL) file of the authors' evaluation collection.

    Each record has `prompt` (chat-template text with one vision slot), `answer`, and `image` (chat
    messages whose image entries are paths under the collection's root). The question is the text after
    the slot; a prompt without the exact slot is set aside, because the caption would never enter it (Q27).

    Args:
        path: the JSON file; or the collection's folder, then json_file/<the benchmark's file> is taken.
        root: folder of the images; by default the folder that holds json_file/, else the file's own.
    """
    if facts.caprl is None or facts.caprl.file is None:
        raise UserError(f"{facts.name} has no file in {EVALUATION_FILES}")
    file = path / "json_file" / facts.caprl.file if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no file {file}. Needed: {facts.caprl.file} and bench_image_folder.zip of {EVALUATION_FILES} "
            f"(revision: give a commit; size unknown; licence apache-2.0, each benchmark keeps its own). "
            f"Get them: `hf download {EVALUATION_FILES} --repo-type dataset --local-dir DIR`, unzip the "
            "images in DIR and pass path=DIR"
        )
    if root is None:
        root = file.parent.parent if file.parent.name == "json_file" else file.parent
    samples, rejected = [], []
    for number, record in enumerate(_records(file)):
        where = f"{file}, record {number}"
        try:
            samples.append(_caprl_sample(facts, record, number, root, where))
        except UserError as error:
            rejected.append(Rejected(where, str(error).removeprefix(f"{where}: ")))
    return Loaded(
        facts.key, tuple(samples), tuple(rejected), {"path": str(file), "collection": EVALUATION_FILES}
    )


def _caprl_sample(facts: Benchmark, record: Any, number: int, root: Path, where: str) -> Sample:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record must be an object with prompt, answer and image")
    if missing := [key for key in ("prompt", "answer", "image") if key not in record]:
        raise UserError(f"{where}: the record lacks {', '.join(missing)}; it has {', '.join(record)}")
    prompt = record["prompt"]
    if not isinstance(prompt, str) or prompt.count(USER_START) != 1:
        raise UserError(
            f"{where}: the prompt lacks the exact vision slot, so no caption would enter it (Q27)"
        )
    if not isinstance(record["answer"], (str, int, float, list)):
        raise UserError(f"{where}: unknown answer type {type(record['answer']).__name__}")
    paths = [inside(root, name, where) for name in _image_names(record["image"], where)]
    question = prompt.split(USER_START, 1)[1].split(_TURN_END, 1)[0].strip()
    images: tuple[Callable[[], Any], ...] = tuple(partial(open_image, file, where) for file in paths)
    names = [str(file.relative_to(root.resolve())) for file in paths]
    meta = {"prompt": prompt, "image_id": "+".join(names), "num_images": len(images)}
    gold = record["answer"] if isinstance(record["answer"], list) else str(record["answer"])
    return Sample(str(record.get("id", number)), facts.key, images, question, gold, (), meta)


def _image_names(value: Any, where: str) -> list[str]:
    """Image paths in chat messages, or a path, or a list of paths."""
    names: list[str] = []

    def collect(item: Any) -> None:
        if isinstance(item, str):
            names.append(item)
        elif isinstance(item, list):
            for part in item:
                collect(part)
        elif isinstance(item, dict) and "content" in item:
            for part in item["content"] if isinstance(item["content"], list) else []:
                if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                    collect(part.get("image") or part.get("image_url"))
        elif isinstance(item, dict) and "image" in item:
            collect(item["image"])

    collect(value)
    if not names:
        raise UserError(f"{where}: no image path in the record's image entry")
    return names


def _records(file: Path) -> Iterator[Any]:
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
            return
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, list):
        raise UserError(f"{file} must hold a list of records, it holds {type(data).__name__}")
    yield from data


def load_folder(facts: Benchmark, folder: Path, name: str = "samples.jsonl") -> Loaded:
    """Samples of one's own: `samples.jsonl` beside its images.

    One object a line: question, gold, image (a path under the folder) or images (a list), and optionally
    id, options (a list), meta (an object, e.g. year or question_type for the metric).
    """
    file = folder / name
    if not file.is_file():
        raise UserError(f"no {file}: write one JSON object a line with question, gold and image")
    samples, rejected = [], []
    for number, record in enumerate(_records(file)):
        where = f"{file}, line {number + 1}"
        try:
            samples.append(_own_sample(facts, record, number, folder, where))
        except UserError as error:
            rejected.append(Rejected(where, str(error).removeprefix(f"{where}: ")))
    return Loaded(facts.key, tuple(samples), tuple(rejected), {"path": str(file)})


def _own_sample(facts: Benchmark, record: Any, number: int, folder: Path, where: str) -> Sample:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a line must be a JSON object")
    known = {"id", "question", "gold", "image", "images", "options", "meta"}
    if unknown := sorted(set(record) - known):
        raise UserError(f"{where}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if missing := [key for key in ("question", "gold") if record.get(key) in (None, "")]:
        raise UserError(f"{where}: {', '.join(missing)} is missing")
    gold = record["gold"]
    if not isinstance(gold, (str, list)):
        raise UserError(
            f"{where}: unknown answer type {type(gold).__name__}: gold is a text or a list of texts"
        )
    names = record.get("images") or ([record["image"]] if record.get("image") else [])
    if not names:
        raise UserError(f"{where}: no image")
    paths = [inside(folder, str(name), where) for name in names]
    images: tuple[Callable[[], Any], ...] = tuple(partial(open_image, path, where) for path in paths)
    meta = {"image_id": "+".join(str(name) for name in names), **(record.get("meta") or {})}
    options = tuple(str(option) for option in record.get("options") or ())
    return Sample(str(record.get("id", number)), facts.key, images, record["question"], gold, options, meta)
