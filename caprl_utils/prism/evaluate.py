"""Prism: how much of an image is in its caption, measured by a text-only reader (paper, Table 3); and direct VQA.

Stage 1, a captioner describes every image (`sources`); stage 2, a reader answers the benchmarks' questions from the
caption alone (`answers`); stage 3, each benchmark's metric scores the answers (`scores`), a sample by the mean over its
captions. In direct VQA (paper, Tables 1 and 2) a model answers from the image itself. Every row is kept, so a stopped
evaluation goes on. What cannot be had after three tries is left out, counted and listed; too much of it stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.hashing import value_hash
from caprl_utils.models.base import Backend, open_backend
from caprl_utils.prism import scores
from caprl_utils.prism.answers import Mode, Task, answer_all
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.sources import Captions, Source, image_hash, image_ids, image_itself, images_of, model_captions
from caprl_utils.records import Sample
from caprl_utils.registry import world_of
from caprl_utils.runs import RowStore, Run
from caprl_utils.schema import ModelConfig, Profile

STAGE, VQA_STAGE = "prism", "vqa"
RECIPE = [
    *(f"caprl_utils.prism.{name}" for name in (
        "answers", "evaluate", "metrics", "scores", "sources", "statistics", "told")),
    "caprl_utils.answers", "caprl_utils.captions.caption", "caprl_utils.models.local", "caprl_utils.prompts",
]  # fmt: skip


def evaluate(
    profile: Profile, name: str, captioner: Backend | Source, reader: Backend, samples: Sequence[Sample],
    captions_run: str | None = None, stage: str = STAGE, mode: Mode | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the three stages, or what is left of them, as runs/<profile>/<stage>/<name> (answers.jsonl, samples.parquet
    with `scores.COLUMNS`, result.json); returns its record. reader: a text-only model; for `image_itself` a VLM.
    captions_run: name of the captions' run, which several readers can share. mode: of reading, by default the
    profile's. Raises UserError when too many captions or answers could not be had; finished rows stay on disk.
    """
    source = captioner
    if not isinstance(captioner, Source):
        source = model_captions(profile, captioner, captions_run or name)
    settings, mode = profile.prism, mode or reading(profile, source.looks)
    judge = open_backend(settings.judge_model, profile) if settings.judge_model else None
    asks = {s.benchmark: get_benchmark(s.benchmark).ask.model_dump(mode="json") for s in samples}
    parts = {
        "prism": {"reader": mode, "bootstrap_draws": settings.bootstrap_draws, "scoring": settings.scoring},
        "captioner": source.fingerprint, "reader": reader.model_hash,
        "asked": [profile.prompts, asks], "samples": samples_hash(samples), "seed": profile.seed,
        "judge": judge.model_hash if judge else None,
    }  # fmt: skip
    worlds = {module for sample in samples if (world := world_of(sample.meta)) for module in world.recipe}
    with Run.open(profile, stage, name, parts, [*RECIPE, *sorted(worlds)]) as run:
        if run.complete:
            return run.result
        asked = [sample for sample in samples if not source.looks or len(sample.images) == 1]
        captions = source.captions(images_of(asked))
        tasks = make_tasks(asked, captions, source.looks)
        store = run.rows("answers")
        tasks, answers, failed = answer_all(tasks, reader, mode, profile.prompts, store, profile.seed)
        left_out = _left_out(samples, tasks, failed, source.looks)
        verdicts = scores.Judge(judge, run.rows("verdicts")) if judge else None
        rows = scores.score_rows(tasks, answers, settings.scoring, verdicts)
        scores.write_samples(run.folder / "samples.parquet", rows, name)
        return run.finish(
            **scores.summarise(rows, settings.bootstrap_draws, profile.seed), unit="sample", captioner=source.name,
            reader={"name": reader.name, "mode": mode}, scoring=settings.scoring,
            judge=judge.name if judge else None, captions_per_image=max(map(len, captions.values())),
            left_out=left_out, unanswered=failed,
            set_aside=getattr(samples, "set_aside", {}), data=getattr(samples, "origins", {}),
        )  # fmt: skip


