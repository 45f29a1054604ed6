"""What plug-in packages add under names that configs use: image sources that are drawn, and models made on demand.

Every other module looks a name up here and imports no plug-in itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

PLUGINS = ("caprl_utils.mini",)  # their import enters them below


@dataclass(frozen=True)
class DrawnSource:
    """An image source that draws: any image by its number, the same at every call. image_at(split, number, kinds,
    seed): (id, RGB image, kind, meta). meta: what is true of the image, as far as the source knows it: "true_caption";
    "facts" and "known" (what the image shows, and what of it can be guessed), key -> value; "asked", question -> key;
    "world", the source's name. training_rows(stage, count, seed): (id, image, [(user turn, assistant turn)]) for a
    stage of pretraining. statements(caption): what each sentence states, (key, value), or None for a sentence of no
    known form; neither the introduction nor a sentence that was cut off is one. sentence(key, value): the sentence that
    states it. recipe: the modules that draw.
    """

    image_at: Callable[[str, int, Sequence[str] | None, int], tuple[str, Image, str, dict[str, Any]]]
    training_rows: Callable[[str, int, int], Iterator[tuple[str, Image, list[tuple[str, str]]]]]
    statements: Callable[[str], list[tuple[str, str] | None]]
    sentence: Callable[[str, str], str]
    recipe: tuple[str, ...]


SOURCES: dict[str, DrawnSource] = {}
MODELS: dict[str, Callable[[], Path]] = {}  # model path -> what makes its folder when it is not there


@cache
def _load_plugins() -> None:
    for name in PLUGINS:
        import_module(name)


def drawn_source(source: str) -> DrawnSource | None:
    """The source of this name ("NAME" or "NAME:SPLIT:..."), or None: then it is read from files."""
    _load_plugins()
    return SOURCES.get(source.partition(":")[0])


def world_of(meta: Mapping[str, Any]) -> DrawnSource | None:
    """The source that drew an image and knows its facts, by the image's (or sample's) meta; None for any other."""
    return drawn_source(meta["world"]) if "facts" in meta else None


def maker_of(path: str) -> Callable[[], Path] | None:
    """What gives the folder of a model that a plug-in makes on demand, or None for a path that it does not know."""
    _load_plugins()
    return MODELS.get(path)
