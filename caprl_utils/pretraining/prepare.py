"""From image sets and captioners to checked data files, all before the first training starts.

runs/<profile>/pretraining/captions/<images>-by-<captioner>.parquet are caption sets (see caprl_utils.captioning),
runs/<profile>/pretraining/data/ is the data folder of all trainings of a profile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import paths, prompts
from caprl_utils.backends.base import Sampling
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.hashing import file_hash, folder_hash, value_hash
from caprl_utils.paths import shown
from caprl_utils.pretraining import budget, data
from caprl_utils.pretraining.data import Example
from caprl_utils.pretraining.sets import CAPRL, CAPTIONERS, IMAGE_SETS, CaptionSet, Training, rows_of
from caprl_utils.pretraining.stages import STAGE, Inputs, folder_of
from caprl_utils.progress import track
from caprl_utils.runs import Run
from caprl_utils.schema import ModelConfig, Profile

if TYPE_CHECKING:
    from PIL.Image import Image

MINI_WORLD = "mini-world"
DATA = "data"
_MEDIA = "media"


@dataclass(frozen=True)
class Prepared:
    """Checked data files. record: of the run that made them."""

    folder: Path
    media: Path
    record: Mapping[str, Any]

    def inputs(self, training: Training, model: Path) -> Inputs:
        """What a training of these data starts from."""
        name = dataset_of(training)
        found = self.record["values"]["data_sets"][name]
        return Inputs(model, self.folder, name, found["hash"], self.media, found["rows"])


def dataset_of(training: Training) -> str:
    """Name of the data set that a training reads."""
    return training.captions.slug if training.captions else training.stage


def prepare(profile: Profile, trainings: Sequence[Training], models: Mapping[str, Path]) -> Prepared:
    """Caption what is to be captioned, write every data set, and check each row against every model's processor.

    models: setting -> assembled model. Raises UserError naming data set and rows when something is wrong.
    """
    captions = {name: caption(profile, name) for name in _rendered_pairs(profile, trainings)}
    sets = {dataset_of(training): training for training in trainings}
    settings = profile.pretraining
    parts = {
        "rows": {name: training.num_rows(settings) for name, training in sorted(sets.items())},
        "budget": [settings.cutoff_tokens, settings.min_pixels, settings.max_pixels, settings.max_bad_share],
        "seed": profile.seed,
        "captions": {name: file_hash(file) for name, file in captions.items()},
        "files": _user_files(profile, sets), "prompts": prompts.prompt_hash(),
        "processors": {name: _processor_hash(folder) for name, folder in models.items()},
    }  # fmt: skip
    modules = [__name__, "caprl_utils.mini.pretraining"]
    with Run.open(profile, STAGE, DATA, parts, modules) as run:
        media = _media(profile, run.folder)
        if not run.complete:
            counters = _counters(profile, models)
            values = {}
            for name, training in sets.items():
                examples = _examples(profile, training, captions, media)
                values[name] = _write(profile, run.folder, media, name, examples, counters)
            run.finish(
                values={"data_sets": values}, unit="row",
                n={name: found["rows"] for name, found in values.items()},
            )  # fmt: skip
        return Prepared(run.folder, media, run.result)


def caption(profile: Profile, pairs_name: str) -> Path:
    """Caption a rendered image set; returns the parquet file. Stopped, it goes on where it was."""
    from caprl_utils.captioning.job import caption_source

    images, _, captioner = pairs_name.partition("-by-")
    out = folder_of(profile, "captions") / f"{pairs_name}.parquet"
    settings = profile.pretraining
    sampling = Sampling(
        max_tokens=settings.caption_max_tokens, temperature=settings.caption_temperature, seed=profile.seed
    )
    caption_source(image_source(profile, images), out, _captioner(profile, captioner), sampling)
    return out


def image_source(profile: Profile, images: str) -> str:
    """A rendered image set as `captioning` names it; each has a seed of its own, so no two share an image."""
    settings = profile.pretraining
    count = {
        "align": settings.align.num_rows, "sft": settings.sft.num_rows, "caprl": settings.further.num_rows_large,
    }.get(images, settings.further.num_rows)  # fmt: skip
    return f"{MINI_WORLD}:{STAGE}:{count}:{_image_seed(profile, images)}"


def _image_seed(profile: Profile, images: str) -> int:
    return 100 * profile.seed + 1 + IMAGE_SETS.index(images)


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


def _user_files(profile: Profile, sets: Mapping[str, Training]) -> dict[str, str]:
    """Data set -> hash of the user's file."""
    files = {name: _user_file(profile, training) for name, training in sets.items()}
    return {name: file_hash(file) for name, file in files.items() if file is not None}


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


