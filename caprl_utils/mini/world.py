"""Images with known facts: a seed gives a picture's content, its facts and every text that is true of it.

A picture is one of five kinds. Its facts all read "The <key> is <value>."; a question about a fact asks "What is the
<key>?". The caption repeats the words of the question before the value, the form that a small reader can learn
(reports/lab-log.md).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from caprl_utils.hashing import derive_seed
from caprl_utils.mini import vocabulary as words

KINDS = ("chart", "infographic", "document", "scene", "geometry")
SPLITS = ("zoo", "zoo-held-out", "rl", "benchmark", "pretraining")


def told_as(key: str, value: str) -> str:
    """The sentence of a fact."""
    return f"The {key} is {value}."


@dataclass(frozen=True)
class Fact:
    """One true statement: "The ``key`` is ``value``." ``options`` are all values it could have had."""

    key: str
    value: str
    options: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return told_as(self.key, self.value)

    @property
    def question(self) -> str:
        return f"What is the {self.key}?"


@dataclass(frozen=True)
class Picture:
    """The content of one image: ``facts`` that a caption can tell, ``known`` ones that anybody can guess."""

    id: str
    kind: str
    facts: tuple[Fact, ...]
    known: tuple[Fact, ...]
    layout: dict[str, object] = field(default_factory=dict, hash=False)


def picture(split: str, index: int, kind: str | None = None, seed: int = 0) -> Picture:
    """Picture ``index`` of a split; kinds take turns unless one is named.

    Splits have seeds of their own, so that benchmarks never show a training image.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    kind = kind or KINDS[index % len(KINDS)]
    rng = random.Random(derive_seed("mini-world", seed, split, kind, index))
    facts, known_keys, layout = _MAKERS[kind](rng)
    known = tuple(known_fact(key) for key in known_keys)
    return Picture(f"{split}-{kind}-{index:06d}", kind, tuple(facts), known, layout)


def known_fact(key: str) -> Fact:
    """The fact of :data:`caprl_utils.mini.vocabulary.KNOWLEDGE` with this key."""
    relation = key.rsplit(" ", 1)[0]
    values = {value for other, value in words.KNOWLEDGE.items() if other.rsplit(" ", 1)[0] == relation}
    if relation == "number of sides of a":
        values |= {"two", "eight"}
    return Fact(key, words.KNOWLEDGE[key], tuple(sorted(values)))


def caption(facts: Sequence[Fact], kind: str) -> str:
    """Caption of a picture of ``kind`` that tells ``facts`` in the order given."""
    return " ".join([f"{words.INTRODUCTION[kind]}.", *(fact.sentence for fact in facts)])


def statements(text: str) -> list[tuple[str, str] | None]:
    """What a caption states, see `registry.DrawnSource`."""
    whole = text[: text.rfind(".")].split(". ") if "." in text else []
    parts = [re.fullmatch("The (.+?) is (.+)", s) for s in whole if s not in words.INTRODUCTION.values()]
    return [part.groups() if part and part[1] in _keys() else None for part in parts]


@cache
def _keys() -> frozenset[str]:
    """Every key that a picture of this world can have, and those of what needs no picture."""
    places = [f"{place} {what}" for place in words.POSITIONS for what in ("shape", "colour")]
    named = {"value": words.CITIES, "share": words.GOODS, "length": ("AB", "BC", "CA", "CD", "DA")}
    single = ["chart type", "topic", "chart colour", "header colour", "document type", "name", "city", "month",
              "total", "room", "figure", "line colour"]  # fmt: skip
    return frozenset(
        [*single, *places, *(f"{n} of {w}" for n, found in named.items() for w in found), *words.KNOWLEDGE]
    )


def distractors(rng: random.Random, fact: Fact, others: Sequence[Fact], count: int = 3) -> list[str]:
    """Wrong options of a question: first the values that other facts of the picture have, then any other value."""
    near = [o.value for o in others if o.value != fact.value and o.value in fact.options]
    near = rng.sample(sorted(set(near)), min(len(set(near)), rng.choice((1, 2, count))))
    rest = [v for v in fact.options if v != fact.value and v not in near]
    return (near + rng.sample(rest, count))[:count]


def _numbers(rng: random.Random, count: int) -> list[str]:
    return rng.sample(words.NUMBERS, count)


