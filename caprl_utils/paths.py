"""Where everything lies. Nothing in this repository derives a path from the working folder."""

import os
from pathlib import Path

from caprl_utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PROFILES = CONFIGS / "profiles"
NOTEBOOKS = ROOT / "notebooks"
REPORTS = ROOT / "reports"
PAPER = REPORTS / "paper"
RUNS = Path(os.environ.get("CAPRL_RUNS") or ROOT / "runs").resolve()
ZOO = ROOT / "caprl_utils" / "mini" / "weights"
ZOO_PREFIX = "zoo:"


def reports_of(profile: str) -> Path:
    """The folder a profile's tables go to; smoke numbers stay under runs/ and out of reports/."""
    return RUNS / "smoke" / "reports" if profile == "smoke" else REPORTS / profile


def is_report(path: Path) -> bool:
    """Whether a file lies where tables and figures go."""
    folders = (REPORTS, reports_of("smoke"))
    return any(path.absolute().is_relative_to(folder) for folder in folders)


def zoo_folder(path: str) -> Path:
    """Where the model "zoo:NAME" lies, whether it is there or not."""
    return ZOO / path.removeprefix(ZOO_PREFIX)


def resolve_model(path: str) -> str:
    """Turn a model's `path` from a config into what from_pretrained takes.

    "zoo:NAME" becomes the folder of that small model; a folder or a hub id is returned as it is.
    Raises UserError when the zoo has no such model.
    """
    if not path.startswith(ZOO_PREFIX):
        return path
    folder = zoo_folder(path)
    if (folder / "config.json").is_file():
        return str(folder)
    known = sorted(p.parent.name for p in ZOO.glob("*/config.json"))
    raise UserError(
        f"no model {path!r}: {folder} has no config.json. "
        f"The zoo holds {', '.join(known) or 'nothing'}; `make zoo` trains its models."
    )


def shown(path: Path | str) -> str:
    """A path as messages and records print it: relative to the repository when it lies inside."""
    path = Path(path).absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
