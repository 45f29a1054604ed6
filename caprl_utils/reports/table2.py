"""Table 2: the same images, captions swapped for CapRL's.

python -m caprl_utils.reports.table2 --profile mini
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from caprl_utils.pretraining.sets import (
    CAPRL_DENSEFUSION,
    CAPRL_SHAREGPT4V,
    DENSEFUSION,
    SHAREGPT4V,
    TABLE_2,
)
from caprl_utils.reports import pretrained
from caprl_utils.reports.claims import Claim
from caprl_utils.reports.pretrained import Item, Row
from caprl_utils.reports.summary import Brief
from caprl_utils.schema import Profile

NAME = "table2"


def item(profile: Profile) -> Item:
    """Its rows, in the profile's first setting."""
    setting = profile.pretraining.settings[0]
    pairs = [(CAPRL_SHAREGPT4V.name, SHAREGPT4V.name), (CAPRL_DENSEFUSION.name, DENSEFUSION.name)]
    claims = [
        Claim(f"On the images of {theirs}, CapRL's captions are better", ours, theirs)
        for ours, theirs in pairs
    ]
    rows = [Row(setting, captions) for captions in TABLE_2]
    paper = ("table2_image_sources.csv", ("setting", "dataset"))
    brief = Brief(
        text="CapRL's captions against those of", pairs={theirs: (ours, theirs) for ours, theirs in pairs}
    )
    notes = (f"Setting {setting}.",)
    return Item(NAME, "Table 2: the same images, other captions", rows, pairs, brief, claims, paper, notes)


def write(profile: Profile, folder: Path | None = None) -> dict[str, Any]:
    """Write table2.md, .csv and .json; returns what the JSON holds."""
    return pretrained.write(profile, item(profile), folder)


if __name__ == "__main__":
    sys.exit(pretrained.main(write, NAME, sys.argv[1:]))
