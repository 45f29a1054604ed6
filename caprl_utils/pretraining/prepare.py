"""From image sets and captioners to checked data files, all before the first training starts.

runs/<profile>/pretraining/ holds captions/<images>-by-<captioner>-<hash>.parquet (see caprl_utils.captions; the
hash is of everything that makes the captions), a folder data-<name>/ for each data set, a run of its own, and media/
with the images that are rendered for all of them.
"""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import paths, prompts
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.hashing import code_hashes, file_hash, value_hash
from caprl_utils.models.base import Sampling
from caprl_utils.paths import shown
from caprl_utils.pretraining import data
from caprl_utils.pretraining.data import BadRow, DataSet, TokenCounter
from caprl_utils.pretraining.sets import CAPRL, CAPTIONERS, IMAGE_SETS, CaptionSet, Training, rows_of
from caprl_utils.pretraining.stage import STAGE, folder_of
from caprl_utils.prism.evaluate import trained_captioner
from caprl_utils.progress import track
from caprl_utils.records import Conversation, about_image, mark_in
from caprl_utils.registry import DrawnSource, drawn_source
from caprl_utils.runs import Run
from caprl_utils.schema import ModelConfig, Profile

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE = ["caprl_utils.pretraining.prepare", "caprl_utils.pretraining.data"]  # with what draws the images
_MEDIA = "media"


@dataclass(frozen=True)
class Rows:
    """Rows of a data set before their tokens are counted. bad: a line for each that cannot be trained on."""

    rows: Sequence[Conversation]
    bad: Sequence[str] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    captions: Mapping[str, float] | None = None


def dataset_of(training: Training) -> str:
    """Name of the data set that a training reads."""
    return training.captions.slug if training.captions else training.stage


def run_name(dataset: str) -> str:
    """Name of the run that makes a data set."""
    return f"data-{dataset}"


def prepare(
    profile: Profile, trainings: Sequence[Training], models: Mapping[str, Path]
) -> dict[str, DataSet]:
    """Caption what is to be captioned, write every data set, and check each row against every model's processor.

    models: setting -> assembled model (those of other seeds are passed over). Raises UserError naming data set and
    rows when something is wrong. A data set that is there already is left as it is, whoever asks for which others.
    """
    models = {name: models[name] for name in profile.pretraining.settings if name in models}
    wanted = {dataset_of(training): training for training in trainings}
    for training in wanted.values():
        _user_file(profile, training)  # a missing one is named before hours of work on the others
    drawn = source_of(profile, "further") is not None
    pairs = dict.fromkeys(t.captions.pairs_name for t in trainings if t.captions and drawn)
    written = {name: caption(profile, name) for name in pairs}
    counters = functools.cache(lambda: _counters(profile, models))  # loaded when a data set is not there yet
    return {
        name: _data_set(profile, name, training, written, models, counters)
        for name, training in wanted.items()
    }


def source_of(profile: Profile, stage: str) -> DrawnSource | None:
    """What draws the images of a stage's data; None where they come from a user's file."""
    return drawn_source(getattr(profile.pretraining, stage).data)


def _data_set(
    profile: Profile, name: str, training: Training, captions: Mapping[str, Path], models: Mapping[str, Path],
    counters: Callable[[], Mapping[str, TokenCounter]],
) -> DataSet:  # fmt: skip
    """Make one data set, or read back what was found when it was made."""
    settings, file = profile.pretraining, _user_file(profile, training)
    written = captions.get(training.captions.pairs_name) if training.captions else None
    parts = {
        "rows": training.num_rows(settings),
        "budget": [settings.cutoff_tokens, settings.max_pixels, settings.max_bad_share],
        "seed": profile.seed, "prompts": prompts.prompt_hash(),
        "captions": file_hash(written) if written else None, "file": file_hash(file) if file else None,
        "processors": {setting: _processor_hash(folder) for setting, folder in models.items()},
    }  # fmt: skip
    source = source_of(profile, training.stage)
    with Run.open(
        profile, STAGE, run_name(name), parts, [*RECIPE, *(source.recipe if source else ())]
    ) as run:
        media = folder_of(profile, _MEDIA) if file is None else paths.HOME / settings.media_folder
        if not run.complete:
            rows = _make_rows(profile, training, file, written, media)
            values = _write(profile, run.folder, media, name, rows, counters())
            run.finish(values=values, n=values["rows"], unit="row")
        return DataSet(name, run.folder, media, run.result["values"])


