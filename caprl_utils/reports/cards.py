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


class Hub:
    """A model repository of the hub, private when it is new. Opened before a long training, so that a missing login or
    right shows at once. Raises UserError when the hub refuses or cannot be reached.
    """

    def __init__(self, repository: str):
        from huggingface_hub import HfApi

        self.repository, self.api = repository, HfApi()
        self._ask("create_repo", private=True, exist_ok=True)

    def push(self, profile: Profile, run: str) -> str:
        """Upload a finished captioner, runs/<profile>/rl/<run>/final, with its card; returns the commit's address."""
        folder, message = paths.RUNS / profile.name / "rl" / run, f"{profile.name} {run}"
        card = model_card(profile, folder).encode()
        self._ask("upload_folder", folder_path=folder / "final", commit_message=message)
        return str(self._ask("upload_file", path_or_fileobj=card, path_in_repo="README.md", commit_message=message))

    def _ask(self, action: str, **arguments: Any) -> Any:
        try:
            return getattr(self.api, action)(repo_id=self.repository, **arguments)
        except Exception as error:  # no login, no right, no network, no such name: the client has a class for each
            told = f"the hub's {action} for {self.repository} failed: {error}"
            raise UserError(f"{told}\nLog in by `hf auth login`, or set HF_TOKEN to a token that may write.") from None


def qa_card(profile: Profile, folder: Path) -> str:
    """Of curated questions. folder: runs/<profile>/curation/<run>."""
    record = load_result(folder)
    about = ["visual-question-answering", "image-to-text"], ["caprl", "reinforcement-learning"]
    facts = {"record": record, "values": record["values"], "path": numbers.record_path(folder)}
    return _data_card(profile, "questions", "Questions on images", "qa.parquet", *about, **facts)


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
    return _data_card(
        profile, "captions", f"Captions {file.stem}", file.name, ["image-to-text"], ["caprl"], record=None,
        captions=len(rows), images=len({row["image_id"] for row in rows}), path=numbers.record_path(file),
        models=sorted({f"`{inside.get(model, model)}` ({found})" for model, found in models}),
        tokens=numbers.number(sum(tokens) / len(tokens) if tokens else None),
        reasons=Counter("a loop" if row["looped"] else row["finish_reason"] for row in rows),
    )  # fmt: skip


def model_card(profile: Profile, folder: Path) -> str:
    """Of a trained captioner (runs/<profile>/rl/<run>) or a VLM pretrained on captions (.../pretraining/<run>)."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

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
    data = ModelCardData(
        license=about_models(profile)["licence"], language="en", library_name="transformers", pipeline_tag=task,
        tags=tags, model_name=f"{profile.name}-{folder.name}", eval_results=results or None,
        base_model=start if start.count("/") == 1 and not local else None,
    )  # fmt: skip
    scores = [
        (title_of(key), f"{text} {numbers.interval(found['intervals'].get(key))}", found["n"][key])
        for key, text in zip(means, numbers.percents([*means.values()]), strict=True)
    ]
    facts = {"record": record, "values": record["values"], "start": start, "scores": scores, "kind": kind}
    path = numbers.record_path(folder)
    return _fill(ModelCard, data, profile, title=f"{title} {folder.name}", path=path, **facts)


def _data_card(
    profile: Profile, kind: str, title: str, file: str, tasks: list[str], tags: list[str], **facts: Any
) -> str:  # fmt: skip
    from huggingface_hub import DatasetCard, DatasetCardData

    data = DatasetCardData(
        license=about_models(profile)["licence"], language="en", task_categories=tasks, tags=tags,
        pretty_name=f"{title}, profile {profile.name}", configs=[{"config_name": "default", "data_files": file}],
    )  # fmt: skip
    return _fill(DatasetCard, data, profile, kind=kind, title=title, **facts)


def _fill(card: Any, data: Any, profile: Profile, **facts: Any) -> str:
    more = {"paper": PAPER, "count": numbers.count, "profile": profile, "about": about_models(profile)}
    return str(card.from_template(data, template_path=str(TEMPLATE), **more, **facts))
