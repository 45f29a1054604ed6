"""Where the captions of a Prism evaluation come from: a model, or a pseudo-captioner that bounds it.

Floors: an empty caption (what the question alone gives away) and another image's caption (what a fluent
but unrelated text gives away). Ceilings: the complete true facts (what the reader can reach, mini world
only) and the image itself (what a VLM answers when it looks, so the caption is no bottleneck). All are
ours; the paper's table has none of them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from caprl_utils import prompts
from caprl_utils.captions import Caption, caption_id, caption_images
from caprl_utils.errors import UserError
from caprl_utils.models.base import Backend, Sampling
from caprl_utils.paths import shown
from caprl_utils.runs import RowStore, load_result

if TYPE_CHECKING:
    from PIL.Image import Image

    from caprl_utils.prism.loaders import Sample


CAPTIONS_STAGE = "captions"


@dataclass(frozen=True)
class PrismImage:
    """One image to caption: `id` is unique over all benchmarks, `true_caption` is there in the mini world
    only.
    """

    id: str
    benchmark: str
    open: "Callable[[], Image]"
    true_caption: str | None = None


class CaptionSource(Protocol):
    """Gives every image its captions."""

    name: str
    looks: bool  # True: the reader gets the image instead of a caption

    def fingerprint(self) -> Mapping[str, Any]:
        """JSON values that change the captions, for the run's key."""

    def captions(self, images: Sequence[PrismImage]) -> Mapping[str, list[Caption]]:
        """At least one caption for every image id."""


class ModelCaptions:
    """Captions written by a model, kept in a row store."""

    looks = False

    def __init__(self, backend: Backend, sampling: Sampling, prompt: str = prompts.CAPTION):
        self.name, self.backend, self.sampling, self.prompt = backend.name, backend, sampling, prompt

    def fingerprint(self) -> Mapping[str, Any]:
        """The model, the sampling and the instruction."""
        return {"model": self.backend.model_hash, "sampling": asdict(self.sampling), "prompt": self.prompt}

    def write(self, images: Sequence[PrismImage], store: RowStore) -> Mapping[str, list[Caption]]:
        """`sampling.n` captions of every image; each image is captioned once, however many questions it
        has.
        """
        pairs = [(image.id, image.open) for image in images]
        return caption_images(pairs, self.backend, self.sampling, store, self.prompt).captions

    def draw(self, image: PrismImage) -> list[Caption]:
        """`sampling.n` captions of one image, kept nowhere."""
        with TemporaryDirectory() as folder, RowStore(Path(folder) / "captions.jsonl") as store:
            return self.write([image], store)[image.id]


class EmptyCaptions:
    """Floor: the caption is empty."""

    name, looks = "empty caption", False

    def fingerprint(self) -> Mapping[str, Any]:
        """Nothing varies."""
        return {"source": "empty"}

    def captions(self, images: Sequence[PrismImage]) -> Mapping[str, list[Caption]]:
        """One empty caption an image."""
        return {image.id: [_written(image.id, 0, "", self.name, len)] for image in images}


class TrueCaptions:
    """Ceiling: every fact of the image, from the benchmark itself."""

    name, looks = "complete true facts", False

    def __init__(self, count_tokens: Callable[[str], int] | None = None):
        self.count_tokens = count_tokens

    def fingerprint(self) -> Mapping[str, Any]:
        """Nothing varies; the facts are part of the samples' own hash."""
        return {"source": "true", "counted": self.count_tokens is not None}

    def captions(self, images: Sequence[PrismImage]) -> Mapping[str, list[Caption]]:
        """One complete caption an image. Raises UserError for a benchmark that knows no facts."""
        without = sorted({image.benchmark for image in images if not image.true_caption})
        if without:
            raise UserError(
                f"no true captions for {', '.join(without)}: only rendered images come with facts"
            )
        return {
            image.id: [_written(image.id, 0, image.true_caption, self.name, self.count_tokens)]
            for image in images
        }


class OtherImageCaptions:
    """Floor: each image gets the captions of the next image of its benchmark, from a finished Prism run."""

    looks = False

    def __init__(self, run_folder: Path):
        self.name, self.run_folder = "another image's caption", run_folder
        self.key = load_result(run_folder)["key"]

    def fingerprint(self) -> Mapping[str, Any]:
        """The run that the captions were taken from."""
        return {"source": "other image", "run": self.key}

    def captions(self, images: Sequence[PrismImage]) -> Mapping[str, list[Caption]]:
        """Captions moved on by one image inside each benchmark; a benchmark of one image has no other."""
        there = _captions_of(self.run_folder)
        moved: dict[str, list[Caption]] = {}
        for benchmark in dict.fromkeys(image.benchmark for image in images):
            ids = [image.id for image in images if image.benchmark == benchmark]
            if len(ids) < 2:
                raise UserError(f"{benchmark} has one image, so there is no other image's caption")
            for image_id, other in zip(ids, [*ids[1:], ids[0]], strict=True):
                moved[image_id] = [
                    row.model_copy(update={"id": caption_id(image_id, row.index), "image_id": image_id})
                    for row in _of(there, other, self.run_folder)
                ]
        return moved


