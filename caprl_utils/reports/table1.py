"""Table 1: benchmarks after pretraining on different caption sets, in all settings.

python -m caprl_utils.reports.table1 --profile mini
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from caprl_utils.pretraining.sets import CAPRL_1M, CAPRL_5M, DENSEFUSION, SHAREGPT4V, TABLE_1, VANILLA
from caprl_utils.reports import pretrained
from caprl_utils.reports.claims import Claim
from caprl_utils.reports.pretrained import Item, Row
from caprl_utils.reports.summary import Brief
from caprl_utils.schema import Profile

NAME = "table1"


def item(profile: Profile) -> Item:
    """Its rows: every setting of the profile with every caption set."""
    rows, pairs, claims, first = [], [], [], {}
    for setting in profile.pretraining.settings:
        prefix = f"{setting}, "
        rows += [Row(setting, captions, prefix) for captions in TABLE_1]
        ours = f"{prefix}{CAPRL_1M.name}"
        first[setting] = (ours, f"{prefix}{VANILLA}")
        for theirs in (VANILLA, SHAREGPT4V.name, DENSEFUSION.name):
            pairs.append((ours, f"{prefix}{theirs}"))
            claims.append(Claim(f"{setting}: CapRL-1M is better than {theirs}", *pairs[-1]))
        pairs.append((f"{prefix}{CAPRL_5M.name}", ours))
        claims.append(Claim(f"{setting}: more of CapRL's pairs are better", *pairs[-1]))
    paper = ("table1_pretraining.csv", ("setting", "dataset"))
    brief = Brief(text=f"{CAPRL_1M.name} against {VANILLA}:", pairs=first)
    return Item(NAME, "Table 1: VLMs pretrained on caption sets", rows, pairs, brief, claims, paper)


def write(profile: Profile, folder: Path | None = None) -> dict[str, Any]:
    """Write table1.md, .csv and .json; returns what the JSON holds."""
    return pretrained.write(profile, item(profile), folder)


if __name__ == "__main__":
    sys.exit(pretrained.main(write, NAME, sys.argv[1:]))
