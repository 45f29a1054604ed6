"""When is an executed notebook still valid? Decided by content, never by time, and without importing torch.

A stamp beside the executed notebook holds the key (source cells, parameters, profile, code that the notebook
imports, models and data in the repository) and what the notebook read and wrote (run records, report files)
with their hashes.
"""

import ast
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from caprl_utils import paths, provenance
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.hashing import PACKAGE, cache_key, code_hashes, file_hash, folder_hash
from caprl_utils.paths import shown
from caprl_utils.schema import Profile


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
        code=_code_of(_imported_by(cells)),
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


# What a notebook imports, directly or not.
def _imported_by(cells: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for cell in cells:
        lines = [line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!"))]
        try:
            found |= set(_names("\n".join(lines)))
        except SyntaxError:
            continue  # the cell will fail when it runs, with a better message
    return found


def _names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.startswith(f"{PACKAGE}."))


def _code_of(names: Iterable[str]) -> dict[str, str]:
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        base = paths.ROOT.joinpath(*name.split("."))
        name = f"{name}.__init__" if base.is_dir() else name
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if name not in found and file.is_file():
            found.add(name)
            todo += _imports_of(str(file), file.stat().st_mtime_ns)
    return code_hashes(found)


@cache
def _imports_of(path: str, mtime_ns: int) -> frozenset[str]:
    return frozenset(_names(Path(path).read_text(encoding="utf-8")))
