"""Prism: how much of an image is in its caption, measured by a text-only reader (paper, Table 3).

Stage 1, a captioner describes every image; stage 2, a reader answers the benchmarks' questions from the
caption alone; stage 3, the answers are scored by each benchmark's metric. The score of a sample is the
mean over its captions.

How it departs from the released scripts:
1. The reader reads letter probabilities or decodes greedily by default; "sampled" is the authors'
   setting.
2. Answers are scored by each benchmark's own metric ("standard"); "caprl" is the authors' scorer.
3. Captions and answers are kept, row by row; a stopped evaluation continues with the same result.
4. An image with several questions is captioned once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from caprl_utils import paths, prompts
from caprl_utils.captions import Caption
from caprl_utils.errors import UserError
from caprl_utils.hashing import value_hash
from caprl_utils.models.base import Backend, Sampling
from caprl_utils.prism import judging, prism_scores
from caprl_utils.prism.prism_answers import ReaderMode, Task, answer_all, answer_id
from caprl_utils.prism.prism_sources import CAPTIONS_STAGE, CaptionSource, ModelCaptions, PrismImage
from caprl_utils.prism.scoring import Judge, Mode
from caprl_utils.runs import RowStore, Run
from caprl_utils.schema import ModelConfig, Profile

if TYPE_CHECKING:
    from PIL.Image import Image

    from caprl_utils.prism.loaders import Sample

STAGE = "prism"
# several captioners are evaluated on the same samples: each image is hashed once
_PIXEL_HASHES: WeakKeyDictionary[Callable[[], Image], str] = WeakKeyDictionary()


def evaluate(
    profile: Profile,
    model_name: str,
    captioner: Backend | CaptionSource | ModelCaptions,
    reader: Backend,
    samples: Sequence[Sample],
    seed: int | None = None,
    reader_mode: ReaderMode | None = None,
    scoring: Mode | None = None,
    label: str | None = None,
    judge: Judge | None = None,
    captions_run: str | None = None,
) -> dict[str, Any]:
    """Run the three stages, or what is left of them; returns the run's record.

    model_name: the run is runs/<profile>/prism/<model_name>. captioner: a model, sampled as profile.prism
    says, or a `CaptionSource`. reader: a text-only model; for `ImageItself` a VLM. seed (of captions and
    sampled answers), reader_mode and scoring: the profile's by default. label: the model's name in
    samples.parquet. judge: for metrics that need one, the profile's by default; without any those samples
    have no score and are counted. captions_run: name of the captions' run, model_name by default; another
    reader of the same captioner names the first one's.
    Raises UserError when a caption or an answer could not be had; finished rows stay on
    disk.
    """
    seed = profile.seed if seed is None else seed
    scoring, judge = scoring or profile.prism.scoring, judge or judging.judge_of(profile)
    source = as_source(captioner, profile, seed)
    mode = reader_mode or (profile.prism.image_reader if source.looks else profile.prism.reader)
    prism_scores.check_modes(scoring, mode)
    parts = {
        "prism": {"reader": mode, "bootstrap_draws": profile.prism.bootstrap_draws, "scoring": scoring},
        "captioner": source.fingerprint(),
        "reader": reader.model_hash,
        "prompts": prompts.prompt_hash(),
        "samples": samples_hash(samples),
        "seed": seed,
        "label": label or model_name,
        "judge": judging.fingerprint(judge),
    }
    with Run.open(profile, STAGE, model_name, parts, _modules(source, reader)) as run:
        if run.complete:
            return run.result
        captions = all_captions(profile, captions_run or model_name, source, images_of(samples))
        tasks = make_tasks(samples, captions, source.looks)
        answers = answer_all(tasks, reader, mode, run.rows("answers"), seed)
        facts = caption_facts(tasks, captions)
        rows = prism_scores.score_rows(tasks, answers, facts, scoring, judging.stored(judge, run))
        prism_scores.write_samples(run.folder / "samples.parquet", rows, label or model_name)
        summary = prism_scores.summarise(rows, profile.prism.bootstrap_draws, profile.seed)
        return run.finish(
            **summary, unit="sample", seeds=[seed], label=label or model_name, captioner=source.name,
            reader={"name": reader.name, "mode": mode}, scoring=scoring,
            judge=judge.name if judge else None,
            captions_per_image=max(len(found) for found in captions.values()),
        )  # fmt: skip


def all_captions(
    profile: Profile, name: str, source: CaptionSource | ModelCaptions, images: Sequence[PrismImage]
) -> Mapping[str, list[Caption]]:
    """Image id -> captions. Those of a model are a run of their own,
    runs/<profile>/captions/<name>, so that another reader or scorer does not caption again.
    """
    if not isinstance(source, ModelCaptions):
        return source.captions(images)
    parts = {
        "captioner": source.fingerprint(),
        "images": {image.id: pixel_hash(image.open) for image in images},
    }
    recipe = ["caprl_utils.captions.rows", *project_modules(source.backend)]
    with Run.open(profile, CAPTIONS_STAGE, name, parts, recipe) as run:
        captions = source.write(images, run.rows("captions"))
        if not run.complete:
            tokens = [caption.num_tokens for found in captions.values() for caption in found]
            run.finish(
                values={"caption_tokens": sum(tokens) / len(tokens)}, n=len(captions), unit="image",
                seeds=[source.sampling.seed], captions_per_image=source.sampling.n,
            )  # fmt: skip
    return captions


def preview(
    sample: Sample, captions: Sequence[Caption], reader: Backend, reader_mode: ReaderMode
) -> list[dict[str, Any]]:
    """Stages 2 and 3 for one question with one image: a row per caption, kept nowhere."""
    by_image = {image_ids(sample)[0]: list(captions)}
    tasks = make_tasks([sample], by_image, looks=False)
    with TemporaryDirectory() as folder, RowStore(Path(folder) / "answers.jsonl") as store:
        answers = answer_all(tasks, reader, reader_mode, store, seed=0)
    rows = prism_scores.score_rows(tasks, answers, caption_facts(tasks, by_image), "standard")
    return [{key: row[key] for key in ("caption", "answer", "letter_mass", "score")} for row in rows]


def load_samples(
    profile: Profile, benchmarks: Sequence[str] | None = None, num_samples: int | None = None
) -> list[Sample]:
    """The samples of several benchmarks, in the order given.

    benchmarks, num_samples (of each): the profile's Prism settings by default.
    Raises UserError when data are missing.
    """
    from caprl_utils.prism import loaders

    settings = profile.prism
    count = settings.num_samples if num_samples is None else num_samples
    return [
        sample
        for name in (settings.benchmarks if benchmarks is None else benchmarks)
        for sample in loaders.load(name, num_samples=count, seed=profile.seed)
    ]


def trained_captioners(profile: Profile, experiments: Sequence[str]) -> dict[str, ModelConfig]:
    """Run name -> captioner of every finished training of the named experiments, seeds in order."""
    stage = paths.RUNS / profile.name / "rl"
    names = [
        folder.name
        for experiment in experiments
        for folder in sorted(stage.glob(f"{experiment}-seed*"), key=lambda f: (len(f.name), f.name))
        if (folder / "result.json").is_file()
    ]
    return {name: trained_captioner(profile, name) for name in names}


def trained_captioner(profile: Profile, run_name: str) -> ModelConfig:
    """The captioner that the training runs/<profile>/rl/<run_name> ends with."""
    folder = paths.RUNS / profile.name / "rl" / run_name / "final"
    return profile.models.policy.model_copy(
        update={"path": str(folder), "revision": None, "backend": "local"}
    )


def as_source(
    captioner: Backend | CaptionSource | ModelCaptions, profile: Profile, seed: int | None = None
) -> CaptionSource | ModelCaptions:
    """A source as it is; a model with the profile's caption sampling."""
    if hasattr(captioner, "fingerprint"):
        return captioner
    settings = profile.prism
    sampling = Sampling(
        max_tokens=settings.caption_max_tokens,
        temperature=settings.caption_temperature,
        n=settings.captions_per_image,
        seed=profile.seed if seed is None else seed,
    )
    return ModelCaptions(captioner, sampling)


