"""All benches: `python tests/bench` (`make bench`), or only some: `python tests/bench client reward`."""

import sys

import harness

if __name__ == "__main__":
    sys.exit(harness.main(sys.argv[1:]))