def _user_file(profile: Profile, training: Training) -> Path | None:
    """The file of a data set; None where it is rendered. Raises UserError when it is missing."""
    if source_of(profile, training.stage) is not None:
        return None
    name = training.captions.name if training.captions else ""
    file = paths.HOME / getattr(profile.pretraining, training.stage).data.format(name=name)
    if not file.is_file():
        raise UserError(
            f"no data file {shown(file)} (pretraining.{training.stage}.data); `make plan` says what belongs there"
        )
    return file


def _processor_hash(folder: Path) -> str:
    """Hash of what counts tokens: everything of a model's folder but its weights."""
    files = (file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".jinja", ".txt"))
    return value_hash({file.name: file_hash(file) for file in files})


def _counters(profile: Profile, models: Mapping[str, Path]) -> dict[str, TokenCounter]:
    from transformers import AutoProcessor

    limit = profile.pretraining.max_pixels
    return {
        name: TokenCounter(AutoProcessor.from_pretrained(folder), limit) for name, folder in models.items()
    }


def _write(
    profile: Profile, folder: Path, media: Path, name: str, found: Rows, counters: Mapping[str, TokenCounter]
) -> dict[str, Any]:
    """Check a data set with every processor and write the rows that fit all of them."""
    settings, rows = profile.pretraining, found.rows
    budgets = data.token_budgets(rows, media, counters, settings.cutoff_tokens)
    unfit = {place: reason for budget in budgets.values() for place, reason in budget.bad.items()}
    bad = [*found.bad, *unfit.values()]
    data.refuse(bad, len(rows) + len(found.bad), name, settings.max_bad_share)
    kept = [row for place, row in enumerate(rows) if place not in unfit]
    count = data.write_rows(folder, name, kept)
    images = [
        [path, (media / path).stat().st_size] for path in sorted({i for row in kept for i in row.images})
    ]
    return {
        "rows": count, "set_aside": bad, "left_out": dict(found.left_out), "captions": found.captions,
        "hash": value_hash([file_hash(folder / f"{name}.jsonl"), images]),
        "longest": {setting: budget.longest for setting, budget in budgets.items()},
        "tokens": {setting: budget.total for setting, budget in budgets.items()},
    }  # fmt: skip


def caption(profile: Profile, pairs_name: str) -> Path:
    """Caption a rendered image set; returns the parquet file. Stopped, it goes on where it was.

    Captions made otherwise (another captioner, count, seed or temperature) have another name, and stay.
    """
    from caprl_utils.captions.job import caption_source, make_job

    images, _, captioner = pairs_name.partition("-by-")
    prism = profile.prism  # so that sets are made of what Table 3 measures
    sampling = Sampling(
        max_tokens=prism.caption_max_tokens, temperature=prism.caption_temperature, seed=profile.seed
    )
    source, model = image_source(profile, images), _captioner(profile, captioner)
    made = value_hash(make_job(source, model, sampling))[:8]
    out = folder_of(profile, "captions") / f"{pairs_name}-{made}.parquet"
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
    settings = profile.pretraining
    count = {
        "align": settings.align.num_rows, "sft": settings.sft.num_rows, "caprl": settings.further.num_rows_large,
    }.get(images, settings.further.num_rows)  # fmt: skip
    return f"{settings.further.data}:{STAGE}:{count}:{_image_seed(profile, images)}"


def _image_seed(profile: Profile, images: str) -> int:
    return 100 * profile.seed + 1 + IMAGE_SETS.index(images)


