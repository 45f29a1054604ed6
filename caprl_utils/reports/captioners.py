"""What the captioners are that the paper compares by size, where models of the mini world play their parts."""

from __future__ import annotations

import json

from caprl_utils import paths
from caprl_utils.reports import numbers
from caprl_utils.schema import Profile

ROLES = ("policy", "captioner_7b", "captioner_72b")  # roles of the three that the paper compares by size


def of_zoo(profile: Profile) -> bool:
    """Whether the captioners compared by size are models of the mini world."""
    return all(getattr(profile.models, role).path.startswith(paths.ZOO_PREFIX) for role in ROLES)


def note(profile: Profile) -> str | None:
    """What "3B", "7B" and "72B" are where they are models of the mini world, from the records of their training."""
    if not of_zoo(profile):
        return None
    folders = [paths.zoo_folder(getattr(profile.models, role).path) for role in ROLES]
    records = [json.loads((folder / "record.json").read_text(encoding="utf-8")) for folder in folders]
    sizes = numbers.numbers(sorted({record["parameters"] / 1e6 for record in records}))
    return (
        f"All captioners have {' or '.join(sizes)} million parameters: '3B', '7B' and '72B' name the parts that they "
        "play. '3B' and '7B' are the '72B' trained on to leave facts out and to err, so training by reward may bring "
        "back what the model was once taught."
    )
