"""Hashes of everything that can change an output: settings, data files, and the code that runs.

Code is hashed by its syntax tree without docstrings, so a comment, a docstring or the formatter recomputes
nothing.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.errors import UserError

PACKAGE = "caprl_utils"
# They move settings and results around but cannot change a value, so a change in them recomputes nothing.
INFRASTRUCTURE = frozenset(
    f"{PACKAGE}.{name}"
    for name in (
        "config", "environment", "errors", "files", "hashing", "notebook", "paths", "processes", "progress",
        "provenance", "rows", "runner", "runs", "schema",
    )
) | {PACKAGE}  # fmt: skip


def text_hash(text: str) -> str:
    """First 16 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def derive_seed(*parts: object, bits: int = 63) -> int:
    """A seed of so many bits from any parts, the same in every process, machine and Python version.

    The top bits of the SHA-256 of the parts joined by "/". Ours: whatever is drawn names what it is drawn for
    (seed, image, round), so that order, batches and restarts change nothing.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest, "big") >> (256 - bits)


def value_hash(value: Any) -> str:
    """Hash of a JSON value, the order of keys not counting. Raises TypeError for what JSON cannot hold."""
    return text_hash(
        json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_jsonable)
    )


def _jsonable(value: Any) -> Any:
    if hasattr(value, "key_part"):  # a settings section: only what can change an output
        return value.key_part()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"a cache key takes JSON values, got {type(value).__name__}: {value!r}")


def cache_key(**parts: Any) -> str:
    """One stable key for named JSON-able parts (settings sections and pydantic models are fine too)."""
    return value_hash(parts)


@cache
def _hash_of(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def file_hash(path: Path | str) -> str:
    """Hash of a file's content, remembered while its size and modification time stay."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"missing file: {paths.shown(path)}")
    stat = path.stat()
    return _hash_of(str(path.absolute()), stat.st_size, stat.st_mtime_ns)


def folder_hash(folder: Path | str, pattern: str = "**/*") -> str:
    """Hash over names and contents of a folder's files (a model, a data set); hidden files do not count."""
    folder = Path(folder)
    files = sorted(f for f in folder.glob(pattern) if f.is_file() and not f.name.startswith("."))
    if not files:
        raise UserError(f"missing or empty folder: {paths.shown(folder)}")
    return value_hash({str(f.relative_to(folder)): file_hash(f) for f in files})


@cache
def _tree(path: str, size: int, mtime_ns: int) -> tuple[str, frozenset[str]]:
    """(hash of the code, names it may import) of one source file."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"), filename=path)
    names = frozenset(_imports(tree, Path(path)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _drop_docstring(node)
    return text_hash(ast.dump(tree)), names


def _drop_docstring(node: Any) -> None:
    first = node.body[0] if node.body else None
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        node.body = node.body[1:]


def _imports(tree: ast.AST, path: Path) -> Iterable[str]:
    """Dotted names under this package that a source imports anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, path)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == PACKAGE)


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    folder = path.parents[node.level - 1].relative_to(paths.ROOT)
    return ".".join([*folder.parts, *([node.module] if node.module else [])])


def _source(module: str) -> Path | None:
    """The file of a module, or None when the name is a function or class inside one."""
    base = paths.ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _source_tree(path: Path) -> tuple[str, frozenset[str]]:
    stat = path.stat()
    try:
        return _tree(str(path), stat.st_size, stat.st_mtime_ns)
    except SyntaxError as error:
        raise UserError(f"{paths.shown(path)}, line {error.lineno}: {error.msg}") from None


def code_hashes(modules: Iterable[str], skip: frozenset[str] = INFRASTRUCTURE) -> dict[str, str]:
    """Hash of each named module and of every module of this package that these import, directly or not.

    Naming a package takes all its modules. Raises UserError for a name that does not exist.
    """
    todo = []
    for name in modules:
        if _source(name) is None:
            raise UserError(f"no module {name!r} to hash; name a module such as {PACKAGE}.prompts")
        todo += _whole_package(name)
    return closure(todo, skip)


def closure(names: Iterable[str], skip: frozenset[str] = frozenset()) -> dict[str, str]:
    """Module name -> code hash for the given names and all they import; what is no module is passed over."""
    hashes: dict[str, str] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        path = _source(name)
        if path is None or name in hashes or name in skip:
            continue
        hashes[name], imported = _source_tree(path)
        todo += [*imported, *_parents(name)]
    return dict(sorted(hashes.items()))


def notebook_imports(cells: Iterable[str]) -> list[str]:
    """Names under this package that code cells import; lines of IPython magics are passed over."""
    found: set[str] = set()
    for cell in cells:
        lines = [line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!"))]
        try:
            tree = ast.parse("\n".join(lines))
        except SyntaxError:
            continue  # the cell will fail when it runs, with a better message
        found |= set(_imports(tree, paths.NOTEBOOKS / "cell.py"))
    return sorted(found)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _whole_package(name: str) -> list[str]:
    folder = paths.ROOT.joinpath(*name.split("."))
    inside = (
        [f.relative_to(paths.ROOT).with_suffix("") for f in folder.rglob("*.py")] if folder.is_dir() else []
    )
    return [name, *(".".join(p.parts).removesuffix(".__init__") for p in inside)]


def combined(hashes: Mapping[str, str]) -> str:
    """One hash for several."""
    return value_hash(dict(hashes))
