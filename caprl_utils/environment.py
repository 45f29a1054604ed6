"""Is the installed environment the one of the lock file?"""

import re
import sys
from importlib import metadata

from caprl_utils.errors import UserError
from caprl_utils.paths import ROOT

REQUIREMENTS = ROOT / "requirements"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)")
_DIRECT = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)")


def normal(name: str) -> str:
    """A distribution name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str) -> dict[str, str]:
    """Name -> version of a lock file in requirements/."""
    lines = (REQUIREMENTS / lock).read_text(encoding="utf-8").splitlines()
    return {normal(m[1]): m[2] for line in lines if (m := _PIN.match(line))}


def direct(source: str = "main.in") -> list[str]:
    """Names of the direct dependencies in a requirements/*.in file and those that it includes."""
    lines = (REQUIREMENTS / source).read_text(encoding="utf-8").splitlines()
    included = [name for line in lines if line.startswith("-r ") for name in direct(line[3:].strip())]
    return included + [normal(m[1]) for line in lines if (m := _DIRECT.match(line))]


def check_environment() -> None:
    """Raise UserError when a direct dependency is missing or has another version than the locks say."""
    locks = [pins("main-cpu.lock"), pins("main-gpu.lock")]
    problems = []
    for name in direct():
        wanted = {lock[name] for lock in locks if name in lock}
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is missing")
            continue
        if wanted and found not in wanted:
            problems.append(f"{name} is {found}, the lock says {' or '.join(sorted(wanted))}")
    if problems:
        raise UserError(
            f"the environment of {sys.executable} is not the locked one: {'; '.join(problems[:5])}"
            f"{' ...' if len(problems) > 5 else ''}. Run `make setup`."
        )