class CutCaptions:
    """Control for length: a run's captions, each cut to the words that another run's caption of the image
    has.

    Whole sentences are kept while they fit; where not even the first fits, its first words.
    """

    looks = False

    def __init__(self, run_folder: Path, shorter: Path, count_tokens: Callable[[str], int] | None = None):
        self.name = f"{run_folder.name} cut to the length of {shorter.name}"
        self.folders, self.count_tokens = (run_folder, shorter), count_tokens
        self.keys = [load_result(folder)["key"] for folder in self.folders]

    def fingerprint(self) -> Mapping[str, Any]:
        """The two runs."""
        return {"source": "cut", "runs": self.keys, "counted": self.count_tokens is not None}

    def captions(self, images: Sequence[PrismImage]) -> Mapping[str, list[Caption]]:
        """As many captions an image as both runs have."""
        long, short = (_captions_of(folder) for folder in self.folders)
        found = {}
        for image in images:
            rows = zip(
                _of(long, image.id, self.folders[0]), _of(short, image.id, self.folders[1]), strict=False
            )
            found[image.id] = [
                _written(image.id, a.index, cut(a.text, len(b.text.split())), self.name, self.count_tokens)
                for a, b in rows
            ]
        return found


def cut(text: str, num_words: int) -> str:
    """The first whole sentences of a text that have at most `num_words` words; else its first words."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        if len(" ".join([*kept, sentence]).split()) > num_words:
            break
        kept.append(sentence)
    return " ".join(kept) if kept else " ".join(text.split()[:num_words])


class ImageItself:
    """Ceiling: the reader, a VLM, looks at the image (direct VQA)."""

    name, looks = "the image itself", True

    def fingerprint(self) -> Mapping[str, Any]:
        """Nothing varies but the reader, which the run's key names."""
        return {"source": "image"}

    def captions(self, images: Sequence[PrismImage]) -> Mapping[str, list[Caption]]:
        """One placeholder an image, so that all rows have the same shape."""
        return {image.id: [_written(image.id, 0, "", self.name)] for image in images}


def controls(
    samples: "Sequence[Sample]",
    base: Path,
    trained: Sequence[Path],
    count_tokens: Callable[[str], int] | None = None,
) -> dict[str, CaptionSource]:
    """Floors, ceilings and the control for length that need no captioner, by run name.

    base, trained: finished Prism runs; base's captions are moved around for the other-image floor, those of
    each in trained are cut to base's length. The true facts come only where every sample has them.
    count_tokens: see `captioning.token_counter`.
    """
    found: dict[str, CaptionSource] = {
        "floor-empty": EmptyCaptions(),
        "floor-other-image": OtherImageCaptions(base),
        **{f"{run.name}-cut": CutCaptions(run, base, count_tokens) for run in trained},
    }
    if all(sample.meta.get("true_caption") for sample in samples):
        found["ceiling-true-facts"] = TrueCaptions(count_tokens)
    return found


def _captions_of(run_folder: Path) -> dict[str, list[Caption]]:
    """Image id -> captions of a Prism run, by index."""
    found: dict[str, list[Caption]] = {}
    folder = run_folder.parents[1] / CAPTIONS_STAGE / run_folder.name
    for row in RowStore(folder / "captions.jsonl").read(Caption):
        found.setdefault(row.image_id, []).append(row)
    return {image_id: sorted(rows, key=lambda row: row.index) for image_id, rows in found.items()}


def _of(captions: Mapping[str, list[Caption]], image_id: str, run_folder: Path) -> list[Caption]:
    if image_id not in captions:
        raise UserError(f"{shown(run_folder)} has no captions of image {image_id}")
    return captions[image_id]


def _written(
    image_id: str, index: int, text: str, name: str, count_tokens: Callable[[str], int] | None = None
) -> Caption:
    return Caption(
        id=caption_id(image_id, index), image_id=image_id, index=index, text=text, model=name, model_hash="",
        num_tokens=count_tokens(text) if count_tokens else None, finish_reason="stop",
    )  # fmt: skip
