"""Hashes of everything that can change an output: settings, data files, and the code that runs.

Code is hashed by its syntax tree: a comment, a docstring or the formatter recomputes nothing.
"""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError

_PARSING = Lock()  # on Python 3.11 threads that parse at the same time were seen to end in a SystemError


def text_hash(text: str) -> str:
    """First 16 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def derive_seed(*parts: object, bits: int = 63) -> int:
    """A seed of so many bits from any parts: the top bits of the SHA-256 of the parts joined by "/". Ours: whatever is
    drawn names what it is drawn for (seed, image, round), so that order and restarts change nothing.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest, "big") >> (256 - bits)


def value_hash(value: Any) -> str:
    """Hash of a JSON value, the order of keys not counting. Raises TypeError for what JSON cannot hold."""

    def jsonable(value: Any) -> Any:
        if not hasattr(value, "key_part"):
            raise TypeError(f"a cache key takes JSON values, got {type(value).__name__}: {value!r}")
        return value.key_part()  # of a settings section only what can change an output

    return text_hash(json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, default=jsonable))


def file_hash(path: Path | str) -> str:
    """Hash of a file's content, remembered while its size and modification time stay."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"missing file: {paths.shown(path)}")
    stat = path.stat()
    return _hash_of(path.absolute(), stat.st_size, stat.st_mtime_ns)


@cache
def _hash_of(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def code_hashes(recipe: Iterable[str]) -> dict[str, str]:
    """Hash of each named module of this package, without what it imports. Raises UserError for what is no module."""
    hashes = {}
    for module in sorted(set(recipe)):
        path = paths.ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if not path.is_file():
            raise UserError(f"no module {module!r} to hash; name a module such as caprl_utils.prompts")
        hashes[module] = _tree_hash(path.read_text(encoding="utf-8"))
    return hashes


@cache
def _tree_hash(source: str) -> str:
    with _PARSING:
        tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return text_hash(ast.dump(tree))
