"""Where everything lies: in a checkout all below it, whatever the working folder is.

Installed, configs and small models lie in the package, and what a user computes below the working folder.
"""

import os
from pathlib import Path

from caprl_utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # what holds the package
IN_CHECKOUT = (ROOT / "pyproject.toml").is_file()
HOME = ROOT if IN_CHECKOUT else Path.cwd()  # what holds a user's files
_DATA = ROOT if IN_CHECKOUT else ROOT / "caprl_utils"  # a wheel has them in the package
CONFIGS = _DATA / "configs"
PROFILES = CONFIGS / "profiles"
NOTEBOOKS = ROOT / "notebooks"
RUNS = Path(os.environ.get("CAPRL_RUNS") or HOME / "runs").resolve()
REPORTS = _DATA / "reports"  # what is published: `make publish` alone writes there
PAPER = REPORTS / "paper"
ZOO = ROOT / "caprl_utils" / "mini" / "weights"
ZOO_PREFIX = "zoo:"


def reports_of(profile: str) -> Path:
    """The folder that a profile's tables and figures are written to."""
    return RUNS / profile / "reports"


def zoo_folder(path: str) -> Path:
    """Where the model "zoo:NAME" lies, whether it is there or not."""
    return ZOO / path.removeprefix(ZOO_PREFIX)


def resolve_model(path: str) -> str:
    """What from_pretrained takes: the folder of "zoo:NAME"; a folder or a hub id as it is. Raises UserError when the
    zoo has no such model.
    """
    folder = zoo_folder(path)
    if not path.startswith(ZOO_PREFIX) or (folder / "config.json").is_file():
        return str(folder) if path.startswith(ZOO_PREFIX) else path
    known = ", ".join(sorted(p.parent.name for p in ZOO.glob("*/config.json"))) or "nothing"
    there = f"The zoo holds {known}; `make zoo` trains its models."
    raise UserError(f"no model {path!r}: {folder} has no config.json. {there}")


def shown(path: Path | str) -> str:
    """A path as messages and records print it: relative to the repository, or the working folder, when inside."""
    path = Path(path).absolute()
    return str(path.relative_to(HOME)) if path.is_relative_to(HOME) else str(path)