def image_ids(sample: Sample) -> list[str]:
    """Ids of a sample's images, unique over benchmarks: its loader's `image_id`, numbered if there are
    several.
    """
    name = f"{sample.benchmark}/{sample.meta.get('image_id', sample.id)}"
    return [name] if len(sample.images) == 1 else [f"{name}/{i}" for i in range(1, len(sample.images) + 1)]


def images_of(samples: Sequence[Sample]) -> list[PrismImage]:
    """Every image once, in the order of the samples."""
    found: dict[str, PrismImage] = {}
    for sample in samples:
        if not sample.images:
            raise UserError(f"{sample.benchmark}, sample {sample.id}: no image to caption")
        for image_id, image in zip(image_ids(sample), sample.images, strict=True):
            if image_id not in found:
                found[image_id] = PrismImage(
                    image_id, sample.benchmark, image, sample.meta.get("true_caption")
                )
    return list(found.values())


def make_tasks(samples: Sequence[Sample], captions: Mapping[str, list[Caption]], looks: bool) -> list[Task]:
    """One task per sample and caption; the captions of several images are numbered and joined."""
    tasks = []
    for sample in samples:
        per_image = [captions[image_id] for image_id in image_ids(sample)]
        for index in range(min(len(found) for found in per_image)):
            texts = [found[index].text for found in per_image]
            joined = (
                texts[0] if len(texts) == 1 else "\n".join(f"Image {i}: {t}" for i, t in enumerate(texts, 1))
            )
            tasks.append(Task(answer_id(sample, index), sample, index, None if looks else joined))
    return tasks


