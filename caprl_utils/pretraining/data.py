"""Data to pretrain on, all of it checked before the first training starts: rows from files and drawn sources, captions
from a profile's captioners, written for LLaMA-Factory.

Checks come first (ours), as LLaMA-Factory cuts a row that is too long anywhere, image tokens too, and dies at its step
hours later (hiyouga/LlamaFactory#5968); so it does at an image that is missing or was cut off.
runs/<profile>/pretraining/ holds captions/<images>-by-<captioner>-<hash>.parquet, runs data-<name>/, and media/.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from caprl_utils import paths, prompts
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.hashing import code_hashes, file_hash, value_hash
from caprl_utils.images import BadImage, BadImageError, encode, in_threads, is_strip, open_image, orientation, peek
from caprl_utils.models.base import Sampling
from caprl_utils.paths import shown
from caprl_utils.pretraining.sets import CAPRL, STAGE, CaptionSet, Training, folder_of, model_name
from caprl_utils.prism import told
from caprl_utils.prism.evaluate import trained_captioner
from caprl_utils.progress import track
from caprl_utils.records import PLACEHOLDER, Conversation, about_image, mark_in, register
from caprl_utils.registry import DrawnSource, drawn_source
from caprl_utils.runs import Run
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE = ["caprl_utils.pretraining.data", "caprl_utils.prism.told", "caprl_utils.prompts"]  # with what draws the images
MIN_PIXELS = 32 * 32  # LLaMA-Factory's default: smaller images are enlarged
CAPTIONERS = {"sharegpt4v": "policy", "densefusion": "captioner_7b"}
"""Who captions a set where the data are rendered: a role of the profile's models. CapRL's is a training's result."""
IMAGE_SETS = ("align", "sharegpt4v", "densefusion", "caprl", "sft")  # each with a seed of its own
_ROLES = {"human": "user", "gpt": "assistant"}
_NAMED = 5  # bad rows in a message


@dataclass(frozen=True)
class DataSet:
    """One checked data set. folder: of NAME.jsonl; media: where its image paths start. values: of the run that made it:
    "rows", "hash" (of rows and images), "longest" (tokens of a row, by setting), "set_aside" (lines on rows that cannot
    be trained on), "left_out" (reason -> captions not trained on), "captions" (see `_pairs`).
    """

    name: str
    folder: Path
    media: Path
    values: Mapping[str, Any]


def run_name(dataset: str) -> str:
    """Name of the run that makes a data set."""
    return f"data-{dataset}"


def prepare(profile: Profile, trainings: Sequence[Training], models: Mapping[str, Path]) -> dict[str, DataSet]:
    """Caption what is to be captioned, write every data set, and check each row against every model's processor.
    models: as `pretrain.assemble` gives them; seeds share a processor. Raises UserError naming data set and rows. A
    data set that is there already stays as it is.
    """
    settings, wanted = profile.pretraining, {training.dataset: training for training in trainings}
    files: dict[str, Path | None] = {}
    for name, training in wanted.items():  # a missing file is named before hours of work on the others
        source = training.source(settings)
        file = files[name] = None if drawn_source(source) else paths.HOME / source
        if file and not file.is_file():
            named = f"{shown(file)} (pretraining.{training.stage}.data)"
            raise UserError(f"no data file {named}; `make plan` says what belongs there")
    pairs = {name: t.captions.pairs_name for name, t in wanted.items() if t.captions and files[name] is None}
    written = {name: caption(profile, name) for name in dict.fromkeys(pairs.values())}
    files |= {name: written[pair] for name, pair in pairs.items()}
    folders = {setting: models[model_name(setting, settings.seeds[0])] for setting in settings.settings}

    @functools.cache  # loaded when a data set is not there yet
    def counters() -> dict[str, TokenCounter]:
        return {name: TokenCounter(folder, settings.max_pixels) for name, folder in folders.items()}

    return {name: _data_set(profile, t, files[name], folders, counters) for name, t in wanted.items()}