def _media(profile: Profile, folder: Path) -> Path:
    rendered = profile.pretraining.further.data == MINI_WORLD
    return folder / _MEDIA if rendered else paths.ROOT / profile.pretraining.media_folder


def _examples(
    profile: Profile, training: Training, captions: Mapping[str, Path], media: Path
) -> list[Example]:
    """The rows of a data set, sampled by the profile's seed."""
    settings = profile.pretraining
    file = _user_file(profile, training)
    if file is not None:
        return data.sample(data.read_examples(file), training.num_rows(settings), profile.seed)
    if training.captions is not None:
        return _captioned(profile, training.captions, captions[training.captions.pairs_name], media)
    from caprl_utils.mini import pretraining as mini

    make = {"align": mini.alignment_captions, "sft": mini.conversations}[training.stage]
    rows = make(training.num_rows(settings), _image_seed(profile, training.stage))
    return [
        data.about_image(name, _save(media, training.stage, name, image), turns)
        for name, image, turns in track(rows, training.stage, training.num_rows(settings))
    ]


def _captioned(profile: Profile, chosen: CaptionSet, file: Path, media: Path) -> list[Example]:
    """Caption pairs of a set: a seeded sample of all that were written for its images."""
    from caprl_utils.mini.source import image_at

    texts = _captions(file)
    count = rows_of(chosen, profile.pretraining)
    split, total, seed = image_source(profile, chosen.images).split(":")[1:]
    numbers = data.sample(range(int(total)), min(count, int(total)), profile.seed)
    examples = []
    for number in track(numbers, chosen.slug):
        name, image, _, _ = image_at(split, number, None, int(seed))
        if name in texts:
            path = _save(media, chosen.images, name, image)
            examples.append(data.about_image(name, path, [(prompts.CAPTION, texts[name])]))
    return examples


def _captions(file: Path) -> dict[str, str]:
    """Image id -> caption."""
    import pyarrow.parquet as pq

    rows = pq.read_table(file, columns=["image_id", "caption"]).to_pylist()
    return {row["image_id"]: row["caption"] for row in rows if row["caption"].strip()}


def _save(media: Path, images: str, name: str, image: Image) -> str:
    """Write an image once; returns its path below the media folder."""
    import io

    path = f"{images}/{name}.png"
    if not (media / path).is_file():
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        write_atomic(media / path, buffer.getvalue())
    return path


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
    examples: Sequence[Example],
    counters: Mapping[str, budget.TokenCounter],
) -> dict[str, Any]:
    """Check a data set with every processor and write the rows that fit all of them."""
    settings = profile.pretraining
    budgets = {s: budget.check(examples, media, c, settings.cutoff_tokens) for s, c in counters.items()}
    bad = {row: reason for found in budgets.values() for row, reason in found.bad.items()}
    for found in budgets.values():
        budget.refuse(found, name, settings.max_bad_share)
    kept = [example for example in examples if example.id not in bad]
    rows = data.write_examples(folder, name, kept)
    images = [[path, (media / path).stat().st_size] for path in sorted({i for e in kept for i in e.images})]
    return {
        "rows": rows, "set_aside": bad,
        "hash": value_hash([file_hash(folder / f"{name}.jsonl"), images]),
        "longest": {setting: found.longest for setting, found in budgets.items()},
        "tokens": {setting: found.total_tokens for setting, found in budgets.items()},
    }  # fmt: skip


def _processor_hash(folder: Path) -> str:
    """Hash of what counts tokens: everything of a model's folder but its weights."""
    files: Iterator[Path] = (f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".jinja", ".txt"))
    return value_hash({f.name: file_hash(f) for f in files}) if folder.is_dir() else folder_hash(folder)