def _make_rows(
    profile: Profile, training: Training, file: Path | None, captions: Path | None, media: Path
) -> Rows:
    """The rows of a data set, sampled by the profile's seed.

    file: of the user; None where the set is rendered. captions: written for it, where our models write them. media:
    where rendered images go.
    """
    count = training.num_rows(profile.pretraining)
    if file is not None:
        drawn = data.read_rows(file, count, profile.seed)
        bad = [str(row) for row in drawn if isinstance(row, BadRow)]
        return Rows([row for row in drawn if isinstance(row, Conversation)], bad)
    if training.captions is not None:
        return _captioned(profile, training.captions, captions, media)
    source, seed = source_of(profile, training.stage), _image_seed(profile, training.stage)
    home = _image_folder(profile, training.stage, source)
    drawn = track(source.training_rows(training.stage, count, seed), training.stage, count)
    return Rows([about_image(name, _save(media, home, name, image), turns) for name, image, turns in drawn])


def _captioned(profile: Profile, chosen: CaptionSet, file: Path, media: Path) -> Rows:
    """Caption pairs of a set: a seeded sample of the images; loops and cut captions are left out, as exports do."""
    from caprl_utils.captions.export import read_captions

    source = source_of(profile, "further")
    written = {row["image_id"]: row for row in read_captions(file)}
    home = _image_folder(profile, chosen.images, source)
    total, seed = (int(part) for part in image_source(profile, chosen.images).split(":")[2:])
    numbers = data.sample(range(total), min(rows_of(chosen, profile.pretraining), total), profile.seed)
    rows, left_out, known = [], Counter(), []
    for number in track(numbers, chosen.slug):
        name, image, _, meta = source.image_at(STAGE, number, None, seed)
        row = written.get(name)
        known.append((meta, row))
        if reason := _unfit(row):
            left_out[reason] += 1
            continue
        rows.append(about_image(name, _save(media, home, name, image), [(prompts.CAPTION, row["caption"])]))
    return Rows(rows, left_out=dict(left_out), captions=described(known))


def _unfit(row: Mapping[str, Any] | None) -> str | None:
    """Why a caption is not trained on, or None. row: of a caption set."""
    from caprl_utils.captions.export import is_sound

    if row is None or not row["caption"].strip():
        return "no caption"
    if not is_sound(row):
        return "loop" if row["looped"] else "cut"
    return "holds a mark of a medium" if mark_in(row["caption"]) else None


def described(known: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> dict[str, float]:
    """What the captions of rendered images are like: their length in the captioner's tokens, and how true they are.

    known: what is true of an image (see `registry.DrawnSource`) with its row. Of the images' facts the share that is
    told right; of the statements of a caption, each counted once, the share that is wrong; the shares of captions
    that were cut or loop.
    """
    there = [(meta, row) for meta, row in known if row is not None]
    told = [
        (_sentences(meta["facts"]), _sentences(meta["known"]), _statements(row["caption"]))
        for meta, row in there
    ]
    right = sum(len(facts & said) for facts, _, said in told)
    wrong = sum(len(said - facts - guessed) for facts, guessed, said in told)
    many = max(1, len(there))
    return {
        "count": len(there),
        "tokens": sum(row["num_tokens"] for _, row in there) / many,
        "told": right / max(1, sum(len(facts) for facts, _, _ in told)),
        "wrong": wrong / max(1, sum(len(said) for _, _, said in told)),
        "cut": sum(row["finish_reason"] == "length" for _, row in there) / many,
        "looped": sum(row["looped"] for _, row in there) / many,
    }


def _sentences(facts: Mapping[str, str]) -> set[str]:
    return {f"The {key} is {value}." for key, value in facts.items()}


def _statements(text: str) -> set[str]:
    """Sentences of a caption of the mini world but the one that introduces it."""
    sentences = (sentence.strip() for sentence in text.replace(". ", ".\n").split("\n"))
    return {sentence for sentence in sentences if sentence.startswith("The ")}


def _image_folder(profile: Profile, images: str, source: DrawnSource) -> str:
    """Folder of a rendered image set below the media; another seed or another renderer has another."""
    made_by = [_image_seed(profile, images), code_hashes(source.recipe)]
    return f"{images}-{value_hash(made_by)[:8]}"


def _save(media: Path, images: str, name: str, image: Image) -> str:
    """Write an image once; returns its path below the media folder."""
    path = f"{images}/{name}.png"
    if not (media / path).is_file():
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        write_atomic(media / path, buffer.getvalue())
    return path
