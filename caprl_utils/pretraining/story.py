"""What notebook 05 shows: one image with its captions from several sets, and the losses of all trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from caprl_utils import paths
from caprl_utils.image_sources import read_source
from caprl_utils.images import open_image
from caprl_utils.pretraining.data import DataSet, image_source, read_rows
from caprl_utils.pretraining.llamafactory import TRAINS
from caprl_utils.pretraining.sets import CaptionSet, Training
from caprl_utils.prism.gallery import card
from caprl_utils.registry import drawn_source
from caprl_utils.schema import Profile


def captions_side_by_side(
    profile: Profile, data: Mapping[CaptionSet, DataSet], count: int, names: Mapping[str, str]
) -> list[str]:
    """A card for `count` images of each image set, with the captions of all sets that describe them. names: of sets, by
    their slugs, here and below.
    """
    captions: dict[str, dict[str, dict[str, str]]] = {}  # image set -> image -> caption set -> caption
    for chosen, found in data.items():
        for row in read_rows(found.folder / f"{found.name}.jsonl"):
            if row.images:
                of_image = captions.setdefault(chosen.images, {}).setdefault(row.images[0], {})
                of_image[names[chosen.slug]] = row.messages[-1].content
    media, cards = next(iter(data.values())).media, []
    for images, found in captions.items():
        drawn = drawn_source(profile.pretraining.further.data)
        metas = {item.id: item.meta for item in read_source(image_source(profile, images))} if drawn else {}
        most_described = sorted(found, key=lambda file: -len(found[file]))[:count]
        for file in most_described:
            cards.append(card(open_image(media / file), found[file], metas.get(Path(file).stem, {})))
    return cards


def draw_losses(profile: Profile, trainings: Sequence[Training], setting: str, names: Mapping[str, str]) -> None:
    """Loss over the steps of all trainings of a setting, a panel a stage; thin: rows trained again by other seeds."""
    figure = plt.figure(figsize=(10, 3.4), layout="constrained")
    colours: dict[str, str] = {}
    for axes, stage in zip(figure.subplots(1, len(TRAINS)), TRAINS, strict=True):
        seen: set[str] = set()
        for training in (one for one in trainings if (one.stage, one.setting) == (stage, setting)):
            file = paths.RUNS / profile.name / "pretraining" / training.name / "curve.jsonl"
            curve = pd.read_json(file, lines=True)
            row = training.name.removeprefix(f"{setting}-").rpartition(stage)[0].strip("-") or "what all begin with"
            row = names.get(row, row)
            style = {"linewidth": 0.7} if row in seen else {"linewidth": 1.6, "label": row}
            axes.plot(curve["step"], curve["loss"], color=colours.setdefault(row, f"C{len(colours)}"), **style)
            seen.add(row)
        axes.set(title=stage, xlabel="step", ylabel="loss")
    handles = {text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    plt.show()
