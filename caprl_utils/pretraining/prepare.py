"""From image sets and captioners to checked data files, all before the first training starts.

runs/<profile>/pretraining/ holds captions/<images>-by-<captioner>-<hash>.parquet (see caprl_utils.captions; the
hash is of everything that makes the captions), a folder data-<name>/ for each data set, a run of its own, and media/
with the images that are rendered for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths, prompts
from caprl_utils.errors import UserError
from caprl_utils.hashing import file_hash, folder_hash, value_hash
from caprl_utils.models.base import Sampling
from caprl_utils.paths import shown
from caprl_utils.pretraining import budget, data
from caprl_utils.pretraining.rows import MINI_WORLD, Rows, image_source, make_rows
from caprl_utils.pretraining.sets import CAPRL, CAPTIONERS, Training
from caprl_utils.pretraining.stages import STAGE, Inputs, folder_of
from caprl_utils.registry import drawn_source
from caprl_utils.runs import Run
from caprl_utils.schema import ModelConfig, Profile

_MEDIA = "media"


@dataclass(frozen=True)
class DataSet:
    """One checked data set. media: where its image paths start. record: of the run that made it; its values are
    "rows", "hash", "longest" and "tokens" by setting, "set_aside" (a line for each row that cannot be trained on),
    "left_out" (reason -> captions that are not trained on) and "captions" (what the captions of rendered images are
    like, None elsewhere).
    """

    name: str
    folder: Path
    media: Path
    record: Mapping[str, Any]

    @property
    def values(self) -> Mapping[str, Any]:
        """What was found."""
        return self.record["values"]


@dataclass(frozen=True)
class Prepared:
    """Checked data sets by name."""

    sets: Mapping[str, DataSet]

    def of(self, training: Training) -> DataSet:
        """What a training reads."""
        return self.sets[dataset_of(training)]

    def inputs(self, training: Training, model: Path) -> Inputs:
        """What a training starts from."""
        found = self.of(training)
        return Inputs(
            model, found.folder, found.name, found.values["hash"], found.media, found.values["rows"]
        )


def dataset_of(training: Training) -> str:
    """Name of the data set that a training reads."""
    return training.captions.slug if training.captions else training.stage


def run_name(dataset: str) -> str:
    """Name of the run that makes a data set."""
    return f"data-{dataset}"


def prepare(profile: Profile, trainings: Sequence[Training], models: Mapping[str, Path]) -> Prepared:
    """Caption what is to be captioned, write every data set, and check each row against every model's processor.

    models: setting -> assembled model (those of other seeds are passed over). Raises UserError naming data set and
    rows when something is wrong. A data set that is there already is left as it is, whoever asks for which others.
    """
    models = {name: models[name] for name in profile.pretraining.settings if name in models}
    sets = {dataset_of(training): training for training in trainings}
    for training in sets.values():
        _user_file(profile, training)  # a missing one is named before hours of work on the others
    captions = {name: caption(profile, name) for name in _rendered_pairs(profile, trainings)}
    counters = functools.cache(lambda: _counters(profile, models))  # loaded when a data set is not there yet
    return Prepared({
        name: _data_set(profile, name, training, captions, models, counters) for name, training in sets.items()
    })  # fmt: skip


def _data_set(
    profile: Profile, name: str, training: Training, captions: Mapping[str, Path], models: Mapping[str, Path],
    counters: Callable[[], Mapping[str, budget.TokenCounter]],
) -> DataSet:  # fmt: skip
    """Make one data set, or read back what was found when it was made."""
    settings, file = profile.pretraining, _user_file(profile, training)
    written = captions.get(training.captions.pairs_name) if training.captions else None
    parts = {
        "rows": training.num_rows(settings),
        "budget": [settings.cutoff_tokens, settings.min_pixels, settings.max_pixels, settings.max_bad_share],
        "seed": profile.seed, "prompts": prompts.prompt_hash(),
        "captions": file_hash(written) if written else None, "file": file_hash(file) if file else None,
        "processors": {setting: _processor_hash(folder) for setting, folder in models.items()},
    }  # fmt: skip
    recipe = [__name__, *(drawn_source(MINI_WORLD).recipe if file is None else ())]
    with Run.open(profile, STAGE, run_name(name), parts, recipe) as run:
        media = folder_of(profile, _MEDIA) if file is None else paths.ROOT / settings.media_folder
        if not run.complete:
            rows = make_rows(profile, training, file, written, media)
            values = _write(profile, run.folder, media, name, rows, counters())
            run.finish(values=values, n=values["rows"], unit="row")
        return DataSet(name, run.folder, media, run.result)


def caption(profile: Profile, pairs_name: str) -> Path:
    """Caption a rendered image set; returns the parquet file. Stopped, it goes on where it was.

    Captions made otherwise (another captioner, count, seed or temperature) have another name, and stay.
    """
    from caprl_utils.captions.job import caption_source, make_job

    images, _, captioner = pairs_name.partition("-by-")
    settings = profile.pretraining
    sampling = Sampling(
        max_tokens=settings.caption_max_tokens, temperature=settings.caption_temperature, seed=profile.seed
    )
    source, model = image_source(profile, images), _captioner(profile, captioner)
    made = make_job(source, model, sampling, "local").key[:8]
    out = folder_of(profile, "captions") / f"{pairs_name}-{made}.parquet"
    caption_source(source, out, model, sampling)
    return out


def _captioner(profile: Profile, name: str) -> ModelConfig:
    """The model that writes a set's captions. Raises UserError when the RL training is not there."""
    if name != CAPRL:
        return profile.models[CAPTIONERS[name]]
    final = paths.RUNS / profile.name / "rl" / f"caprl-seed{profile.rl.seeds[0]}" / "final"
    if not (final / "config.json").is_file():
        raise UserError(f"no {shown(final)}; make it: make 03_caprl_rl_training PROFILE={profile.name}")
    return profile.models.policy.model_copy(update={"path": str(final), "revision": None})


