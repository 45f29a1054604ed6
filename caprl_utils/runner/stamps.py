"""When is an executed notebook still valid? Decided by content, never by time, and without importing torch.

A stamp beside the executed notebook holds the key (source cells, parameters, profile, code that the notebook
imports, models and data in the repository) and what the notebook read and wrote (run records, report files)
with their hashes.
"""

import json
from pathlib import Path
from typing import Any

from caprl_utils import paths, provenance
from caprl_utils.config import Profile
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.hashing import cache_key, closure, file_hash, folder_hash, notebook_imports
from caprl_utils.paths import shown


def read_notebook(path: Path) -> dict[str, Any]:
    """The notebook's JSON. Raises UserError when it is none."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown(path)} is no notebook ({error})") from None
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[str]:
    """Source of each code cell."""
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def notebook_key(path: Path, profile: Profile, parameters: dict[str, Any]) -> str:
    """Key over everything that a notebook's outputs depend on, except the records it reads."""
    cells = code_cells(read_notebook(path))
    return cache_key(
        cells=cells,
        parameters=parameters,
        profile=profile.section_hash(),
        code=closure(notebook_imports(cells)),
        data={shown(folder): _hash_if_there(folder) for folder in (paths.CONFIGS, paths.PAPER)},
        models={role: _model_hash(profile.models[role].path) for role in type(profile.models).model_fields},
        versions=provenance.versions(),
    )


def _hash_if_there(folder: Path) -> str | None:
    # profiles count by their resolved values, so another profile's YAML changes nothing here
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and paths.PROFILES not in f.parents]
    return cache_key(**{str(f.relative_to(folder)): file_hash(f) for f in files}) if files else None


def _model_hash(path: str) -> str | None:
    """Hash of a model's files when they are at hand; None for a hub id (its revision is in the profile)."""
    folder = paths.zoo_folder(path) if path.startswith(paths.ZOO_PREFIX) else Path(path)
    return folder_hash(folder) if folder.is_dir() else None


def is_valid(stamp: Path, key: str) -> bool:
    """True when the stamp has this key and everything the notebook read and wrote is still as it was."""
    if not stamp.is_file():
        return False
    try:
        saved = json.loads(stamp.read_text(encoding="utf-8"))
        files = saved["files"]
    except (ValueError, KeyError):
        return False  # an older or damaged stamp: run again
    if saved["key"] != key or not _executed(stamp).is_file():
        return False
    return all(Path(name).is_file() and file_hash(name) == digest for name, digest in files.items())


def write_stamp(stamp: Path, key: str, access_log: Path) -> None:
    """Record the key and the files of the access log (see files.note_access)."""
    lines = access_log.read_text(encoding="utf-8").splitlines() if access_log.exists() else []
    files = sorted({line for line in lines if Path(line).is_file()})
    write_json(stamp, {"key": key, "files": {name: file_hash(name) for name in files}})


def _executed(stamp: Path) -> Path:
    return stamp.with_suffix(".ipynb")
