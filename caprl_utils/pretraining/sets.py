"""Which trainings stand behind Table 1, Table 2 and Figure 4; one that several rows begin with is made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from caprl_utils import paths
from caprl_utils.schema import Pretraining, Profile

STAGE = "pretraining"  # of runs
VANILLA, CAPRL = "Vanilla", "caprl"
STAGES = ("align", "further", "sft")


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

    def num_rows(self, settings: Pretraining) -> int:
        """How many rows it has."""
        further = settings.further
        return max(1, round((further.num_rows_large if self.large else further.num_rows) * self.share))


SHAREGPT4V = CaptionSet("ShareGPT4V-1M", "sharegpt4v", "sharegpt4v")
DENSEFUSION = CaptionSet("DenseFusion-1M", "densefusion", "densefusion")
CAPRL_1M = CaptionSet("CapRL-1M", "caprl", CAPRL)
CAPRL_5M = CaptionSet("CapRL-5M", "caprl", CAPRL, large=True)
CAPRL_SHAREGPT4V = CaptionSet("CapRL-ShareGPT4V-1M", "sharegpt4v", CAPRL)
CAPRL_DENSEFUSION = CaptionSet("CapRL-DenseFusion-1M", "densefusion", CAPRL)
TABLE_1 = (None, SHAREGPT4V, DENSEFUSION, CAPRL_1M, CAPRL_5M)  # None: Vanilla
TABLE_2 = (None, SHAREGPT4V, CAPRL_SHAREGPT4V, DENSEFUSION, CAPRL_DENSEFUSION)
FIGURE_4 = (DENSEFUSION, CAPRL_1M)


@dataclass(frozen=True)
class Training:
    """One stage of one row: a run runs/<profile>/pretraining/<name>. start: the training before it; None: the assembled
    model. captions: of stage "further" only. seed: of the order of its data and of its projector.
    """

    name: str
    setting: str
    stage: str
    start: str | None = None
    captions: CaptionSet | None = None
    seed: int = 0

    @property
    def dataset(self) -> str:
        """Name of the data set that it reads."""
        return self.captions.slug if self.captions else self.stage

    def source(self, settings: Pretraining) -> str:
        """Where its rows come from: a file, or a source that draws them."""
        return getattr(settings, self.stage).data.format(name=self.captions.name if self.captions else "")

    def num_rows(self, settings: Pretraining) -> int:
        """Rows that it trains on."""
        return self.captions.num_rows(settings) if self.captions else getattr(settings, self.stage).num_rows


def folder_of(profile: Profile, name: str) -> Path:
    """The run folder of a training."""
    return paths.RUNS / profile.name / STAGE / name


def model_name(setting: str, seed: int) -> str:
    """Name of an assembled model."""
    return f"{setting}-seed{seed}"


def final_name(setting: str, captions: CaptionSet | None, seed: int) -> str:
    """Name of the last training of a row, and of its evaluation."""
    return f"{setting}-{captions.slug if captions else VANILLA.lower()}-sft-seed{seed}"


def growth_sets(settings: Pretraining) -> list[CaptionSet]:
    """Figure 4's caption sets between none and all, the smallest first."""
    shares = sorted({share for share in settings.further.growth if 0 < share < 1})
    return [replace(base, share=share) for share in shares for base in FIGURE_4]


def all_trainings(settings: Pretraining, items: Sequence[str] = ()) -> list[Training]:
    """All trainings that the items (the settings' own by default) need, each once, after the one it starts from."""
    found = dict.fromkeys(training for row in _rows(settings, items) for training in row_trainings(*row))
    return sorted(found, key=lambda t: STAGES.index(t.stage))  # stable: rows stay in order


def final_names(settings: Pretraining, items: Sequence[str] = ()) -> list[str]:
    """Names of the trainings that are evaluated."""
    return [final_name(*row) for row in _rows(settings, items)]


def row_trainings(setting: str, captions: CaptionSet | None, seed: int) -> list[Training]:
    """The trainings of one row with one seed, in order."""
    made = [Training(f"{setting}-align-seed{seed}", setting, "align", seed=seed)]
    if captions is not None:
        name = f"{setting}-{captions.slug}-further-seed{seed}"
        made.append(Training(name, setting, "further", made[0].name, captions, seed))
    return [*made, Training(final_name(setting, captions, seed), setting, "sft", made[-1].name, None, seed)]


def _rows(settings: Pretraining, items: Sequence[str]) -> list[tuple[str, CaptionSet | None, int]]:
    """Setting, caption set and seed of every training that is evaluated, each once, seed after seed."""
    items, first = items or settings.items, settings.settings[0]
    shown = {
        "table1": [(setting, captions) for setting in settings.settings for captions in TABLE_1],
        "table2": [(first, captions) for captions in TABLE_2],
        "figure4": [(first, captions) for captions in (None, *FIGURE_4, *growth_sets(settings))],
    }
    rows = dict.fromkeys(row for item, of_item in shown.items() if item in items for row in of_item)
    return [(*row, seed) for seed in settings.seeds for row in rows]
