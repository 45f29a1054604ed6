"""The third cell of every notebook: resolve the profile, say what runs where, check what it needs."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import flat, load_profile
from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.runs import commit, versions
from caprl_utils.schema import Profile

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}


@dataclass(frozen=True)
class Context:
    """What a notebook works with."""

    profile: Profile
    seed: int

    def run_folder(self, stage: str, name: str) -> Path:
        """Where the run <stage>/<name> of this profile lies."""
        return paths.RUNS / self.profile.name / stage / name

    @property
    def reports(self) -> Path:
        """Where this profile's tables and figures go."""
        return paths.reports_of(self.profile.name)


def start(
    title: str, profile: str, seed: int = 0, needs: Mapping[str, str] | None = None, show: Sequence[str] = ()
) -> Context:
    """Load the profile, prepare the process and print what runs. Raises UserError for bad parameters, missing inputs.

    needs: run "stage/name" -> notebook that makes it. show: sections or keys to print ("rl", "models.policy").
    """
    _errors_in_one_line()
    loaded = load_profile(profile)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"parameter seed: expected a whole number from 0 on, got {seed!r}")
    prepare_process(loaded)
    wanted = {paths.RUNS / loaded.name / item: maker for item, maker in (needs or {}).items()}
    missing = [run for run in wanted if not (run / "result.json").is_file()]
    if missing:
        told = "{} is missing; make it: make {} PROFILE={}"
        raise UserError("\n".join(told.format(shown(run), wanted[run], loaded.name) for run in missing))
    print(title, _summary(loaded, seed, show), sep="\n")
    return Context(loaded, seed)


def prepare_process(profile: Profile) -> None:
    """Environment variables and thread counts for this process and those it starts."""
    os.environ.update(QUIET)
    os.environ.update(OFFLINE if profile.offline else {})
    if profile.torch_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(profile.torch_threads)
        if "torch" in sys.modules:  # it has read the variable already
            sys.modules["torch"].set_num_threads(profile.torch_threads)


def _summary(profile: Profile, seed: int, show: Sequence[str]) -> str:
    code = commit()
    state = "" if code["dirty"] is None else (" with uncommitted changes" if code["dirty"] else ", clean")
    found = versions()
    named = [f"{name} {found[name]}" for name in ("python", "torch", "transformers", "trl") if name in found]
    about = {
        "profile": f"{profile.name}: {profile.description}", "made for": profile.hardware, "seed": seed,
        "commit": f"{(code['commit'] or 'none')[:10]}{state}", "versions": " ".join(named),
    }  # fmt: skip
    settings = {}
    for name in show:
        found = {key: value for key, value, _ in flat(profile) if f"{key}.".startswith(f"{name}.")}
        if not found:
            raise UserError(f"no setting {name!r} to show")
        settings |= found
    width = max(map(len, settings), default=0)
    lines = [f"{key:<8}  {value}" for key, value in about.items()]
    return "\n".join(lines + [f"{key:<{width}}  {value}" for key, value in settings.items()])


def _errors_in_one_line() -> None:
    """In a kernel, show a UserError as its message instead of a traceback through our own code."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.set_custom_exc((UserError,), _show_user_error)


def _show_user_error(shell: Any, kind: type, error: BaseException, *_: Any, **__: Any) -> list[str]:
    message = [f"{kind.__name__}: {error}"]
    shell._showtraceback(kind, error, message)
    return message
