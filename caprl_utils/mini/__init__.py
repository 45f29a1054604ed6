"""The mini world: rendered images with known facts, and small models of the real architectures trained on them.

It enters itself into `caprl_utils.registry` and configs/benchmarks.yaml; nothing else in the package imports it.
"""

from functools import partial

from caprl_utils.mini import source, world
from caprl_utils.mini.zoo import donors
from caprl_utils.registry import MODELS, SOURCES, DrawnSource

_DRAWN_BY = tuple(
    f"{__name__}.{name}" for name in ("source", "world", "vocabulary", "render", "canvas", "charts", "pages", "shapes")
)

SOURCES[source.NAME] = DrawnSource(source.image_at, source.training_rows, world.statements, world.told_as, _DRAWN_BY)
MODELS.update({name: partial(donors.folder, name) for name in donors.REWRITTEN})