def caption_facts(tasks: Sequence[Task], captions: Mapping[str, list[Caption]]) -> dict[str, dict[str, Any]]:
    """Task id -> cluster (first image), caption text, tokens (None if unknown) and whether it was cut."""
    facts = {}
    for task in tasks:
        ids = image_ids(task.sample)
        used = [captions[image_id][task.caption_index] for image_id in ids]
        tokens = [caption.num_tokens for caption in used]
        facts[task.id] = {
            "image_id": ids[0],
            "caption": task.caption,
            "num_tokens": None if None in tokens else sum(tokens),
            "finish_reason": "length" if any(c.finish_reason == "length" for c in used) else "stop",
        }
    return facts


def samples_hash(samples: Sequence[Sample]) -> str:
    """Hash of everything of the samples that can change a score: texts, golds and pixels."""
    pixels = {image.id: pixel_hash(image.open) for image in images_of(samples)}
    rows = [
        [s.benchmark, s.id, s.question, list(s.options), s.gold, _plain(s.meta), image_ids(s)]
        for s in samples
    ]
    return value_hash({"rows": rows, "pixels": pixels})


def pixel_hash(image: Callable[[], Image]) -> str:
    """Hash of an image's size, mode and pixels; remembered for the function that opens it."""
    if image not in _PIXEL_HASHES:
        opened = image()
        digest = hashlib.sha256(f"{opened.size}/{opened.mode}/".encode())
        digest.update(opened.tobytes())
        _PIXEL_HASHES[image] = digest.hexdigest()[:16]
    return _PIXEL_HASHES[image]


def _plain(value: Any) -> Any:
    """Metadata as JSON values; anything else by its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _modules(source: CaptionSource | ModelCaptions, reader: Backend) -> list[str]:
    """This module and the project's code of the models in use."""
    captioner = source.backend if isinstance(source, ModelCaptions) else source
    return [__name__, *project_modules(reader, captioner)]


def project_modules(*objects: Any) -> list[str]:
    """Modules of this project in which the objects' classes stand, for a run's key."""
    names = {type(found).__module__ for found in objects}
    return sorted(name for name in names if name.startswith("caprl_utils."))
