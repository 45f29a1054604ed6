"""Each image of a batch is prepared and seen once, however many requests show it.

Curation asks twenty questions about one image and Prism writes four captions of it: preparing and encoding
images would take most of the time. In the Qwen-VL family (`image_grid_thw`) the vision tower runs once per
distinct image as well; other families share the preparation only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image


class DistinctImages:
    """Stands in for a processor's image processor; the same object twice in a batch is prepared once.

    ``rows``: for each image asked for, its place among the distinct ones; set by each call.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, images: Sequence[Image], **options: Any) -> Any:
        places: dict[int, int] = {}
        self.rows = [places.setdefault(id(image), len(places)) for image in images]
        distinct = [images[self.rows.index(place)] for place in range(len(places))]
        prepared = self._inner(images=distinct, **options)
        if "image_grid_thw" in prepared:
            prepared["image_grid_thw"] = prepared["image_grid_thw"][self.rows]
        else:
            prepared["pixel_values"] = prepared["pixel_values"][self.rows]
        return prepared


def share_images(processor: Any, model: Any) -> None:
    """Make `processor` prepare, and `model` (Qwen-VL family) see, each distinct image of a batch once."""
    distinct = DistinctImages(processor.image_processor)
    processor.image_processor = distinct
    if "image_grid_thw" not in processor.model_input_names:
        return
    inner = model.model.get_image_features

    def features(pixel_values: Any, image_grid_thw: Any, **options: Any) -> Any:
        first = [distinct.rows.index(place) for place in range(max(distinct.rows) + 1)]
        seen = inner(pixel_values, image_grid_thw[first], **options)
        seen.pooler_output = [seen.pooler_output[place] for place in distinct.rows]
        return seen

    model.model.get_image_features = features
