"""Load, check and show profiles.

A profile is a YAML file in configs/profiles/ that holds only what differs from the defaults in `schema`, or
from the profile it `extends`.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.schema import RL, Curation, Images, ModelConfig, Models, Prism, Profile, Settings

SET_ENV = "CAPRL_SET"

__all__ = [
    "RL", "Curation", "Images", "ModelConfig", "Models", "Prism", "Profile", "Settings",
    "load_profile", "merge", "nearest", "profile_names", "read_yaml",
]  # fmt: skip


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (key_node, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark
                )
        return super().construct_mapping(node, deep)


def profile_names() -> list[str]:
    """Names of all profiles in configs/profiles, sorted."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def load_profile(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Read a profile by name, or from a YAML file by its path.

    overrides: values on top of the file, by dotted key ({"rl.steps": 4}) or nested ({"rl": {"steps": 4}}). Below
    them lie those of the environment variable CAPRL_SET, one `key=value` a line: so `--set` reaches notebooks and
    the processes that a command starts.
    Raises UserError naming the file, the key, the bad value and the nearest valid one.
    """
    file = _profile_file(name)
    merged = _read_layers(file, seen=[])
    given = merge(
        _nested(parse_overrides(os.environ.get(SET_ENV, "").splitlines())), _nested(overrides or {})
    )
    merged = merge(merged, given)
    merged.setdefault("name", file.stem)
    try:
        return Profile.model_validate(merged)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(item)}" for item in error.errors())
        where = paths.shown(file) + (" with overrides" if given else "")
        raise UserError(f"{where}:\n{problems}") from None


def nearest(word: str, candidates: list[str], count: int = 1) -> list[str]:
    """The candidates most like `word`, best first; empty when none is near."""
    return difflib.get_close_matches(word, candidates, n=count, cutoff=0.5)


def _profile_file(name: str) -> Path:
    file = Path(name) if name.endswith((".yaml", ".yml")) else paths.PROFILES / f"{name}.yaml"
    if file.is_file():
        return file
    known = profile_names()
    raise UserError(f"no profile {name!r}{_hint(name, known)}; known profiles: {', '.join(known)}")


def _read_layers(file: Path, seen: list[Path]) -> dict[str, Any]:
    """The file's values over those of the profile it extends."""
    if file in seen:
        raise UserError(f"{paths.shown(file)}: `extends` goes round in a circle")
    values = read_yaml(file)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    base = _read_layers(_profile_file(str(parent)), [*seen, file])
    return merge(base, {"name": file.stem, "description": "", **values})


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for anything else, and for a key given twice."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{paths.shown(file)} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{paths.shown(file)}: expected `key: value` lines, found {type(values).__name__}")
    return values


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, section by section."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _explain(item: Mapping[str, Any]) -> str:
    """One line for one pydantic error: dotted key, bad value, nearest valid key or value."""
    key = ".".join(str(part) for part in item["loc"]) or "profile"
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        return f"unknown key {key} (value {value!r}){_nearest_key(item['loc'])}"
    if item["type"] == "missing":
        return f"{key}: missing"
    problem = item["msg"].removeprefix("Value error, ")
    hint = ""
    if item["type"] == "literal_error" and isinstance(value, str):
        hint = _hint(value, [str(choice) for choice in get_args(_field_at(item["loc"]).annotation)])
    shown_value = "" if item["type"] == "value_error" else f" {value!r}:"
    return f"{key}:{shown_value} {problem}{hint}"


def _nearest_key(loc: tuple[str | int, ...]) -> str:
    """Suggest a sibling first, then the same word in any other section."""
    wrong, *siblings = str(loc[-1]), *_section_at(loc[:-1]).model_fields
    if close := nearest(wrong, siblings):
        return f"; did you mean {'.'.join([*map(str, loc[:-1]), close[0]])}?"
    everywhere = {dotted.split(".")[-1]: dotted for dotted, _, _ in walk(Profile)}
    if close := nearest(wrong, list(everywhere)):
        return f"; did you mean {everywhere[close[0]]}?"
    return f"; valid keys here: {', '.join(siblings)}"


def _hint(word: str, candidates: list[str]) -> str:
    close = nearest(word, candidates)
    return f"; did you mean {close[0]}?" if close else ""


def _section_at(loc: tuple[str | int, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Profile
    for part in loc:
        kind = section.model_fields[str(part)].annotation
        section = next((choice for choice in get_args(kind) if choice is not type(None)), kind)  # X | None
    return section


def _field_at(loc: tuple[str | int, ...]) -> Any:
    return _section_at(loc[:-1]).model_fields[str(loc[-1])]


def walk(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted key, source, default) for every setting."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from walk(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or "", field.default


def explain(profile: Profile) -> str:
    """All settings of a profile, one a line, each with its source."""
    lines = [f"# {profile.name}: {profile.description}"]
    for key, source, default in walk(Profile):
        value = profile.lookup(key)
        note = "" if value == default or key == "name" else f" (default {default!r})"
        lines.append(f"{key} = {value!r:<24}  # {source}{note}")
    return "\n".join(lines)


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """["rl.steps=10"] -> {"rl.steps": 10}; values are read as YAML. Raises UserError for an item without "="."""
    values = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise UserError(f"--set {item}: expected key=value, for example rl.steps=10")
        try:
            values[key] = (
                float(text) if re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", text) else yaml.safe_load(text)
            )
        except (yaml.YAMLError, ValueError):
            values[key] = text
    return values
