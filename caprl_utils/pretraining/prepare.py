"""From image sets and captioners to checked data files, all before the first training starts.

runs/<profile>/pretraining/ holds captions/<images>-by-<captioner>-<hash>.parquet, runs data-<name>/, and media/.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import paths, prompts
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.hashing import code_hashes, file_hash, value_hash
from caprl_utils.images import encode
from caprl_utils.models.base import Sampling
from caprl_utils.paths import shown
from caprl_utils.pretraining import data
from caprl_utils.pretraining.data import BadRow, DataSet, TokenCounter
from caprl_utils.pretraining.llamafactory import STAGE, folder_of
from caprl_utils.pretraining.sets import CAPRL, CAPTIONERS, IMAGE_SETS, CaptionSet, Training, model_name
from caprl_utils.prism import told
from caprl_utils.prism.evaluate import trained_captioner
from caprl_utils.progress import track
from caprl_utils.records import Conversation, about_image, mark_in
from caprl_utils.registry import DrawnSource, drawn_source
from caprl_utils.runs import Run
from caprl_utils.schema import ModelConfig, Profile

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE = [  # with what draws the images
    "caprl_utils.pretraining.prepare", "caprl_utils.pretraining.data", "caprl_utils.prism.told",
    "caprl_utils.prompts",
]  # fmt: skip


def dataset_of(training: Training) -> str:
    """Name of the data set that a training reads."""
    return training.captions.slug if training.captions else training.stage


def run_name(dataset: str) -> str:
    """Name of the run that makes a data set."""
    return f"data-{dataset}"


def prepare(profile: Profile, trainings: Sequence[Training], models: Mapping[str, Path]) -> dict[str, DataSet]:
    """Caption what is to be captioned, write every data set, and check each row against every model's processor.
    models: as `pretrain.assemble` gives them; seeds share a processor. Raises UserError naming data set and rows. A
    data set that is there already stays as it is.
    """
    settings, wanted = profile.pretraining, {dataset_of(training): training for training in trainings}
    firsts = {setting: models.get(model_name(setting, settings.seeds[0])) for setting in settings.settings}
    folders = {setting: folder for setting, folder in firsts.items() if folder is not None}
    # a missing file is named before hours of work on the others
    files = {name: _user_file(profile, training) for name, training in wanted.items()}
    pairs = {name: t.captions.pairs_name for name, t in wanted.items() if t.captions and files[name] is None}
    written = {name: caption(profile, name) for name in dict.fromkeys(pairs.values())}
    files |= {name: written[of_set] for name, of_set in pairs.items()}
    counters = functools.cache(lambda: _counters(profile, folders))  # loaded when a data set is not there yet
    return {name: _data_set(profile, t, files[name], folders, counters) for name, t in wanted.items()}


def _source(profile: Profile, stage: str) -> DrawnSource | None:
    """What draws the images of a stage's data; None where they come from a user's file."""
    return drawn_source(getattr(profile.pretraining, stage).data)


def _user_file(profile: Profile, training: Training) -> Path | None:
    """The file of a data set; None where it is rendered. Raises UserError when it is missing."""
    if _source(profile, training.stage) is not None:
        return None
    pattern = getattr(profile.pretraining, training.stage).data
    file = paths.HOME / pattern.format(name=training.captions.name if training.captions else "")
    if not file.is_file():
        named = f"no data file {shown(file)} (pretraining.{training.stage}.data)"
        raise UserError(f"{named}; `make plan` says what belongs there")
    return file


def _data_set(
    profile: Profile, training: Training, file: Path | None, models: Mapping[str, Path],
    counters: Callable[[], Mapping[str, TokenCounter]],
) -> DataSet:  # fmt: skip
    """Make one data set, or read back what was found when it was made. file: the user's, or captions of our models;
    None where the rows are rendered.
    """
    settings, name, source = profile.pretraining, dataset_of(training), _source(profile, training.stage)
    parts = {
        "rows": training.num_rows(settings),
        "budget": [settings.cutoff_tokens, settings.max_pixels, settings.max_bad_share],
        "seed": profile.seed, "file": file_hash(file) if file else None,
        "processors": {setting: _processor_hash(folder) for setting, folder in models.items()},
    }  # fmt: skip
    with Run.open(profile, STAGE, run_name(name), parts, [*RECIPE, *(source.recipe if source else ())]) as run:
        media = _media(profile) if source else paths.HOME / settings.media_folder
        if not run.complete:
            rows, found = _rows(profile, training, file, source)
            values = _write(profile, run.folder, media, name, rows, found, counters())
            run.finish(values=values, n=values["rows"], unit="row")
        return DataSet(name, run.folder, media, run.result["values"])


def _processor_hash(folder: Path) -> str:
    """Hash of what counts tokens: everything of a model's folder but its weights."""
    files = (file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".jinja", ".txt"))
    return value_hash({file.name: file_hash(file) for file in files})


