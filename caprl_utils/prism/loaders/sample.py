"""What every loader returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

MAX_REJECTED_SHARE = 0.05  # ours: beyond it the data are of another layout than expected


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one or several images.

    images: one function per image; calling it opens the image (RGB).
    question: the question as the data hold it, without an answer-format instruction of ours.
    options: option texts in letter order, without letters; empty where the question has none or holds
        them in its text.
    gold: as the metric takes it: a letter, a text, or the list of accepted answers.
    meta: what metric, prompts and reports need; see `scoring.Row`. `image_id` names the image, which is
        the unit of the statistics.
    """

    id: str
    benchmark: str
    images: tuple[Callable[[], Image.Image], ...]
    question: str
    gold: Any
    options: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def load_images(self) -> list[Image.Image]:
        """All images, opened now. Raises UserError naming the row for one that is missing or broken."""
        return [load() for load in self.images]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was set aside, and why."""

    row: str
    reason: str


@dataclass(frozen=True, slots=True)
class Loaded(Sequence[Sample]):
    """The samples of one benchmark, the rows set aside, and where they came from."""

    benchmark: str
    samples: tuple[Sample, ...]
    rejected: tuple[Rejected, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        return self.samples[index]

    def require(self, max_rejected_share: float = MAX_REJECTED_SHARE) -> Loaded:
        """Itself; UserError if there are no samples or too many rows were set aside."""
        total = len(self.samples) + len(self.rejected)
        first = f"; first: {self.rejected[0].row}: {self.rejected[0].reason}" if self.rejected else ""
        if not self.samples:
            where = f"benchmark {self.benchmark!r}: no usable row of {total}"
            raise UserError(f"{where} in {_source(self)}{first}")
        if len(self.rejected) > max_rejected_share * total:
            raise UserError(
                f"benchmark {self.benchmark!r}: {len(self.rejected)} of {total} rows of {_source(self)} were "
                f"set aside, more than {max_rejected_share:.0%}{first}. Check that the files have the "
                "expected layout, or raise max_rejected_share"
            )
        return self


def _source(loaded: Loaded) -> str:
    return str(loaded.source.get("path") or loaded.source.get("dataset") or "its source")
