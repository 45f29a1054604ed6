"""Model cards and data cards of what the pipeline made, in Hugging Face's format (card.md.jinja), from run records.

A card stands beside what it describes, not inside: a model's folder is part of the key of every run that uses it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.reports import numbers
from caprl_utils.reports.items import about_models
from caprl_utils.reports.results import title_of
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

PAPER = "CapRL, arXiv [2509.22647](https://arxiv.org/abs/2509.22647)"
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_all(profile: Profile) -> list[Path]:
    """Write the card of every finished model and data set of a profile; returns their files."""
    home = paths.RUNS / profile.name

    def runs(stage: str) -> list[Path]:
        files = sorted((home / stage).glob("*/result.json"))
        return [file.parent for file in files if not file.parent.name.startswith(".")]

    cards = {folder / "README.md": qa_card(profile, folder) for folder in runs("curation")}
    models = [*runs("rl"), *(run for run in runs("pretraining") if (run / "final").is_dir())]
    cards |= {folder / "README.md": model_card(profile, folder) for folder in models}
    sets = sorted([*home.glob("pretraining/captions/*.parquet"), *home.glob("quickstart/*.parquet")])
    cards |= {file.with_suffix(".md"): captions_card(profile, file) for file in sets}
    for file, text in cards.items():
        write_atomic(file, text)
    return list(cards)


def ask_hub(action: str, repository: str, **arguments: Any) -> Any:
    """Have the client of the hub do something with a repository. Raises UserError when the hub refuses or cannot be
    reached.
    """
    from huggingface_hub import HfApi

    try:
        return getattr(HfApi(), action)(repo_id=repository, **arguments)
    except Exception as error:  # no login, no right, no network, no such name: the client has a class for each
        told = f"the hub's {action} for {repository} failed: {error}"
        raise UserError(f"{told}\nLog in by `hf auth login`, or set HF_TOKEN to a token that may write.") from None


def push(profile: Profile, run: str, repository: str) -> str:
    """Upload a finished captioner, runs/<profile>/rl/<run>/final, with its card; returns the commit's address."""
    folder, message = paths.RUNS / profile.name / "rl" / run, f"{profile.name} {run}"
    card = {"path_or_fileobj": model_card(profile, folder).encode(), "path_in_repo": "README.md"}
    ask_hub("upload_folder", repository, folder_path=folder / "final", commit_message=message)
    return str(ask_hub("upload_file", repository, **card, commit_message=message))


def qa_card(profile: Profile, folder: Path) -> str:
    """Of curated questions. folder: runs/<profile>/curation/<run>."""
    record = load_result(folder)
    tasks, tags = ["visual-question-answering", "image-to-text"], ["caprl", "reinforcement-learning"]
    facts = {"record": record, "values": record["values"], "path": numbers.record_path(folder)}
    return _card(profile, "questions", "Questions on images", tags, facts, "qa.parquet", task_categories=tasks)


def captions_card(profile: Profile, file: Path) -> str:
    """Of a set of captions. file: the parquet that `caprl caption` wrote."""
    import pyarrow.parquet as pq

    columns = ["image_id", "num_tokens", "finish_reason", "looped", "model", "model_hash"]
    rows = pq.read_table(file, columns=columns).to_pylist()
    tokens, models = [row["num_tokens"] for row in rows], {(row["model"], row["model_hash"]) for row in rows}
    inside = {  # folders of this repository are named alike on every machine
        model: numbers.record_path(Path(model)) for model, _ in models
        if any(Path(model).is_relative_to(folder) for folder in (paths.RUNS, paths.ROOT))
    }  # fmt: skip
    facts = {
        "record": None, "captions": len(rows), "images": len({row["image_id"] for row in rows}),
        "models": sorted({f"`{inside.get(model, model)}` ({found})" for model, found in models}),
        "tokens": numbers.number(sum(tokens) / len(tokens) if tokens else None), "path": numbers.record_path(file),
        "reasons": Counter("a loop" if row["looped"] else row["finish_reason"] for row in rows),
    }  # fmt: skip
    title, tasks = f"Captions {file.stem}", ["image-to-text"]
    return _card(profile, "captions", title, ["caprl"], facts, file.name, task_categories=tasks)


def model_card(profile: Profile, folder: Path) -> str:
    """Of a trained captioner (runs/<profile>/rl/<run>) or a VLM pretrained on captions (.../pretraining/<run>)."""
    from huggingface_hub import EvalResult

    record = load_result(folder)
    if folder.parent.name == "rl":
        kind, title, start, stage = "captioner", "Captioner", profile.models.policy.path, "prism"
        task, tags = "image-to-text", ["image-captioning", "grpo", "trl", "caprl"]
    else:
        kind, title, start, stage = "vlm", "Vision-language model", record["start"], "vqa"
        task, tags = "image-text-to-text", ["llama-factory", "caprl"]
    evaluation = paths.RUNS / profile.name / stage / folder.name
    found = load_result(evaluation) if (evaluation / "result.json").is_file() else {"values": {"benchmarks": {}}}
    means = {key: part["mean"] for key, part in found["values"]["benchmarks"].items() if part["mean"] is not None}
    results = [EvalResult(task, key, title_of(key), "accuracy", round(100 * mean, 2)) for key, mean in means.items()]
    local = start.startswith((paths.ZOO_PREFIX, "/", ".")) or Path(start).exists()
    scores = [
        (title_of(key), f"{text} {numbers.interval(found['intervals'].get(key))}", found["n"][key])
        for key, text in zip(means, numbers.percents([*means.values()]), strict=True)
    ]
    facts = {"record": record, "values": record["values"], "start": start, "scores": scores}
    return _card(
        profile, kind, f"{title} {folder.name}", tags, facts | {"path": numbers.record_path(folder)},
        model_name=f"{profile.name}-{folder.name}", library_name="transformers", pipeline_tag=task,
        eval_results=results or None, base_model=start if start.count("/") == 1 and not local else None,
    )  # fmt: skip


def _card(
    profile: Profile, kind: str, title: str, tags: list[str], facts: dict[str, Any], file: str = "", **data: Any
) -> str:  # fmt: skip
    """A card from its template. file: of a data set. data: further entries of its head, which the hub reads."""
    from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

    about, card, head = about_models(profile), ModelCard, ModelCardData
    if file:
        card, head, data["pretty_name"] = DatasetCard, DatasetCardData, f"{title}, profile {profile.name}"
        data["configs"] = [{"config_name": "default", "data_files": file}]
    facts |= {"paper": PAPER, "count": numbers.count, "profile": profile, "about": about, "kind": kind, "title": title}
    read = head(license=about["licence"], language="en", tags=tags, **data)
    return str(card.from_template(read, template_path=str(TEMPLATE), **facts))