def _counters(profile: Profile, models: Mapping[str, Path]) -> dict[str, TokenCounter]:
    from transformers import AutoProcessor

    loaded = {name: AutoProcessor.from_pretrained(folder) for name, folder in models.items()}
    return {name: TokenCounter(one, profile.pretraining.max_pixels) for name, one in loaded.items()}


def _write(
    profile: Profile, folder: Path, media: Path, name: str, rows: Sequence[Conversation], found: Mapping[str, Any],
    counters: Mapping[str, TokenCounter],
) -> dict[str, Any]:  # fmt: skip
    """Check a data set with every processor and write the rows that fit all of them; returns the run's values."""
    settings = profile.pretraining
    unfit, longest, tokens = data.token_budgets(rows, media, counters, settings.cutoff_tokens)
    bad = [*found["set_aside"], *unfit.values()]
    data.refuse(bad, len(rows) + len(found["set_aside"]), name, settings.max_bad_share)
    kept = [row for place, row in enumerate(rows) if place not in unfit]
    data.write_rows(folder, name, kept)
    images = [[i, (media / i).stat().st_size] for i in sorted({i for row in kept for i in row.images})]
    whole = value_hash([file_hash(folder / f"{name}.jsonl"), images])
    return {**found, "rows": len(kept), "set_aside": bad, "hash": whole, "longest": longest, "tokens": tokens}


# Captions of rendered images


def caption(profile: Profile, pairs_name: str) -> Path:
    """Caption a rendered image set; returns the parquet file, named after what makes it. Stopped, it goes on."""
    from caprl_utils.captions.job import caption_source, make_job

    images, _, captioner = pairs_name.partition("-by-")
    source, model, prism = image_source(profile, images), _captioner(profile, captioner), profile.prism
    # as Prism does, so that sets are made of what Table 3 measures
    sampling = Sampling(prism.caption_max_tokens, prism.caption_temperature, seed=profile.seed)
    made_by = value_hash(make_job(source, model, sampling))[:8]
    out = folder_of(profile, "captions") / f"{pairs_name}-{made_by}.parquet"
    caption_source(source, out, model, sampling)
    return out


def _captioner(profile: Profile, name: str) -> ModelConfig:
    """The model that writes a set's captions. Raises UserError when the RL training is not there."""
    if name != CAPRL:
        return profile.models[CAPTIONERS[name]]
    model = trained_captioner(profile, f"caprl-seed{profile.rl.seeds[0]}")
    if not (Path(model.path) / "config.json").is_file():
        raise UserError(f"no {shown(model.path)}; make it: make 03_caprl_rl_training PROFILE={profile.name}")
    return model


def image_source(profile: Profile, images: str) -> str:
    """A rendered image set as `captions` names it; each has a seed of its own, so no two share an image."""
    further = profile.pretraining.further
    return f"{further.data}:{STAGE}:{_num_images(profile, images)}:{_image_seed(profile, images)}"


def _num_images(profile: Profile, images: str) -> int:
    """Of a caption set."""
    further = profile.pretraining.further
    return further.num_rows_large if images == "caprl" else further.num_rows