def _chart(rng: random.Random) -> tuple[list[Fact], list[str], dict[str, object]]:
    kind, topic = rng.choice(words.CHART_TYPES), rng.choice(words.CHART_TOPICS)
    colour, cities = rng.choice(list(words.COLOURS)), rng.sample(words.CITIES, 4)
    values = _numbers(rng, 4)
    facts = [
        Fact("chart type", kind, tuple(words.CHART_TYPES)),
        Fact("topic", topic, tuple(words.CHART_TOPICS)),
        Fact("chart colour", colour, tuple(words.COLOURS)),
        *(Fact(f"value of {c}", v, tuple(words.NUMBERS)) for c, v in zip(cities, values, strict=True)),
    ]
    layout = {"type": kind, "topic": topic, "colour": colour, "labels": cities, "values": values}
    return facts, [f"country of {c}" for c in cities], layout


def _infographic(rng: random.Random) -> tuple[list[Fact], list[str], dict[str, object]]:
    topic, goods, values = rng.choice(words.GOODS_TOPICS), rng.sample(words.GOODS, 4), _numbers(rng, 4)
    colour = rng.choice(list(words.COLOURS))
    facts = [
        Fact("topic", topic, tuple(words.GOODS_TOPICS)),
        Fact("header colour", colour, tuple(words.COLOURS)),
        *(Fact(f"share of {g}", v, tuple(words.NUMBERS)) for g, v in zip(goods, values, strict=True)),
    ]
    layout = {"topic": topic, "colour": colour, "labels": goods, "values": values, "style": rng.randrange(3)}
    return facts, [f"source of {g}" for g in goods], layout


def _document(rng: random.Random) -> tuple[list[Fact], list[str], dict[str, object]]:
    doc, city, month = rng.choice(words.DOCUMENT_TYPES), rng.choice(words.CITIES), rng.choice(words.MONTHS)
    total, room = _numbers(rng, 2)
    fields = [
        Fact("name", rng.choice(words.NAMES), tuple(words.NAMES)),
        Fact("city", city, tuple(words.CITIES)),
        Fact("month", month, tuple(words.MONTHS)),
        Fact("total", total, tuple(words.NUMBERS)),
        Fact("room", room, tuple(words.NUMBERS)),
    ]
    fields = rng.sample(fields, 4)
    facts = [Fact("document type", doc, tuple(words.DOCUMENT_TYPES)), *fields]
    shown = {f.value for f in fields}
    known = [k for k, v in ((f"country of {city}", city), (f"season of {month}", month)) if v in shown]
    layout = {"type": doc, "fields": [(f.key, f.value) for f in fields], "style": rng.randrange(3)}
    return facts, known, layout


def _scene(rng: random.Random) -> tuple[list[Fact], list[str], dict[str, object]]:
    shapes = [rng.choice(words.SHAPES) for _ in words.POSITIONS]
    colours = [rng.choice(list(words.COLOURS)) for _ in words.POSITIONS]
    facts = []
    for position, shape, colour in zip(words.POSITIONS, shapes, colours, strict=True):
        facts.append(Fact(f"{position} shape", shape, tuple(words.SHAPES)))
        facts.append(Fact(f"{position} colour", colour, tuple(words.COLOURS)))
    jitter = [(rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(0.85, 1.1)) for _ in words.POSITIONS]
    layout = {"shapes": shapes, "colours": colours, "jitter": jitter, "background": rng.randrange(4)}
    return facts, [f"number of sides of a {s}" for s in shapes if s in words.SIDES], layout


def _geometry(rng: random.Random) -> tuple[list[Fact], list[str], dict[str, object]]:
    figure, colour = rng.choice(words.FIGURES), rng.choice(list(words.COLOURS))
    sides = ["AB", "BC", "CA"] if figure == "triangle" else ["AB", "BC", "CD", "DA"]
    values = _numbers(rng, len(sides))
    facts = [
        Fact("figure", figure, tuple(words.FIGURES)),
        Fact("line colour", colour, tuple(words.COLOURS)),
        *(Fact(f"length of {s}", v, tuple(words.NUMBERS)) for s, v in zip(sides, values, strict=True)),
    ]
    layout = {"figure": figure, "colour": colour, "sides": sides, "values": values, "fill": rng.random() < 0.5}
    return facts, [f"number of sides of a {figure}"], layout


_MAKERS: dict[str, Callable[[random.Random], tuple[list[Fact], list[str], dict[str, object]]]] = {
    "chart": _chart,
    "infographic": _infographic,
    "document": _document,
    "scene": _scene,
    "geometry": _geometry,
}
