"""Command line of the runner; a missing package is told in one line."""

import sys


def _main() -> int:
    try:
        from caprl_utils.runner.cli import main
    except ModuleNotFoundError as error:
        print(
            f"error: package {error.name!r} is missing in {sys.executable}; run `make setup`", file=sys.stderr
        )
        return 1
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(_main())
