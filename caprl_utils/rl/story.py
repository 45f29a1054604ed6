"""What notebook 03 shows: images with their questions, captions to compare by hand, and the course of trainings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt

from caprl_utils.image_sources import open_images
from caprl_utils.images import BadImageError
from caprl_utils.prism.gallery import card
from caprl_utils.records import Question
from caprl_utils.registry import drawn_source, world_of
from caprl_utils.rl.data import data_file, load_data
from caprl_utils.schema import Experiment, Profile

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL.Image import Image


@dataclass(frozen=True)
class Example:
    """An image of the training set with its questions, and what is known of it (`registry.DrawnSource`)."""

    id: str
    image: Image
    questions: list[Question]
    meta: Mapping[str, Any] = field(default_factory=dict)


def load_examples(profile: Profile, experiment: Experiment, count: int) -> list[Example]:
    """The first `count` images of the run's data set that can be opened."""
    file, limit = data_file(profile, experiment.data), profile.models.policy.max_pixels
    data = load_data(file, experiment.data, profile.rl.num_images, max_pixels=limit)
    drawn = open_images(profile, "rl") if drawn_source(profile.images.source) else ()
    known, found = {image.id: image.meta for image in drawn}, []
    for row in data.rows:
        with suppress(BadImageError):
            image, asked = data.pictures(row["image"]), [Question(**q) for q in row["questions"]]
            found.append(Example(row["id"], image, asked, known.get(row["id"], {})))
        if len(found) == count:
            break
    return found


def statement(question: str, answer: str, meta: Mapping[str, Any] | None = None) -> str:
    """A sentence that answers a question: "What is the topic?", "rain" -> "The topic is rain."."""
    if key := (meta or {}).get("asked", {}).get(question):
        return world_of(meta).sentence(key, answer)
    match = re.match(r"What is the (.+)\?$", question)
    return f"The {match[1]} is {answer}." if match else f"{question} {answer}."


def half(caption: str) -> str:
    """The first half of a caption's sentences: true, and terse."""
    sentences = re.split(r"(?<=\.)\s+", caption.strip())
    return " ".join(sentences[: max(1, len(sentences) // 2)])


def everything(example: Example) -> str:
    """A caption that claims every option of every question: what a policy writes that hacks a weak reader."""
    return " ".join(statement(q.question, option, example.meta) for q in example.questions for option in q.options)


def true_caption(example: Example) -> str:
    """A true caption of the image where its source knows it, else what the questions' answers state."""
    stated = " ".join(statement(q.question, q.answer_text, example.meta) for q in example.questions)
    return example.meta.get("true_caption") or stated


def compared(example: Example, found: Mapping[str, tuple[str, Sequence[float]]]) -> str:
    """A card of an image with captions by name, each with the chances that its reader answers the image's questions."""
    asked = [f"{question.question} {question.answer_text}" for question in example.questions]
    ticks = {n: [(bool(p > 0.5), q) for q, p in zip(asked, ps, strict=True)] for n, (_, ps) in found.items()}
    return card(example.image, {name: text for name, (text, _) in found.items()}, example.meta, ticks)


_BLUE = "#0b3c6f"


def draw_curve(curve: DataFrame) -> None:
    """Reward, caption length and what GRPO learns from over the steps; heavy: centred mean of nine steps."""
    lines = {  # column -> panel, style, label
        "reward": (0, "-", None), "completion_tokens": (1, "-", None), "group_std": (2, "-", "spread of the rewards"),
        "zero_variance_share": (2, "--", "share of groups without any"),
    }  # fmt: skip
    rows, panels = curve.set_index("step"), plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")[1]
    for name, (panel, style, label) in lines.items():
        axes, smooth = panels[panel], rows[name].rolling(9, min_periods=1, center=True).mean()
        axes.plot(rows.index, rows[name], style, color=_BLUE, alpha=0.25)
        axes.plot(rows.index, smooth, style, color=_BLUE, label=label)
    for axes, title in zip(panels, ("Reward", "Tokens a caption", "Within a group"), strict=True):
        axes.set(title=title, xlabel="training step")
        axes.set_ylim(bottom=0 if axes.get_ylim()[0] > 0 else None)
    axes.legend(frameon=False)
    plt.show()


def draw_trainings(rows: DataFrame, base: float) -> None:
    """Prism accuracy after each training of `experiments.run_all`, a dot a seed; dashed: before any (base)."""
    names = rows["run"].str.rpartition("-seed")[0]
    axes = plt.subplots(figsize=(8, 0.28 * names.nunique() + 1), layout="constrained")[1]
    axes.plot(100 * rows["accuracy"][::-1], names[::-1], "o", color=_BLUE)
    axes.axvline(100 * base, color="#777777", linestyle="--")
    axes.set(xlabel="Prism accuracy (%); dashed: the base", xlim=(0, 100), ylim=(-0.6, names.nunique() - 0.4))
    axes.grid(axis="y", alpha=0.3)
    plt.show()
