"""What the command lines of reports share: one option, the profile."""

import argparse
from collections.abc import Sequence

from caprl_utils.config import load_profile
from caprl_utils.schema import Profile


def profile_of(argv: Sequence[str], module: str, description: str | None = None) -> Profile:
    """The profile named by --profile, mini by default. module: in caprl_utils.reports, for the usage line."""
    parser = argparse.ArgumentParser(prog=f"python -m caprl_utils.reports.{module}", description=description)
    parser.add_argument("--profile", default="mini")
    return load_profile(parser.parse_args(argv).profile)
