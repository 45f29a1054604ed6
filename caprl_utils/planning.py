"""What a profile needs before anything starts: hardware, memory, hours, disk and commands, each with its formula.

python -m caprl_utils.planning --profile paper
"""

import argparse
import sys
from collections.abc import Sequence

from caprl_utils.config import load_profile
from caprl_utils.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="caprl_utils.planning", description="What a profile needs.")
    parser.add_argument("--profile", default="mini")
    try:
        profile = load_profile(parser.parse_args(argv).profile)
        from caprl_utils.pretraining.plan import plan_lines
        from caprl_utils.rl.plan import plan_rl

        print(f"profile {profile.name}: {profile.description}\nmade for {profile.hardware}\n\nCapRL training")
        for row in plan_rl(profile):
            value = f"{row['value']:,.3g}" if isinstance(row["value"], float) else row["value"]
            formula = f"   = {row['formula']}" if row["formula"] else ""
            print(f"  {row['item']}: {value} {row['unit']}".rstrip() + formula)
        print("\nPretraining")
        print("\n".join(plan_lines(profile)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
