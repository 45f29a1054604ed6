"""The authors' own evaluation files (internlm/CapRL-Evaluation-Files): rows, prompts, SEED's 2,000 questions.

Each record of json_file/NAME.json has `prompt` (chat-template text with one vision slot), `answer`, and `image` (chat
messages whose image entries are paths below the collection). The caption takes the slot's place, so a prompt without
the exact slot is set aside: the caption would never enter it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.files import text_lines
from caprl_utils.prism.benchmarks import Benchmark, load_registry
from caprl_utils.prism.tables import StoredImage, inside
from caprl_utils.records import Sample
from caprl_utils.schema import PRISM_BENCHMARKS

COLLECTION = "internlm/CapRL-Evaluation-Files"
OWN_PROMPT = "own_prompt"  # in a sample's meta: its question holds its own instruction
_SLOT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
_TURN_END = "<|im_end|>"
Read = tuple[list[Sample], dict[str, str], Mapping[str, Any]]  # samples, why others cannot be used, what was read


def protocol(collection: Path) -> list[str]:
    """The settings of the authors' evaluation of all benchmarks whose files are there (author script): their rows and
    prompts, 4 captions an image at temperature 1.0, one sampled answer to each, their scorer.
    """
    files = {b.key: b.caprl.file for b in load_registry().values() if b.caprl and b.caprl.file}
    there = [key for key, file in files.items() if (collection / "json_file" / file).is_file()]
    return [
        "prompts=authors", "prism.scoring=caprl", f"prism.evaluation_files={collection.absolute()}",
        f"prism.benchmarks=[{', '.join(there or PRISM_BENCHMARKS)}]", "prism.num_samples=null",
        "prism.captions_per_image=4", "prism.caption_temperature=1.0", "prism.caption_max_tokens=2048",
    ]  # fmt: skip


def authors_samples(facts: Benchmark, place: Path | None) -> Read:
    """Samples of a benchmark's file. place: the collection's folder, or the file itself. Raises UserError where there
    is no such file.
    """
    if facts.caprl is None or facts.caprl.file is None:
        raise UserError(f"{facts.name} has no file in {COLLECTION}")
    file = place / "json_file" / facts.caprl.file if place and place.is_dir() else place
    if file is None or not file.is_file():
        raise UserError(
            f"no file {file or facts.caprl.file}. Needed for {facts.name}: {facts.caprl.file} and "
            f"bench_image_folder.zip of {COLLECTION}. Get them: `hf download {COLLECTION} --repo-type dataset "
            f"--local-dir DIR`, unzip the images in DIR, then set prism.evaluation_files=DIR"
        )
    root = file.parent.parent if file.parent.name == "json_file" else file.parent
    samples, bad = [], {}
    for number, record in enumerate(_records(file)):
        try:
            samples.append(_sample(facts, record, number, root, f"{file}, record {number}"))
        except UserError as error:
            bad[f"record {number}"] = str(error)
    return samples, bad, {"path": str(file), "collection": COLLECTION}


def _records(file: Path) -> Iterator[Any]:
    try:
        if file.suffix == ".jsonl":
            yield from (json.loads(line) for _, line in text_lines(file))
            return
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, list):
        raise UserError(f"{file} must hold a list of records, it holds {type(data).__name__}")
    yield from data


def _sample(facts: Benchmark, record: Any, number: int, root: Path, where: str) -> Sample:
    if not isinstance(record, dict) or not {"prompt", "answer", "image"} <= record.keys():
        raise UserError("a record is an object with prompt, answer and image")
    prompt, gold = record["prompt"], record["answer"]
    if not isinstance(prompt, str) or prompt.count(_SLOT) != 1:
        raise UserError("the prompt lacks the exact vision slot, so no caption would enter it")
    if not isinstance(gold, (str, int, float, list)) or isinstance(gold, bool) or gold in ("", []):
        raise UserError(f"the answer is {gold!r}, a text, a number or a list is needed")
    names = _image_names(record["image"])
    if not names:
        raise UserError("no image path in the record's image entry")
    images = tuple(StoredImage(inside(root, name, where).read_bytes, f"{where}, {name}") for name in names)
    return Sample(
        id=str(record.get("id", number)), benchmark=facts.key, images=images,
        question=prompt.split(_SLOT, 1)[1].split(_TURN_END, 1)[0].rstrip(),
        gold=gold if isinstance(gold, list) else str(gold), meta={"image_id": "+".join(names), OWN_PROMPT: True},
    )  # fmt: skip


def _image_names(value: Any) -> list[str]:
    """Image paths in chat messages, a path, or a list of paths."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [name for part in value for name in _image_names(part)]
    if isinstance(value, dict):
        inner = value.get("content") if isinstance(value.get("content"), list) else None
        return _image_names([inner, *(value.get(key) for key in ("image", "image_url", "url"))])
    return []
