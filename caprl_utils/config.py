"""Load, check and show settings: profiles, experiments and VLM pairs (assemblies), all by the same rules.

Each is a YAML file of configs/ that holds only what differs from the defaults in `schema`, or from the file that it
`extends`. Unknown keys, keys given twice and bad values are errors that name file, key and the nearest valid one.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from caprl_utils import paths
from caprl_utils.errors import UserError, did_you_mean, nearest
from caprl_utils.schema import Assembly, Experiment, ModelConfig, Profile, Settings

SET_ENV = "CAPRL_SET"
_SCIENTIFIC = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")  # YAML reads 1e-5 as text
_FOLDERS = {Profile: "profiles", Experiment: "experiments", Assembly: "vlm_init"}
_OF_EXPERIMENTS = ("data", "reward", "training")  # sections that no profile has

Kind = TypeVar("Kind", Profile, Experiment, Assembly)


def names_of(model: type[Settings]) -> list[str]:
    """Names of all profiles (`Profile`), experiments (`Experiment`) or VLM pairs (`Assembly`) in configs/, sorted."""
    return sorted(path.stem for path in (paths.CONFIGS / _FOLDERS[model]).glob("*.yaml"))


def load_profile(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Read a profile by name, or from a YAML file by its path. Raises UserError naming file, key and nearest valid one.
    overrides: values on top of the file, by dotted key ({"rl.steps": 4}) or nested ({"rl": {"steps": 4}}). Below them
    lie those of the environment variable CAPRL_SET, `key=value` words as in a shell (`--set`).
    """
    file, values = _layers(Profile, name)
    return _checked(Profile, values, file, merge(_from_command_line(Profile), _nested(overrides or {})))


def load_experiment(name: str, profile: str) -> tuple[Experiment, Profile]:
    """The experiment, and the profile with the experiment's values in its section rl; `--set` lies over both. Raises
    UserError naming file, key and nearest valid key.
    """
    base = load_profile(profile)  # an error of the profile alone is told as such
    file, values = _layers(Experiment, name)
    given = _from_command_line(Experiment)
    preset = read_yaml(_file(Experiment, base.rl.preset)) if base.rl.preset else {}
    values = merge({key: preset[key] for key in ("rl", "training") if key in preset}, values)
    experiment = _checked(Experiment, values, file, given)
    if experiment.data.num_images == "ablation":
        data = experiment.data.model_copy(update={"num_images": base.ablations.num_images})
        experiment = experiment.model_copy(update={"data": data})
    steps = base.ablations.steps if experiment.size == "ablation" else None
    over = {"steps": steps} if steps else {}
    over |= experiment.rl | _from_command_line(Profile).get("rl", {})
    start = base.models.named().get(experiment.start)
    if start is None:
        raise UserError(f"experiment {name} trains models.{experiment.start}, which profile {profile} goes without")
    started = {} if experiment.start == "policy" else {"models": {"policy": start}}
    try:
        return experiment, load_profile(profile, {"rl": over, **started})
    except UserError as error:
        raise UserError(f"{paths.shown(file)}, section rl, over profile {profile}: {error}") from None


