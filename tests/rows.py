"""Rows of every benchmark in the columns of its data set, and local copies made of them."""

import base64
import io
import json
from pathlib import Path

from PIL import Image

from caprl_utils.prism.benchmarks import get_benchmark


def png(colour=(200, 10, 10), size=(6, 4)):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def picture(colour=(200, 10, 10)):
    return {"bytes": png(colour), "path": None}


P, OTHER = picture(), picture((0, 0, 255))
CELLS = {"<image>": P, "<other image>": OTHER, "<bytes>": png(), "<base64>": base64.b64encode(png()).decode()}


def swapped(value, swap):
    """A cell with each of its values as `swap` makes it, also inside lists and objects."""
    if isinstance(value, list):
        return [swapped(item, swap) for item in value]
    if isinstance(value, dict):
        return {key: swapped(item, swap) for key, item in value.items()}
    return swap(value)


def read_layouts():
    """Benchmark -> (rows with the columns of the hub layout, image columns, first question, its options and gold)."""
    file = Path(__file__).parent / "data" / "benchmark-rows.jsonl"
    for one in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        rows = swapped(one["rows"], lambda value: CELLS.get(value, value))
        yield (one["benchmark"], (rows, one["image_columns"], (one["question"], tuple(one["options"]), one["gold"])))


LAYOUTS = dict(read_layouts())


def write(folder, rows, image_columns, parquet=False):
    """A saved dataset (quick to open) or a parquet file with Image features, as the hub serves them."""
    from datasets import Dataset, List
    from datasets import Image as ImageFeature

    data = Dataset.from_list(rows)
    for column in image_columns:
        feature = List(ImageFeature()) if isinstance(column, list) else ImageFeature()
        data = data.cast_column(column[0] if isinstance(column, list) else column, feature)
    if not parquet:
        data.save_to_disk(folder)
        return folder
    folder.mkdir(parents=True)
    data.to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def write_visulogic(folder):
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "0.png").write_bytes(png())
    row = {"image_path": "images/0.png", "question": "Next?", "label": "C", "id": "0", "tag": "x"}
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def write_gqa(folder, images):
    facts = get_benchmark("gqa").hub
    row = {"id": "q1", "imageId": "n1", "question": "Dog?", "answer": "yes", "fullAnswer": "Yes."}
    write(folder / facts.config, [row], [])
    write(folder / facts.images_config, [{"id": n, "image": image} for n, image in images.items()], ["image"])
    return folder


def captionqa_row(identity):
    asked = (
        ("Colour?", ["red", "blue", "green"], "blue"), ("Is it day?", ["yes", "no"], "yes"), ("Broken?", ["x"], "x"),
    )  # fmt: skip
    keys = ("question", "choices", "answer", "category")
    questions = [dict(zip(keys, (*one, ["a"]), strict=True)) for one in asked]
    return {"id": identity, "images": [P], "questions": questions}


SLOT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"


def collection(folder, records, name="lmm_eval_seed2k.json"):
    for number, record in enumerate(records):
        file = folder / "bench_image_folder" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png())
        path = f"bench_image_folder/{number}.png"
        record.setdefault("image", [{"role": "user", "content": [{"type": "image", "image": path}]}])
        record.setdefault("prompt", f"{SLOT}Where?\nA. in\nB. on<|im_end|>\n<|im_start|>assistant\n")
    (folder / "json_file").mkdir(parents=True)
    (folder / "json_file" / name).write_text(json.dumps(records), encoding="utf-8-sig")
    return folder


def copies(folder, count):
    """Benchmark -> a local copy with so many rows like the first, each with its own ids and image."""
    found = {}
    for key, (rows, image_columns, _) in LAYOUTS.items():
        numbered = [renamed(row, n) for n in range(count) for row in rows]
        found[key] = write(folder / key, numbered, image_columns)
    found["visulogic"] = write_visulogic(folder / "visulogic")
    found["gqa"] = write_gqa(folder / "gqa", {"n1": P})
    entries = [captionqa_row(f"nat_{n}") for n in range(count)]
    found["captionqa"] = write(folder / "captionqa", entries, [["images"]])
    found["seed2k"] = collection(folder / "files", [{"answer": "B"} for _ in range(count)])
    for number in range(count):  # different pictures: a placebo needs another one
        (found["seed2k"] / "bench_image_folder" / f"{number}.png").write_bytes(png((200, number, 10)))
    return {key: str(path) for key, path in found.items()}


IDS = (
    "id", "questionId", "question_id", "pid", "index", "sample_index", "problem_index", "figure_path", "image_url",
    "ucsf_document_id", "ID",
)  # fmt: skip


def renamed(row, number):
    fresh = {P["bytes"]: png((number * 20 + 5, 90, 10))}
    there = {name: row[name] for name in IDS if name in row}
    ids = {name: old + number if isinstance(old, int) else f"{old}{number}" for name, old in there.items()}
    return swapped(row, lambda value: fresh.get(value, value) if isinstance(value, bytes) else value) | ids
