"""Which trainings stand behind Table 1, Table 2 and Figure 4; one that several rows begin with is made once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from caprl_utils.schema import Pretraining

VANILLA = "Vanilla"
CAPRL = "caprl"


@dataclass(frozen=True)
class CaptionSet:
    """One caption set. captioner: "caprl", or a baseline whose own captions they are. large: all images of the image
    set instead of a million. share: of the rows (Figure 4).
    """

    name: str
    images: str
    captioner: str
    large: bool = False
    share: float = 1.0

    @property
    def slug(self) -> str:
        """Name in paths."""
        return self.name.lower() + (f"-x{self.share:g}" if self.share < 1 else "")

    @property
    def pairs_name(self) -> str:
        """The captions that it draws from: a smaller set is a sample of the largest with those images."""
        return f"{self.images}-by-{self.captioner}"


SHAREGPT4V = CaptionSet("ShareGPT4V-1M", "sharegpt4v", "sharegpt4v")
DENSEFUSION = CaptionSet("DenseFusion-1M", "densefusion", "densefusion")
CAPRL_1M = CaptionSet("CapRL-1M", "caprl", CAPRL)
CAPRL_5M = CaptionSet("CapRL-5M", "caprl", CAPRL, large=True)
CAPRL_SHAREGPT4V = CaptionSet("CapRL-ShareGPT4V-1M", "sharegpt4v", CAPRL)
CAPRL_DENSEFUSION = CaptionSet("CapRL-DenseFusion-1M", "densefusion", CAPRL)
TABLE_1 = (None, SHAREGPT4V, DENSEFUSION, CAPRL_1M, CAPRL_5M)  # None: Vanilla
TABLE_2 = (None, SHAREGPT4V, CAPRL_SHAREGPT4V, DENSEFUSION, CAPRL_DENSEFUSION)
FIGURE_4 = (DENSEFUSION, CAPRL_1M)

# Who captions a set where the data are rendered: a role of the profile's models. CapRL's is a training's result.
CAPTIONERS = {"sharegpt4v": "policy", "densefusion": "captioner_7b"}
IMAGE_SETS = ("align", "sharegpt4v", "densefusion", "caprl", "sft")


@dataclass(frozen=True)
class Training:
    """One stage of one row: a run runs/<profile>/pretraining/<name>. start: the training before it; None: the assembled
    model. captions: of stage "further" only. seed: of the order of its data and of its projector; None: the profile's.
    """

    name: str
    setting: str
    stage: str
    start: str | None
    captions: CaptionSet | None = None
    seed: int | None = None

    @property
    def model(self) -> str:
        """Name of the assembled model that it or its first predecessor starts from."""
        return seeded(self.setting, self.seed)

    def num_rows(self, settings: Pretraining) -> int:
        """Rows that it trains on."""
        own = getattr(settings, self.stage).num_rows
        return own if self.captions is None else rows_of(self.captions, settings)


def rows_of(captions: CaptionSet, settings: Pretraining) -> int:
    """Rows of a caption set."""
    further = settings.further
    return max(1, round((further.num_rows_large if captions.large else further.num_rows) * captions.share))


def seeded(name: str, seed: int | None) -> str:
    """A name with its seed; the profile's own seed (None) is not named."""
    return name if seed is None else f"{name}-seed{seed}"


def seeds_of(settings: Pretraining, setting: str) -> list[int | None]:
    """Seeds of a setting's trainings: the profile's (None), then those of more_seeds."""
    return [None, *settings.further_seeds(setting)]


def final_name(setting: str, captions: CaptionSet | None, seed: int | None = None) -> str:
    """Name of the last training of a row, and of its evaluation."""
    return seeded(f"{setting}-{VANILLA.lower() if captions is None else captions.slug}-sft", seed)


def growth_sets(settings: Pretraining) -> list[CaptionSet]:
    """Figure 4's caption sets between none and all, the smallest first."""
    shares = sorted({share for share in settings.further.growth if 0 < share < 1})
    return [replace(base, share=share) for share in shares for base in FIGURE_4]


def all_trainings(settings: Pretraining, items: Sequence[str] | None = None) -> list[Training]:
    """All trainings that the items (the settings' own by default) need, each once, after the one it starts from."""
    rows = _seeded_rows(settings, items or settings.items)
    found = dict.fromkeys(training for row in rows for training in row_trainings(*row))
    order = ("align", "further", "sft")
    return sorted(found, key=lambda t: order.index(t.stage))  # stable: rows stay in order


def final_names(settings: Pretraining, items: Sequence[str] | None = None) -> list[str]:
    """Names of the trainings that are evaluated."""
    return list(dict.fromkeys(final_name(*row) for row in _seeded_rows(settings, items or settings.items)))


def row_trainings(setting: str, captions: CaptionSet | None, seed: int | None = None) -> list[Training]:
    """The trainings of one row with one seed, in order."""
    made = [Training(seeded(f"{setting}-align", seed), setting, "align", None, None, seed)]
    if captions is not None:
        name = seeded(f"{setting}-{captions.slug}-further", seed)
        made.append(Training(name, setting, "further", made[0].name, captions, seed))
    return [*made, Training(final_name(setting, captions, seed), setting, "sft", made[-1].name, None, seed)]


def _seeded_rows(settings: Pretraining, items: Sequence[str]) -> Iterator[tuple[str, CaptionSet | None, int | None]]:
    """Rows with the profile's seed, then the same with others."""
    first, rows = settings.settings[0], []
    if "table1" in items:
        rows += [(setting, captions) for setting in settings.settings for captions in TABLE_1]
    for item, chosen in (("table2", TABLE_2), ("figure4", (None, *FIGURE_4, *growth_sets(settings)))):
        rows += [(first, captions) for captions in chosen if item in items]
    rows = list(dict.fromkeys(rows))
    yield from ((*row, None) for row in rows)
    yield from ((*row, seed) for row in rows for seed in seeds_of(settings, row[0])[1:])