def _data_set(
    profile: Profile, training: Training, file: Path | None, models: Mapping[str, Path],
    counters: Callable[[], Mapping[str, TokenCounter]],
) -> DataSet:  # fmt: skip
    """Make one data set, or read back what was found when it was made. file: the user's, or captions of our models;
    None where the rows are rendered. Raises UserError naming bad rows when they are more than the allowed share.
    """
    settings, name = profile.pretraining, training.dataset
    source = drawn_source(training.source(settings))
    processors = {  # what counts tokens: everything of a model's folder but its weights
        setting: value_hash({f.name: file_hash(f) for f in folder.iterdir() if f.suffix in (".json", ".jinja", ".txt")})
        for setting, folder in models.items()
    }
    parts = {
        "rows": training.num_rows(settings),
        "budget": [settings.cutoff_tokens, settings.max_pixels, settings.max_bad_share],
        "seed": profile.seed, "file": file_hash(file) if file else None, "processors": processors,
    }  # fmt: skip
    with Run.open(profile, STAGE, run_name(name), parts, [*RECIPE, *(source.recipe if source else ())]) as run:
        media = folder_of(profile, "media") if source else paths.HOME / settings.media_folder
        if not run.complete:
            rows, found = _rows(profile, training, file, source)
            unfit, longest = token_budgets(rows, media, counters(), settings.cutoff_tokens)
            bad, total = [*found["set_aside"], *unfit.values()], len(rows) + len(found["set_aside"])
            if len(bad) > settings.max_bad_share * total:
                named = "; ".join([*bad[:_NAMED], f"and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else bad)
                raise UserError(
                    f"data set {name}: {len(bad)} of {total} rows cannot be trained on: {named}. Mend or remove them, "
                    "lower pretraining.max_pixels or raise pretraining.cutoff_tokens; pretraining.max_bad_share lets "
                    "some be left."
                )
            kept = [row for place, row in enumerate(rows) if place not in unfit]
            write_rows(run.folder, name, kept)
            images = [[i, (media / i).stat().st_size] for i in sorted({i for row in kept for i in row.images})]
            whole = value_hash([file_hash(run.folder / f"{name}.jsonl"), images])
            values = {"rows": len(kept), "set_aside": bad, "hash": whole, "longest": longest}
            run.finish(values=found | values, n=len(kept), unit="row")
        return DataSet(name, run.folder, media, run.result["values"])


def write_rows(folder: Path, name: str, rows: Sequence[Conversation]) -> None:
    """Write NAME.jsonl and its entry in dataset_info.json. Raises UserError without any row."""
    if not rows:
        raise UserError(f"data set {name!r} would be empty; nothing was written to {shown(folder)}")
    write_atomic(folder / f"{name}.jsonl", "".join(row.model_dump_json() + "\n" for row in rows))
    register(folder / f"{name}.jsonl")


# Rows


def _rows(
    profile: Profile, training: Training, file: Path | None, source: DrawnSource | None
) -> tuple[list[Conversation], dict[str, Any]]:
    """The rows of a data set, sampled by the profile's seed, and what the run tells of others. See `_data_set`."""
    count, chosen = training.num_rows(profile.pretraining), training.captions
    found = {"set_aside": [], "left_out": {}, "captions": None}
    if source is None:
        return read_rows(file, count, profile.seed, found["set_aside"]), found
    images, media, rows = chosen.images if chosen else training.stage, folder_of(profile, "media"), []
    _, seed = _number_and_seed(profile, images)
    folder = f"{images}-{value_hash([seed, code_hashes(source.recipe)])[:8]}"  # of another seed or renderer: another
    if chosen:
        drawn = _pairs(profile, chosen, file, source, found)
    else:
        drawn = track(source.training_rows(images, count, seed), images, count)
    for name, image, turns in drawn:
        path = f"{folder}/{name}.png"
        if not (media / path).is_file():
            write_atomic(media / path, encode(image)[0])
        rows.append(about_image(name, path, turns))
    return rows, found


def _pairs(
    profile: Profile, chosen: CaptionSet, file: Path, source: DrawnSource, found: dict[str, Any]
) -> Iterator[tuple[str, Image, list[tuple[str, str]]]]:
    """Caption pairs of a set, as `DrawnSource.training_rows` gives rows: a seeded sample of the images; loops and cut
    captions are left out, as exports do. found: takes "left_out" and "captions" at the end: of all of them the number,
    every measure of `prism.told`, shares cut and looped.
    """
    from caprl_utils.captions.export import is_sound, read_captions

    written = {row["image_id"]: row for row in read_captions(file)}
    total, seed = _number_and_seed(profile, chosen.images)
    numbers = sample(range(total), min(chosen.num_rows(profile.pretraining), total), profile.seed)
    left_out, known = Counter(), []
    for number in track(numbers, chosen.slug):
        name, image, _, meta = source.image_at(STAGE, number, None, seed)
        row = written.get(name)
        if row is not None:
            known.append(row | told.counts(row["caption"], meta))
        if row is None or not row["caption"].strip():
            left_out["no caption"] += 1
        elif not is_sound(row):
            left_out["loop" if row["looped"] else "cut"] += 1
        elif mark_in(row["caption"]):
            left_out["holds a mark of a medium"] += 1
        else:
            yield name, image, [(prompts.CAPTION, row["caption"])]
    ends = {"cut": [row["finish_reason"] == "length" for row in known], "looped": [row["looped"] for row in known]}
    shares = {end: sum(so) / max(1, len(known)) for end, so in ends.items()}
    captions = {"count": len(known), **told.summary(known), **shares}
    found |= {"left_out": dict(left_out), "captions": captions}


def caption(profile: Profile, pairs_name: str) -> Path:
    """Caption a rendered image set; returns the parquet file, named after what makes it. Stopped, it goes on. Raises
    UserError when the RL training of its captioner is not there.
    """
    from caprl_utils.captions.job import caption_source, make_job

    images, _, captioner = pairs_name.partition("-by-")
    if captioner == CAPRL:
        model = trained_captioner(profile, f"caprl-seed{profile.rl.seeds[0]}")
        if not (Path(model.path) / "config.json").is_file():
            raise UserError(f"no {shown(model.path)}; make it: make 03_caprl_rl_training PROFILE={profile.name}")
    else:
        model = profile.models[CAPTIONERS[captioner]]
    # as Prism does, so that sets are made of what Table 3 measures
    source, prism = image_source(profile, images), profile.prism
    sampling = Sampling(prism.caption_max_tokens, prism.caption_temperature, seed=profile.seed)
    made_by = value_hash(make_job(source, model, sampling))[:8]
    out = folder_of(profile, "captions") / f"{pairs_name}-{made_by}.parquet"
    caption_source(source, out, model, sampling)
    return out


def image_source(profile: Profile, images: str) -> str:
    """A rendered image set as `captions` names it; each has a seed of its own, so no two share an image."""
    number, seed = _number_and_seed(profile, images)
    return f"{profile.pretraining.further.data}:{STAGE}:{number}:{seed}"


def _number_and_seed(profile: Profile, images: str) -> tuple[int, int]:
    """How many images the sets of captions draw from, and their seed."""
    further = profile.pretraining.further
    number = further.num_rows_large if images == "caprl" else further.num_rows
    return number, 100 * profile.seed + 1 + IMAGE_SETS.index(images)


# Files


def read_rows(
    file: Path, count: int | None = None, seed: int = 0, aside: list[str] | None = None
) -> list[Conversation]:  # fmt: skip
    """The rows of a file in LLaVA's form or LLaMA-Factory's, a JSON list or lines; with a count only those drawn. Rows
    of another form, or with other marks than their images', are left out; aside: takes a line on each. Raises UserError
    for no file, no JSON, too few rows.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")  # a foreign byte spoils its row alone
    except FileNotFoundError:
        raise UserError(f"no data file {shown(file)}; the profile's section `pretraining` names it") from None
    if re.match(r"\s*\[", text):
        try:
            found = list(enumerate(json.loads(text), start=1))
        except ValueError as error:
            raise UserError(f"{shown(file)} is not valid JSON ({error})") from None
    else:
        found = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    parsed = [_parse(*row) for row in (found if count is None else sample(found, count, seed))]
    if aside is not None:
        aside += [row for row in parsed if isinstance(row, str)]
    return [row for row in parsed if isinstance(row, Conversation)]


def _parse(number: int, raw: Any) -> Conversation | str:
    """A row, or a line that names it and says why it is set aside. raw: a JSON value, or a line that holds one."""
    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
        images, messages = value.get("images", value.get("image")) or [], value.get("messages")
        if messages is None:
            turns = value["conversations"]
            messages = [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
        images = [images] if isinstance(images, str) else images
        row = Conversation.model_validate({"id": str(value.get("id", number)), "messages": messages, "images": images})
        row.model_dump_json()
    except ValidationError as error:
        reason = "; ".join(found["msg"] for found in error.errors())
    except PydanticSerializationError:
        reason = "its text is not UTF-8"
    except ValueError as error:
        reason = f"not valid JSON ({error})"
    except (KeyError, TypeError, AttributeError) as error:
        forms = "neither `image` and `conversations` (from, value) nor `images` and `messages`"
        reason = f"{forms} (role, content): {error!r}"
    else:
        return f"row {number} (id {row.id}): {row.mark_problem}" if row.mark_problem else row
    return f"row {number}: {reason}"


def sample(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` of the rows, drawn by the seed; a larger count holds a smaller one. Raises UserError for too few."""
    if count > len(rows):
        raise UserError(f"{count} rows are asked for, the data set has {len(rows)}")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[place] for place in sorted(order[:count])]


# The check


class TokenCounter:
    """Tokens of a row as LLaMA-Factory makes them, by a model's folder: image features by its processor, text by its
    chat template.
    """

    def __init__(self, model: Path, max_pixels: int):
        from transformers import AutoProcessor

        self.processor, self.max_pixels = AutoProcessor.from_pretrained(model), max_pixels
        self.image_tokens = functools.lru_cache(maxsize=None)(self._image_tokens)

    def text(self, row: Conversation) -> str:
        """The row as the model sees it, each image as one placeholder."""
        messages = []
        for message in row.messages:
            pieces = re.split(f"({re.escape(PLACEHOLDER)})", message.content)
            shown = [{"type": "image"} if p == PLACEHOLDER else {"type": "text", "text": p} for p in pieces if p]
            messages.append({"role": message.role, "content": shown})
        return self.processor.apply_chat_template(messages, tokenize=False)

    def text_tokens(self, row: Conversation) -> int:
        """Tokens of the text, without the images' placeholders."""
        ids = self.processor.tokenizer(self.text(row), add_special_tokens=False)["input_ids"]
        return len(ids) - len(row.images)

    def _image_tokens(self, width: int, height: int) -> int:
        width, height = resized(width, height, self.max_pixels)
        return self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]


