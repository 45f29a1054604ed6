"""All benches: `python tests/bench` (`make bench`), or only some: `python tests/bench client reward`.

Each row compares ours with a baseline measured in the same run, or with a limit that we set.
"""

import importlib
import sys
from collections.abc import Sequence

import harness

from caprl_utils.errors import UserError

BENCHES = ("client", "curation", "bootstrap", "reward", "same_twice")  # each is `rows()` of the module bench_NAME


def main(names: Sequence[str]) -> int:
    """Run the named benches (default: all) and print one table; returns 1 when one could not run."""
    if unknown := sorted(set(names) - set(BENCHES)):
        print(f"error: no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    rows, failed = [], 0
    for name in names or BENCHES:
        print(f"bench {name} ...", file=sys.stderr, flush=True)
        try:
            found = importlib.import_module(f"bench_{name}").rows()
            harness.record(found)
            rows += found
        except UserError as error:
            print(f"error: bench {name}: {error}", file=sys.stderr)
            failed = 1
    print(f"{harness.table(rows)}\n{harness.machine()}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
