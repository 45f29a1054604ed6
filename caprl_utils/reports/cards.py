"""Model cards and data cards of what the pipeline made, in Hugging Face's format, from the run records alone.

    python -m caprl_utils.reports.cards --profile mini

A card stands beside what it describes, not inside: a model's folder is part of the key of every run that uses it. Copy
it in as README.md when you upload one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import command_line
from caprl_utils.files import write_atomic
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.statistics import AVERAGE
from caprl_utils.reports import numbers
from caprl_utils.reports.commands import profile_of
from caprl_utils.reports.tables import record_path
from caprl_utils.runs import load_result
from caprl_utils.schema import ModelConfig, Profile

PAPER = "CapRL, arXiv [2509.22647](https://arxiv.org/abs/2509.22647)"
MINI_LIMITS = (
    "It was made in a rendered world (charts, infographics, documents, scenes and figures of a few hundred words) to "
    "try the method on two CPU cores, and knows nothing else. Its scores say nothing about the paper's models."
)
MINI_DATA = (
    "It comes from a rendered world (charts, infographics, documents, scenes, figures), to try the method."
)
REAL_DATA = "The licences of the images are their sources' own."
REAL_LIMITS = (
    "It was not tested beyond the scores below. Captions may state what an image does not show; do not rely on them "
    "where a mistake does harm. The licences of the base model and of the training images apply as well."
)


def write_all(profile: Profile) -> list[Path]:
    """Write the card of every finished model and data set of a profile; returns their files."""
    written = []
    for target, card, source in _finished(profile):
        write_atomic(target, card(profile, source))
        written.append(target)
    return written


def _finished(profile: Profile) -> Iterator[tuple[Path, Callable[[Profile, Path], str], Path]]:
    """(file of the card, what writes it, what it describes)."""
    home = paths.RUNS / profile.name
    for folder in _runs(home / "curation"):
        yield folder / "README.md", qa_card, folder
    for folder in _runs(home / "rl"):
        yield folder / "README.md", captioner_card, folder
    for folder in _runs(home / "pretraining"):
        if (folder / "final").is_dir():
            yield folder / "README.md", vlm_card, folder
    for file in sorted([*home.glob("pretraining/captions/*.parquet"), *home.glob("quickstart/*.parquet")]):
        yield file.with_suffix(".md"), captions_card, file


def _runs(stage: Path) -> list[Path]:
    return sorted(file.parent for file in stage.glob("*/result.json") if not file.parent.name.startswith("."))


def captioner_card(profile: Profile, folder: Path) -> str:
    """Of a captioner trained by reinforcement learning. folder: runs/<profile>/rl/<run>."""
    record, base = load_result(folder), profile.models.policy
    experiment, values = record["experiment"], record["values"]
    scores = _scores(profile, "prism", folder.name)
    reward = experiment["reward"]["judge"]
    facts = [
        ("Trained from", f"`{base.path}`"),
        ("Method", f"GRPO; experiment `{experiment['name']}`: {experiment['description']}"),
        ("Reward", "a text-only reader answers from the caption" if reward == "qa" else f"judge `{reward}`"),
        ("Data", f"{numbers.count(record['n'])} images of `{experiment['data']['file']}`"),
        ("Hash of the questions", record["hashes"]["questions"]),
        ("Steps", f"{values['steps']}, {experiment['rl']['group_size']} captions per image"),
        ("Reward, first to last steps", _ends(values, "reward", 3)),
        ("Caption tokens, first to last steps", _ends(values, "completion_tokens", 1)),
    ]  # fmt: skip
    use = (
        "```\npython -m caprl_utils.captions FOLDER --out captions.parquet --model "
        f"{record_path(folder / 'final')}\n```"
    )
    title = f"Captioner {folder.name}, profile {profile.name}"
    tags = ["image-captioning", "grpo", "trl", "caprl"]
    return _model(profile, folder, record, base, title, facts, scores, "image-to-text", tags, use)


def vlm_card(profile: Profile, folder: Path) -> str:
    """Of a model pretrained on captions. folder: runs/<profile>/pretraining/<run>."""
    record = load_result(folder)
    values = record["values"]
    facts = [
        ("Trained from", f"`{record['start']}`"),
        ("Setting", f"`configs/vlm_init/{record['setting']}.yaml`"),
        ("Stage", f"{record['training_stage']}; trained: {', '.join(record['trains'])}"),
        ("Captions", record["captions"] or "none in this stage"),
        ("Data", f"{numbers.count(record['n'])} rows, hash {record['hashes']['data']}"),
        ("Steps", str(values["steps"])),
        ("Loss, first to last step", _ends(values, "loss", 3)),
    ]
    title = f"Vision-language model {folder.name}, profile {profile.name}"
    scores, tags = _scores(profile, "vqa", folder.name), ["llama-factory", "caprl"]
    base = ModelConfig(path=record["start"])
    return _model(profile, folder, record, base, title, facts, scores, "image-text-to-text", tags, "")


def qa_card(profile: Profile, folder: Path) -> str:
    """Of curated questions. folder: runs/<profile>/curation/<run>."""
    from huggingface_hub import DatasetCard, DatasetCardData

    record = load_result(folder)
    values = record["values"]
    data = DatasetCardData(
        license=_licence(profile), language="en", task_categories=["visual-question-answering", "image-to-text"],
        size_categories=_size(values["images_kept"]), pretty_name=f"Questions on images, profile {profile.name}",
        tags=["caprl", "reinforcement-learning"],
        configs=[{"config_name": "default", "data_files": "qa.parquet"}],
    )  # fmt: skip
    settings = profile.curation
    body = [
        f"# Questions on images, profile {profile.name}",
        f"Multiple-choice questions about images, written and filtered as in {PAPER}; one row an image, in the columns "
        "of CapRL-QA-75K (`id`, `image`, `prompt`, `data_source`, `reward_model`).",
        _facts([
            ("Images", f"{numbers.count(values['images_kept'])} kept of {numbers.count(values['images_read'])}; source "
             f"`{profile.images.source}`"),
            ("Questions", f"{numbers.count(values['questions_kept'])} kept of "
             f"{numbers.count(values['questions_extracted'])} well-formed ones"),
            ("Writer", f"`{profile.models.question_writer.path}`"),
            ("Filter", f"`{profile.models.question_filter.path}` answers with the image (kept above "
             f"{settings.min_visual_accuracy:g}) and without it (kept below {settings.max_text_accuracy:g})"),
            ("Left out", ", ".join(f"{reason} {count}" for reason, count in values["verdicts"].items()
                                   if reason != "kept")),
            *_provenance(folder, record),
        ]),
        "## Limits",
        "Questions and answers were written by a model and checked by a model; no person read them. "
        + (MINI_DATA if _is_mini(profile) else REAL_DATA),
    ]  # fmt: skip
    return _card(DatasetCard, data, body)


def captions_card(profile: Profile, file: Path) -> str:
    """Of a set of captions. file: the parquet that caprl_utils.captions wrote."""
    import pyarrow.parquet as pq
    from huggingface_hub import DatasetCard, DatasetCardData

    columns = ["image_id", "num_tokens", "finish_reason", "looped", "model", "model_hash"]
    rows = pq.read_table(file, columns=columns).to_pylist()
    reasons = Counter("a loop" if row["looped"] else row["finish_reason"] for row in rows)
    models = sorted({f"`{_model_name(row['model'])}` ({row['model_hash']})" for row in rows})
    tokens, images = [row["num_tokens"] for row in rows], len({row["image_id"] for row in rows})
    data = DatasetCardData(
        license=_licence(profile), language="en", task_categories=["image-to-text"], tags=["caprl"],
        size_categories=_size(len(rows)), pretty_name=f"Captions {file.stem}, profile {profile.name}",
        configs=[{"config_name": "default", "data_files": file.name}],
    )  # fmt: skip
    body = [
        f"# Captions {file.stem}, profile {profile.name}",
        f"Image captions as in {PAPER}, made by `python -m caprl_utils.captions`; one row a caption. The images are "
        "not inside: `image_id` and `image_key` name them in their source.",
        _facts([
            ("Captions", f"{numbers.count(len(rows))} of {numbers.count(images)} images"),
            ("Captioner", ", ".join(models) or "none"),
            ("Tokens per caption", numbers.number(sum(tokens) / len(tokens) if tokens else None)),
            ("Ends", ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())) or "none"),
            ("File", f"`{record_path(file)}`; job and checks in `{file.name}.work/`"),
        ]),
        "## Limits",
        "Captions are a model's: they may state what an image does not show. "
        + (MINI_DATA if _is_mini(profile) else REAL_DATA),
    ]  # fmt: skip
    return _card(DatasetCard, data, body)


def _model(
    profile: Profile,
    folder: Path,
    record: Mapping[str, Any],
    base: ModelConfig,
    title: str,
    facts: Sequence[tuple[str, str]],
    scores: Mapping[str, tuple[float, Any, int]],
    task: str,
    tags: list[str],
    use: str,
) -> str:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    results = [
        EvalResult(task, key, _benchmark(key), "accuracy", round(100 * mean, 2))
        for key, (mean, _, _) in scores.items()
    ]
    data = ModelCardData(
        license=_licence(profile), language="en", library_name="transformers", pipeline_tag=task, tags=tags,
        model_name=f"{profile.name}-{folder.name}", eval_results=results or None,
        base_model=base.path if _on_hub(base.path) else None,
    )  # fmt: skip
    body = [
        f"# {title}",
        f"Made by the reproduction of {PAPER}. The model lies in `{record_path(folder)}/final`.",
        *([use] if use else []),
        _facts([*facts, *_provenance(folder, record)]),
        "## Scores",
        _score_lines(scores),
        "## Limits",
        MINI_LIMITS if _is_mini(profile) else REAL_LIMITS,
    ]
    return _card(ModelCard, data, body)


def _scores(profile: Profile, stage: str, name: str) -> dict[str, tuple[float, Any, int]]:
    """Benchmark -> (accuracy, interval, questions) of the model's evaluation; empty where there is none."""
    folder = paths.RUNS / profile.name / stage / name
    if not (folder / "result.json").is_file():
        return {}
    record = load_result(folder)
    return {
        key: (part["mean"], record["intervals"].get(key), record["n"][key])
        for key, part in record["values"]["benchmarks"].items()
        if part["mean"] is not None
    }