def _rendered_pairs(profile: Profile, trainings: Sequence[Training]) -> list[str]:
    """Caption sets that are to be written by our models."""
    if profile.pretraining.further.data != MINI_WORLD:
        return []
    return list(dict.fromkeys(t.captions.pairs_name for t in trainings if t.captions))


def _user_file(profile: Profile, training: Training) -> Path | None:
    """The file of a data set; None where it is rendered. Raises UserError when it is missing."""
    source = getattr(profile.pretraining, training.stage).data
    if source == MINI_WORLD:
        return None
    name = training.captions.name if training.captions else ""
    file = paths.ROOT / source.format(name=name)
    if not file.is_file():
        raise UserError(
            f"no data file {shown(file)} (pretraining.{training.stage}.data); `make plan` says what belongs there"
        )
    return file


def _counters(profile: Profile, models: Mapping[str, Path]) -> dict[str, budget.TokenCounter]:
    from transformers import AutoProcessor

    settings = profile.pretraining
    return {
        name: budget.TokenCounter(
            AutoProcessor.from_pretrained(folder), settings.min_pixels, settings.max_pixels
        )
        for name, folder in models.items()
    }


def _write(
    profile: Profile,
    folder: Path,
    media: Path,
    name: str,
    rows: Rows,
    counters: Mapping[str, budget.TokenCounter],
) -> dict[str, Any]:
    """Check a data set with every processor and write the rows that fit all of them."""
    settings, examples = profile.pretraining, rows.examples
    budgets = budget.check(examples, media, counters, settings.cutoff_tokens)
    unfit = {place: reason for found in budgets.values() for place, reason in found.bad.items()}
    bad = [*rows.bad, *unfit.values()]
    budget.refuse(bad, len(examples) + len(rows.bad), name, settings.max_bad_share)
    kept = [example for place, example in enumerate(examples) if place not in unfit]
    count = data.write_examples(folder, name, kept)
    images = [[path, (media / path).stat().st_size] for path in sorted({i for e in kept for i in e.images})]
    return {
        "rows": count, "set_aside": bad, "left_out": dict(rows.left_out), "captions": rows.captions,
        "hash": value_hash([file_hash(folder / f"{name}.jsonl"), images]),
        "longest": {setting: found.longest for setting, found in budgets.items()},
        "tokens": {setting: found.total_tokens for setting, found in budgets.items()},
    }  # fmt: skip


def _processor_hash(folder: Path) -> str:
    """Hash of what counts tokens: everything of a model's folder but its weights."""
    files: Iterator[Path] = (f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".jinja", ".txt"))
    return value_hash({f.name: file_hash(f) for f in files}) if folder.is_dir() else folder_hash(folder)