def _image_seed(profile: Profile, images: str) -> int:
    return 100 * profile.seed + 1 + IMAGE_SETS.index(images)


# Rows


def _rows(
    profile: Profile, training: Training, file: Path | None, source: DrawnSource | None
) -> tuple[list[Conversation], dict[str, Any]]:
    """The rows of a data set, sampled by the profile's seed, and what the run tells of others. See `_data_set`."""
    count, stage = training.num_rows(profile.pretraining), training.stage
    found = {"set_aside": [], "left_out": {}, "captions": None}
    if source is None:
        drawn = data.read_rows(file, count, profile.seed)
        rows = [row for row in drawn if isinstance(row, Conversation)]
        return rows, found | {"set_aside": [row for row in drawn if isinstance(row, BadRow)]}
    if training.captions is not None:
        rows, left_out, captions = _captioned(profile, training.captions, file, source)
        return rows, found | {"left_out": left_out, "captions": captions}
    save = _saver(profile, stage, source)
    drawn = track(source.training_rows(stage, count, _image_seed(profile, stage)), stage, count)
    return [about_image(name, save(name, image), turns) for name, image, turns in drawn], found


def _captioned(
    profile: Profile, chosen: CaptionSet, file: Path, source: DrawnSource
) -> tuple[list[Conversation], dict[str, int], dict[str, Any]]:
    """Caption pairs of a set: a seeded sample of the images; loops and cut captions are left out, as exports do.
    Returns also reason -> how many were, and `described`.
    """
    from caprl_utils.captions.export import read_captions

    save, seed = _saver(profile, chosen.images, source), _image_seed(profile, chosen.images)
    total = _num_images(profile, chosen.images)
    written = {row["image_id"]: row for row in read_captions(file)}
    numbers = data.sample(range(total), min(chosen.num_rows(profile.pretraining), total), profile.seed)
    rows, left_out, known = [], Counter(), []
    for number in track(numbers, chosen.slug):
        name, image, _, meta = source.image_at(STAGE, number, None, seed)
        row = written.get(name)
        known.append((meta, row))
        if reason := _unfit(row):
            left_out[reason] += 1
        else:
            rows.append(about_image(name, save(name, image), [(prompts.CAPTION, row["caption"])]))
    return rows, dict(left_out), described(known)


def _unfit(row: Mapping[str, Any] | None) -> str | None:
    """Why a caption is not trained on, or None."""
    from caprl_utils.captions.export import is_sound

    if row is None or not row["caption"].strip():
        return "no caption"
    if not is_sound(row):
        return "loop" if row["looped"] else "cut"
    return "holds a mark of a medium" if mark_in(row["caption"]) else None


def described(known: Iterable[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> dict[str, float | None]:
    """Captions of rendered images: their number, every measure of `prism.told`, shares cut and looped. known: what is
    true of an image (see `registry.DrawnSource`) with its row.
    """
    rows = [(row, told.counts(row["caption"], meta)) for meta, row in known if row is not None]
    measured = told.summary(found | {"num_tokens": row["num_tokens"]} for row, found in rows)
    cut, looped = sum(row["finish_reason"] == "length" for row, _ in rows), sum(row["looped"] for row, _ in rows)
    return {"count": len(rows), **measured, "cut": cut / max(1, len(rows)), "looped": looped / max(1, len(rows))}


def _media(profile: Profile) -> Path:
    return folder_of(profile, "media")


def _saver(profile: Profile, images: str, source: DrawnSource) -> Callable[[str, Image], str]:
    """Writes an image of a rendered set once and returns its path below the media; another seed or another renderer has
    another folder.
    """
    made_by = value_hash([_image_seed(profile, images), code_hashes(source.recipe)])[:8]

    def save(name: str, image: Image) -> str:
        path = f"{images}-{made_by}/{name}.png"
        if not (_media(profile) / path).is_file():
            write_atomic(_media(profile) / path, encode(image)[0])
        return path

    return save
