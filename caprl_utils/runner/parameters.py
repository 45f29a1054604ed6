"""Notebook parameters: read `key=value`, refuse what the notebook does not know or cannot take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from caprl_utils.errors import UserError, nearest
from caprl_utils.paths import shown

_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}


def parse_parameters(items: Sequence[str]) -> dict[str, Any]:
    """["lr=1e-5", "name=x"] -> {"lr": 1e-05, "name": "x"}. Raises UserError for an item without "="."""
    values = {}
    for item in items:
        name, separator, text = item.partition("=")
        if not separator or not name.isidentifier():
            raise UserError(f"-p {item}: expected name=value")
        values[name] = _value(text)
    return values


def _value(text: str) -> Any:
    """A number, true/false/null, a list or dict as in YAML, else the text (YAML reads 1e-5 as text)."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if value is None or isinstance(value, bool | list | dict) else text


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Compare with the notebook's cell tagged `parameters`. Raises UserError with the nearest name."""
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    if not known:
        raise UserError(
            f"{shown(notebook)} has no cell tagged `parameters`, so it takes none: {', '.join(parameters)}"
        )
    for name, value in parameters.items():
        if name not in known:
            close = nearest(name, list(known))
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"{shown(notebook)} has no parameter {name!r}{hint}; it has: {', '.join(sorted(known))}"
            )
        _check_type(notebook, name, value, known[name]["inferred_type_name"])


def _check_type(notebook: Path, name: str, value: Any, declared: str) -> None:
    kind = _TYPES.get(declared)
    if kind is None or value is None:
        return
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{shown(notebook)}: parameter {name} is {declared}, got {value!r}")
