"""Command line: assemble one setting."""

import argparse
import sys
from pathlib import Path

from caprl_utils.errors import command_line
from caprl_utils.vlm_init import assemble, assembly_names


@command_line
def main(arguments: list[str]) -> int:
    """Assemble a setting, or list what there is; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m caprl_utils.vlm_init", description=__doc__)
    parser.add_argument("setting", help=f"a YAML file, or one of {', '.join(assembly_names())}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new model")
    parser.add_argument("--seed", type=int, help="of the projector (default: the setting's)")
    given = parser.parse_args(arguments)
    print(assemble(given.setting, given.out, given.seed).text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
