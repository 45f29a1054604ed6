"""How long each notebook took, for the time that is left.

Measured on this machine where it ran before, else as reports/bench/times.json has it from ours.

    python -m caprl_utils.runner.times mini      put what was measured here into the report
"""

import json
import sys
from pathlib import Path

from caprl_utils import paths
from caprl_utils.errors import UserError, command_line
from caprl_utils.files import write_json
from caprl_utils.paths import shown

REPORT = paths.REPORTS / "bench" / "times.json"
_NAME = "times.json"


def _measured(profile_name: str) -> Path:
    return paths.RUNS / profile_name / "notebooks" / _NAME


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # an aid only: without it no time is promised


def expected(profile_name: str) -> dict[str, float]:
    """Executed notebook -> seconds from nothing."""
    return _read(REPORT).get(profile_name, {}) | _read(_measured(profile_name))


def note(profile_name: str, name: str, sec: float) -> None:
    """Keep the longest time of a notebook: a shorter one found some of its results made."""
    known = _read(_measured(profile_name))
    known[name] = max(round(sec, 1), known.get(name, 0.0))
    write_json(_measured(profile_name), known)


@command_line
def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    if len(argv) != 1:
        print("usage: python -m caprl_utils.runner.times PROFILE", file=sys.stderr)
        return 2
    times = _read(_measured(argv[0]))
    if not times:
        raise UserError(f"nothing measured yet: no {shown(_measured(argv[0]))}")
    write_json(REPORT, _read(REPORT) | {argv[0]: times})
    print(shown(REPORT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