def load_assembly(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Assembly:
    """Read a VLM pair by its name, or from a YAML file by its path; overrides and errors as in `load_profile`."""
    file, values = _layers(Assembly, name)
    return _checked(Assembly, values, file, _nested(overrides or {}))


def parse_overrides(items: Sequence[str], option: str = "--set", example: str = "rl.steps=10") -> dict:
    """["rl.steps=10"] -> {"rl.steps": 10}; values are read as YAML, 1e-5 too. Raises UserError without "="."""
    values = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not (key and separator):
            raise UserError(f"{option} {item}: expected name=value, for example {example}")
        try:
            values[key] = float(text) if _SCIENTIFIC.fullmatch(text) else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            values[key] = text
    return values


def explain(settings: Settings, prefix: str = "", why: Mapping[str, str] | None = None) -> str:
    """All settings of a profile, an experiment or a section, one a line, each with its source. why: `reasons`."""
    lines = []
    for key, value, field in flat(settings, prefix):
        told, reason = field.description, (why or {}).get(key)
        if not field.is_required() and value != field.default:
            told = f"{reason} (default {field.default!r}, {told})" if reason else f"{told} (default {field.default!r})"
        lines.append(f"{key} = {value!r:<24}  # {told}")
    return "\n".join(lines)


def reasons(model: type[Settings], name: str | Path) -> dict[str, str]:
    """Dotted key -> the comment beside it in the file, or in the one that it extends: why it is not the default."""
    text, found = _file(model, name).read_text(encoding="utf-8"), {}
    lines, parent = text.splitlines(), read_yaml(_file(model, name)).get("extends")

    def collect(section: yaml.MappingNode, prefix: str = "") -> None:
        for key, value in section.value:
            if isinstance(value, yaml.MappingNode):
                collect(value, f"{prefix}{key.value}.")
            else:
                found[f"{prefix}{key.value}"] = lines[key.start_mark.line].partition(" # ")[2].strip()

    if whole := yaml.compose(text):
        collect(whole)
    given = dict.fromkeys(_given(), "--set")
    return {**(reasons(model, str(parent)) if parent else {}), **found, **given}


def flat(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    """(dotted key, value, field) of every setting; of a model those alone that are not as usual."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from flat(value, f"{prefix}{name}.")
        elif not isinstance(settings, ModelConfig) or field.is_required() or value != field.default:
            yield f"{prefix}{name}", value, field


def walk(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, source) for every setting there is."""
    for name, field in section.model_fields.items():
        if inner := _section_of(field):
            yield from walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""


def _section_of(field: FieldInfo) -> type[Settings] | None:
    """The section that a field is, also of "section or None"; None for a single setting."""
    choices = (field.annotation, *get_args(field.annotation))
    return next((c for c in choices if isinstance(c, type) and issubclass(c, Settings)), None)


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # ten times as fast where libyaml is
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: list[Any] = []
        for key, _ in node.value:  # before `<<` puts another mapping's keys among them
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for anything else, and for a key given twice."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{paths.shown(file)} is not valid YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{paths.shown(file)}: expected `key: value` lines, found {type(values).__name__}")
    return values or {}


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, section by section."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _file(model: type[Settings], name: str | Path) -> Path:
    own = str(name).endswith((".yaml", ".yml"))
    file = Path(name) if own else paths.CONFIGS / _FOLDERS[model] / f"{name}.yaml"
    if file.is_file():
        return file
    hint = f"{did_you_mean(str(name), known := names_of(model))}; known: {', '.join(known)}"
    raise UserError(f"no {model.__name__.lower()} {str(name)!r}{hint}")


def _layers(model: type[Settings], name: str | Path, seen: tuple[Path, ...] = ()) -> tuple[Path, dict]:
    """The file, and its values over those of the files that it extends; name and words are its own."""
    file = _file(model, name)
    if file in seen:
        raise UserError(f"{paths.shown(file)}: `extends` goes round in a circle")
    values = read_yaml(file)
    parent = values.pop("extends", None)
    if parent is None:
        return file, {"name": file.stem, **values}
    _, base = _layers(model, str(parent), (*seen, file))
    words = {key: "" for key in ("description", "item") if key in model.model_fields}
    return file, merge(base, {"name": file.stem, **words, **values})


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for key, value in values.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def _given() -> dict[str, Any]:
    """What `--set` or SET gave. Raises UserError for quotes that do not close."""
    text = os.environ.get(SET_ENV, "")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"settings {text!r} cannot be read: {error}") from None
    return parse_overrides(words)


def _from_command_line(model: type[Settings]) -> dict[str, Any]:
    values = _nested(_given())
    training = {key: values.pop(key) for key in _OF_EXPERIMENTS if key in values}
    _checked(Experiment, {"name": SET_ENV, **training}, Path("--set"), {})  # told even if none is loaded
    return training if model is Experiment else values


def _checked(model: type[Kind], values: Mapping[str, Any], file: Path, over: Mapping[str, Any]) -> Kind:
    """Raises UserError with a line for each problem: dotted key, bad value, nearest valid key or value."""
    try:
        return model.model_validate(merge(values, over))
    except ValidationError as error:
        told = [paths.shown(file) + (" with overrides:" if over else ":")]
        for item in error.errors():
            key, value = ".".join(map(str, item["loc"])) or model.__name__.lower(), item.get("input")
            problem = f"{key}: {item['msg'].removeprefix('Value error, ')}"
            if item["type"] == "extra_forbidden":
                problem = f"unknown key {key} (value {value!r}){_nearest_key(model, item['loc'])}"
            elif item["type"] == "missing":
                problem = f"{key}: missing"
            elif item["type"] != "value_error":
                choices = re.findall(r"'([^']*)'", item.get("ctx", {}).get("expected", ""))
                problem = f"{key}: {value!r}: {item['msg']}{did_you_mean(str(value), choices)}"
            told.append(f"  {problem}")
        raise UserError("\n".join(told)) from None


def _nearest_key(model: type[Settings], loc: tuple[str | int, ...]) -> str:
    """Suggest a sibling first, then the same word in any other section."""
    *parents, word = map(str, loc)
    section = model
    for part in parents:
        section = _section_of(section.model_fields[part])
    if close := nearest(word, section.model_fields):
        return f"; did you mean {'.'.join([*parents, close[0]])}?"
    everywhere = {dotted.split(".")[-1]: dotted for dotted, _ in walk(model)}
    if close := nearest(word, everywhere):
        return f"; did you mean {everywhere[close[0]]}?"
    return f"; valid keys here: {', '.join(section.model_fields)}"
