"""The benchmark registry: facts from configs/benchmarks.yaml, typed and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from caprl_utils import paths
from caprl_utils.config import read_yaml
from caprl_utils.errors import UserError, did_you_mean

REGISTRY = paths.CONFIGS / "benchmarks.yaml"

AnswerKind = Literal[
    "short", "short_list", "accepted_list", "letter", "letter_or_open", "letter_or_math", "letter_or_short",
    "choice_or_typed", "open",
]  # fmt: skip


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Caprl(_Facts):
    """The authors' evaluation file of a benchmark, and the branch of their scorer that it takes."""

    branch: Literal["chart", "info", "symbolic"]
    file: str | None = None


class Hub(_Facts):
    """Where the data are. `revision` is None where no commit could be checked: pass one for a real run."""

    id: str
    config: str | None = None
    images_config: str | None = None
    split: str
    revision: str | None = None
    data_files: str | None = None
    keep: dict[str, str] = Field(default_factory=dict)


class Columns(_Facts):
    """Column names of the hub layout, by role."""

    image: tuple[str, ...] = ()
    question: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


class Ask(_Facts):
    """How a question without options is put (one with options asks for a letter), in our words after each benchmark's.
    reply: "short" is a word, a number or a letter; "long" has room for reasoning. format: what the answer is to look
    like; {names} are facts of the row. by: the fact that picks one of `formats` instead.
    """

    reply: Literal["short", "long"] = "short"
    format: str = ""
    by: str | None = None
    formats: dict[str | int, str] = Field(default_factory=dict)

    def text(self, row: Mapping[str, Any]) -> str:
        """The instruction for one row; the row's own, where the data bring one."""
        if "own_format" in row:
            return row["own_format"]
        return self.formats.get(row.get(self.by), self.format).format_map(row)


class Benchmark(_Facts):
    """One benchmark. `tables` are the paper's (3: Prism, 1 and 2: pretraining). `metric` is a code of metrics.METRICS;
    `caprl` is None where the authors' scorer has no file for it. `size`: rows of the split that is scored, or about how
    many. `apart`: a held-out split, no part of averages. `loader` ("module:function") makes the samples of a rendered
    benchmark from (key, num_samples, seed). One without hub and loader is known only from the authors' file.
    """

    key: str
    name: str
    tables: tuple[int, ...] = ()
    caprl: Caprl | None = None
    hub: Hub | None = None
    size: dict[str, Any] = Field(default_factory=dict)
    columns: Columns | None = None
    answer: AnswerKind
    ask: Ask = Ask()
    metric: str
    apart: bool = False
    judge: Literal["no", "optional", "needed"] = "no"
    letters: str | None = None
    loader: str | None = None
    licence: dict[str, str] = Field(default_factory=dict)
    prism_fit: str | None = None
    notes: tuple[str, ...] = ()

    def rows(self) -> str:
        """How many rows are scored, as far as it is known."""
        about = f"about {self.size['about']}" if "about" in self.size else "unknown"
        return str(self.size.get("rows") or about)


@lru_cache(maxsize=4)
def load_registry(path: Path = REGISTRY) -> dict[str, Benchmark]:
    """All benchmarks by key, in the file's order. Raises UserError naming the entry that is wrong."""
    try:
        items = TypeAdapter(dict[str, list[Benchmark]]).validate_python(read_yaml(path))["benchmarks"]
    except ValidationError as error:
        raise UserError(f"{paths.shown(path)} does not hold a valid registry: {error}") from error
    if twice := [key for key, count in Counter(item.key for item in items).items() if count > 1]:
        raise UserError(f"{paths.shown(path)}: keys given twice: {', '.join(twice)}")
    return {item.key: item for item in items}


def get_benchmark(key: str) -> Benchmark:
    """The benchmark `key`; UserError with the nearest key otherwise."""
    registry = load_registry()
    if key in registry:
        return registry[key]
    hint = did_you_mean(key, registry) or f"; known: {', '.join(registry)}"
    raise UserError(f"unknown benchmark {key!r}{hint}")


def averaged(names: Iterable[str]) -> list[str]:
    """Those of some benchmarks that averages are over: all but held-out splits, where there are others."""
    registry, names = load_registry(), list(names)
    return [name for name in names if name not in registry or not registry[name].apart] or names


def benchmarks_of_table(number: int) -> list[Benchmark]:
    """The benchmarks of one of the paper's tables, in its order of columns."""
    return [item for item in load_registry().values() if number in item.tables]


def overview() -> str:
    """One line a benchmark: key, name, rows, metric, and the paper's tables that have it."""
    lines = []
    for item in load_registry().values():
        tables = f"tables {', '.join(map(str, item.tables))}" if item.tables else ""
        where = "rendered here" if item.loader else f"{item.rows()} rows"
        lines.append(f"{item.key:<17} {item.name:<24} {where:<16} {item.metric:<30} {tables}".rstrip())
    return "\n".join(lines)
