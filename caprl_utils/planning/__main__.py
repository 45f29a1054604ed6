"""Print the plan of a profile.

    python -m caprl_utils.planning --profile paper 01_qa_curation 03_caprl_rl_training ...    (`make plan`)

Estimates are good to a factor of two: they say whether it fits and what it costs, not when it will be done.
"""

import argparse
import sys
from collections.abc import Sequence

from caprl_utils import gpus
from caprl_utils.config import load_profile
from caprl_utils.errors import command_line
from caprl_utils.planning import missing
from caprl_utils.planning.graph import Step, steps
from caprl_utils.schema import Profile


def lines(profile: Profile, notebooks: Sequence[str]) -> list[str]:
    """The plan as it is printed."""
    graph = steps(profile, notebooks)
    wants = missing.find(profile, max((step.gpus for step in graph), default=0), _disk(graph))
    return [
        f"profile {profile.name}: {profile.description}",
        f"made for {profile.hardware}",
        "",
        *(line for step in graph for line in [*step.lines(), ""]),
        _total(graph),
        "",
        *(["nothing is missing"] if not wants else ["missing:", *(f"  - {want}" for want in wants)]),
    ]


def _disk(graph: Sequence[Step]) -> float:
    return sum(step.disk_gb for step in graph)


def _total(graph: Sequence[Step]) -> str:
    measured = [step.minutes for step in graph if step.minutes is not None]
    disk = f"{_disk(graph):,.1f} GB of disk"
    if len(measured) == len(graph):
        return f"in all: {sum(measured):.0f} minutes, {disk}"
    total = sum(step.gpu_hours or 0.0 for step in graph)
    without = "".join(
        f"; without {step.name}: size of {step.unknown} unknown" for step in graph if step.unknown
    )
    if not total:
        return f"in all: {disk}; the time was not measured yet{without}"
    return (
        f"in all: {total:,.0f} GPU-hours ({gpus.NAME}), about {total * gpus.DOLLARS_PER_HOUR:,.0f} dollars at "
        f"{gpus.DOLLARS_PER_HOUR} an hour; {disk}{without}"
    )


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m caprl_utils.planning", description="What a profile needs."
    )
    parser.add_argument(
        "notebooks", nargs="+", help="in their order, NAME or NAME:PARAMETER=VALUE as the runner takes them"
    )
    parser.add_argument("--profile", default="mini")
    arguments = parser.parse_args(argv)
    print("\n".join(lines(load_profile(arguments.profile), arguments.notebooks)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
