"""What every loader returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from caprl_utils.errors import UserError
from caprl_utils.records import Sample

MAX_REJECTED_SHARE = 0.05  # ours: beyond it the data are of another layout than expected


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