def _score_lines(scores: Mapping[str, tuple[float, Any, int]]) -> str:
    if not scores:
        return "Not evaluated."
    lines = ["| Benchmark | Accuracy (%), 95 % interval | Questions |", "| :--- | ---: | ---: |"]
    texts = numbers.percents([mean for mean, _, _ in scores.values()])
    for (key, (_, bounds, count)), text in zip(scores.items(), texts, strict=True):
        lines.append(f"| {_benchmark(key)} | {text} {numbers.interval(bounds)} | {numbers.count(count)} |")
    return "\n".join(lines)


def _benchmark(key: str) -> str:
    return "Average" if key == AVERAGE else get_benchmark(key).name


def _facts(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- **{name}:** {text}" for name, text in pairs if text)


def _provenance(folder: Path, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    state = " with uncommitted changes" if record["dirty"] else ""
    return [
        ("Seeds", ", ".join(map(str, record["seeds"]))),
        ("Record", f"`{record_path(folder / 'result.json')}`, key {record['key'][:16]}"),
        ("Code", f"commit {record['commit']}{state}"),
        (
            "Settings",
            f"hash {record['hashes']['config']}; `make config PROFILE={record['profile']}` prints them",
        ),
    ]


def _ends(values: Mapping[str, Any], name: str, decimals: int) -> str:
    ends = [values.get(f"{name}_first"), values.get(f"{name}_last")]
    return "" if None in ends else " to ".join(numbers.numbers(ends, decimals))


def _is_mini(profile: Profile) -> bool:
    return profile.models.policy.path.startswith(paths.ZOO_PREFIX)


def _licence(profile: Profile) -> str:
    """The mini world is this repository's own; elsewhere the base model's and the images' terms decide."""
    return "apache-2.0" if _is_mini(profile) else "other"


def _on_hub(path: str) -> bool:
    """Whether a model's path is a hub id, owner/name."""
    return (
        not path.startswith((paths.ZOO_PREFIX, "/", ".")) and path.count("/") == 1 and not Path(path).exists()
    )


def _model_name(path: str) -> str:
    """A model as cards name it: of this repository's folders the path inside, others as they are."""
    inside = any(Path(path).is_relative_to(folder) for folder in (paths.RUNS, paths.ROOT))
    return record_path(Path(path)) if inside else path


def _size(count: int) -> str:
    limits = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in limits if count < limit), "1M<n<10M")


def _card(kind: type, data: Any, body: Sequence[str]) -> str:
    """The card as text, parsed once by the library that the hub uses."""
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part.strip() for part in body if part) + "\n"
    return str(kind(content))


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    written = write_all(profile_of(argv, "cards", __doc__))
    print("\n".join(map(paths.shown, written)) or "nothing is finished yet")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