def evaluate_vqa(profile: Profile, name: str, model: Backend, samples: Sequence[Sample]) -> dict[str, Any]:
    """`evaluate` without captions: `model` is asked every question about its image; in runs/<profile>/vqa/<name>."""
    return evaluate(profile, name, image_itself(), model, samples, stage=VQA_STAGE)


def _left_out(
    samples: Sequence[Sample], tasks: Sequence[Task], failed: Mapping[str, str], looks: bool
) -> dict[str, dict[str, str]]:
    """Benchmark -> samples without a task, with the reason. Raises UserError where a benchmark has no other."""
    there = {(task.sample.benchmark, task.sample.id) for task in tasks}
    found: dict[str, dict[str, str]] = {}
    for sample in samples:
        if (sample.benchmark, sample.id) not in there:
            several = looks and len(sample.images) != 1
            reason = f"{len(sample.images)} images" if several else "no caption of its image"
            reason = failed.get(f"{sample.benchmark}/{sample.id}#0", reason)
            found.setdefault(sample.benchmark, {})[sample.id] = reason
    if gone := found.keys() - {benchmark for benchmark, _ in there}:
        reasons = "; ".join(f"{name}: {next(iter(found[name].values()))}" for name in sorted(gone))
        raise UserError(f"no question of {', '.join(sorted(gone))} could be asked ({reasons})")
    return found


def reading(profile: Profile, looks: bool = False) -> Mode:
    """How answers are read; the authors' scorer reads <answer> tags, which only their sampled setting writes."""
    if profile.prism.scoring == "caprl":
        return "sampled"
    return "greedy" if looks else "choice"


def preview(profile: Profile, samples: Sequence[Sample], captions: Captions, reader: Backend) -> list[dict[str, Any]]:
    """Stages 2 and 3 for a few samples and captions of their images, kept nowhere: rows of `scores.COLUMNS`."""
    tasks = make_tasks(samples, captions, looks=False)
    with TemporaryDirectory() as folder, RowStore(Path(folder) / "answers.jsonl") as store:
        tasks, answers, _ = answer_all(tasks, reader, reading(profile), profile.prompts, store, seed=0)
    return scores.score_rows(tasks, answers, profile.prism.scoring)


def trained_captioners(profile: Profile, experiments: Sequence[str]) -> dict[str, ModelConfig]:
    """Run name -> captioner of every finished training of the named experiments, seeds in order."""
    runs = paths.RUNS / profile.name / "rl"
    found = [[file.parent.name for file in runs.glob(f"{name}-seed*/result.json")] for name in experiments]
    in_order = (name for names in found for name in sorted(names, key=lambda name: (len(name), name)))
    return {name: trained_captioner(profile, name) for name in in_order}


def trained_captioner(profile: Profile, run_name: str) -> ModelConfig:
    """The captioner that the training runs/<profile>/rl/<run_name> ends with."""
    path = str(paths.RUNS / profile.name / "rl" / run_name / "final")
    return profile.models.policy.model_copy(update={"path": path, "revision": None, "backend": "local"})


def make_tasks(samples: Sequence[Sample], captions: Captions, looks: bool) -> list[Task]:
    """One task per sample and caption; captions of several images are joined, numbered as in the question."""
    tasks = []
    for sample in samples:
        ids = image_ids(sample)
        numbers = sample.meta.get("image_numbers") or [*range(1, len(ids) + 1)]
        for index, used in enumerate(zip(*(captions.get(image_id, ()) for image_id in ids), strict=False)):
            texts, tokens = [c.caption for c in used], [c.num_tokens for c in used]
            if numbers != [1]:
                texts = [f"Image {number}: {text}" for number, text in zip(numbers, texts, strict=True)]
            tasks.append(Task(
                f"{sample.benchmark}/{sample.id}#{index}", sample, index, None if looks else "\n".join(texts), ids[0],
                None if None in tokens else sum(tokens),
                "length" if any(c.finish_reason == "length" for c in used) else "stop",
            ))  # fmt: skip
    return tasks


def samples_hash(samples: Sequence[Sample]) -> str:
    """Hash of everything of the samples that can change a score: texts, golds and images."""
    images = {image.id: image_hash(image.load) for image in images_of(samples)}
    rows = [[s.benchmark, s.id, s.question, [*s.options], s.gold, {**s.meta}, image_ids(s)] for s in samples]
    return value_hash({"rows": rows, "images": images})
