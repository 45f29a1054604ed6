"""See each image once: the captions of one image share one pass of the image processor and of the vision tower.

GRPO shows every image `group_size` times, in the rollout and in each forward of the loss. The numbers are
those of separate passes (the features are the same tensors, gradients add up); with small images and short
captions the vision tower would otherwise take a third of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

FAMILIES = ("qwen2_vl", "qwen2_5_vl")  # Qwen3-VL's tower feeds further layers of the language model
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorPil")  # all Qwen-VL families


def share_images(model: PreTrainedModel) -> None:
    """Make a model of FAMILIES encode each distinct image of a batch once; others stay as they are."""
    if model.config.model_type not in FAMILIES:
        return
    inner = model.model.get_image_features

    def features(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **options: Any) -> Any:
        import torch

        images = torch.split(pixel_values, image_grid_thw.prod(-1).tolist())
        rows = places(images)
        first = [rows.index(place) for place in range(max(rows) + 1)]
        if len(first) == len(rows):
            return inner(pixel_values, image_grid_thw, **options)
        seen = inner(torch.cat([images[i] for i in first]), image_grid_thw[first], **options)
        seen.pooler_output = [seen.pooler_output[place] for place in rows]
        return seen

    model.model.get_image_features = features


def places(images: tuple[torch.Tensor, ...]) -> list[int]:
    """For each image its place among the distinct ones, in order of first appearance."""
    import torch

    sums = torch.stack([image.sum() for image in images]).tolist()
    found: list[int] = []  # index of each distinct image
    rows = []
    for i, image in enumerate(images):
        same = (p for p, j in enumerate(found) if sums[j] == sums[i] and torch.equal(images[j], image))
        place = next(same, len(found))
        if place == len(found):
            found.append(i)
        rows.append(place)
    return rows


@contextmanager
def process_once(processor: ProcessorMixin) -> Iterator[None]:
    """Within the block, Qwen's image processors prepare each distinct image of a call once; others are as ever."""
    tool = processor.image_processor
    if type(tool).__name__ not in _PROCESSORS:
        yield
        return
    inner = tool.preprocess

    def preprocess(images: Any, *args: Any, **options: Any) -> Any:
        import torch
        from transformers.image_utils import make_flat_list_of_images

        flat = make_flat_list_of_images(images)
        keys = [(image.mode, image.size, image.tobytes()) for image in flat]
        distinct = {key: image for key, image in zip(keys, flat, strict=True)}
        place = {key: number for number, key in enumerate(distinct)}
        rows = [place[key] for key in keys]
        batch = inner(list(distinct.values()), *args, **options)
        grid = torch.as_tensor(batch["image_grid_thw"])
        patches = torch.split(torch.as_tensor(batch["pixel_values"]), grid.prod(-1).tolist())
        batch["pixel_values"] = torch.cat([patches[row] for row in rows])
        batch["image_grid_thw"] = grid[rows]
        return batch

    tool.preprocess = preprocess
    try:
        yield
    finally:
        del tool.preprocess  # an attribute of its own would be written into checkpoints
