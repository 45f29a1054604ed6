"""The settings at full size without weights: built on the meta device from the donors' public configs.

The configs are excerpts of the config.json that the hub shows (configs/vlm_init/public); the checks of hyperparameters
are those of a real assembly.
"""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_assembly
from caprl_utils.errors import UserError
from caprl_utils.schema import Assembly, Donor
from caprl_utils.vlm_init.plan import PARTS, Part

PUBLIC = paths.CONFIGS / "vlm_init" / "public"
KNOWN = {
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "InternLM2.5-7B": 7_737_708_544,
    "CLIP-ViT-L/14 at 336 pixels, image half": 303_507_456,
}
"""Parameters of the released models, as the hub counts them in their safetensors (CLIP: of its image half)."""


def public_config(donor: Donor) -> dict[str, Any]:
    """The public config of a donor of the paper. Raises UserError for one that is not kept here."""
    file = PUBLIC / f"{donor.path.rsplit('/', 1)[-1].lower()}.json"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in PUBLIC.glob("*.json")))
        raise UserError(f"no public config of {donor.path!r} in {PUBLIC.name}; there are {known}")
    return json.loads(file.read_text(encoding="utf-8"))


def full_size_config(setting: str | Assembly) -> Any:
    """The config that an assembly of this setting would write."""
    from caprl_utils.vlm_init import llava, qwen

    setting = setting if isinstance(setting, Assembly) else load_assembly(setting)
    module = {"qwen2_5_vl": qwen, "llava": llava}[setting.architecture]
    return module.combined(setting, public_config(setting.language), public_config(setting.vision))[0]


def full_size_parameters(setting: str | Assembly) -> dict[Part, int]:
    """Parameters of each part of a setting of the paper, counted on the meta device."""
    from caprl_utils.vlm_init import llava, qwen

    config = full_size_config(setting)
    module = llava if config.model_type == "llava" else qwen
    counts: Counter[Part] = Counter()
    for _, part, shape in module.targets(config):
        counts[part] += prod(shape)
    return {part: counts[part] for part in PARTS}
