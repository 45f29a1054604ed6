"""One worker process: python -m caprl_utils.captions.worker FOLDER (`engines.run_workers` starts it).

Start it by hand, on this machine or another one that sees the folder, to lend a running job a hand.
"""

import sys
from pathlib import Path

from caprl_utils.captions.engines import work_in
from caprl_utils.errors import command_line


@command_line
def main(arguments: list[str]) -> int:
    """Work on the job of the folder named; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m caprl_utils.captions.worker FOLDER", file=sys.stderr)
        return 2
    work_in(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
