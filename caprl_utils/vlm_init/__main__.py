"""Command line: assemble one setting."""

import argparse
import sys
from pathlib import Path

from caprl_utils.errors import UserError
from caprl_utils.vlm_init import assemble, setting_names


def main(arguments: list[str]) -> int:
    """Assemble a setting, or list what there is; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m caprl_utils.vlm_init", description=__doc__)
    parser.add_argument("setting", help=f"a YAML file, or one of {', '.join(setting_names())}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new model")
    parser.add_argument("--seed", type=int, help="of the projector (default: the setting's)")
    given = parser.parse_args(arguments)
    try:
        print(assemble(given.setting, given.out, given.seed).text())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