def resized(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Size of an image after LLaMA-Factory's own resizing, which comes before the processor's."""
    if width * height > max_pixels:
        factor = math.sqrt(max_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
    if width * height < MIN_PIXELS:
        factor = math.sqrt(MIN_PIXELS / (width * height))
        width, height = int(width * factor), int(height * factor)
    return width, height


def token_budgets(
    rows: Sequence[Conversation], media: Path, counters: Mapping[str, TokenCounter], cutoff: int
) -> tuple[dict[int, str], dict[str, int]]:
    """Decode every image once and count every row's tokens for each model, of which `cutoff` are allowed. Returns place
    of a row (ids may repeat) -> why it cannot be trained on; model -> tokens of the longest.
    """
    bad, longest = {}, dict.fromkeys(counters, 0)

    def sizes_of(row: Conversation) -> list[tuple[int, int]] | str:
        found = []
        for path in (media / name for name in row.images):
            try:
                found.append(image_size(path))
            except FileNotFoundError:
                return f"no image {shown(path)}"
            except BadImageError as error:
                return f"image {shown(path)}: {error}"
        return found

    for place, (row, sizes) in enumerate(zip(track(rows, "token budget"), in_threads(sizes_of, rows), strict=True)):
        if isinstance(sizes, str):
            bad[place] = f"row {row.id}: {sizes}"
            continue
        for name, counter in counters.items():
            images = sum(counter.image_tokens(*size) for size in sizes)
            tokens = counter.text_tokens(row) + images
            if tokens > cutoff:
                bad[place] = f"row {row.id}: {tokens} tokens ({images} of images) are over the cutoff {cutoff}"
            else:
                longest[name] = max(longest[name], tokens)
    return bad, longest


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image that can be decoded, upright. Raises BadImageError, and FileNotFoundError."""
    with peek(path) as image:
        width, height = image.size[::-1] if orientation(image) >= 5 else image.size
    open_image(path, MIN_PIXELS)  # read whole, a JPEG at an eighth of its size
    if is_strip((width, height)):
        raise BadImageError(BadImage.TOO_NARROW, f"{width} x {height}")
    return width, height
