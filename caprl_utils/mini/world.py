"""Images with known facts: a seed gives a picture's content, its facts and every text that is true of it.

A picture is one of five kinds; its facts agree with each other (shares make 100 percent, totals are sums, opposite
sides are equal). A fact is told in three phrasings and asked in two; some follow from others (the largest, a range),
and one of every picture is so common that it can be guessed (`Fact.usual`): a question about it leaks.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.hashing import derive_seed
from caprl_utils.mini import vocabulary as words

KINDS = ("chart", "infographic", "document", "scene", "geometry")
UNSEEN = ("chart-type", "chart-pairs", "chart-labels")
"""Charts that no training shows: pies, labels never seen with their topic, six or seven labels."""
SPLITS = ("zoo", "zoo-held-out", "rl", "benchmark", "pretraining")
GUESSED = 0.75
"""Share of pictures in which a skewed fact has its usual value."""


@dataclass(frozen=True)
class Fact:
    """One true statement: relation, whom it is about ("" where it is the picture), value, and all possible values."""

    relation: str
    head: str
    value: str
    options: tuple[str, ...] = field(repr=False)
    usual: bool = False

    @property
    def key(self) -> str:
        return f"{self.relation} {self.head}".rstrip()

    @property
    def word(self) -> str:
        """The one word (or phrase) that the value belongs to."""
        return self.head or self.relation

    def sentence(self, form: int = 0) -> str:
        """The fact as a sentence, in one of three phrasings."""
        return words.RELATIONS[self.relation].statements[form].format(h=self.head, v=self.value) + "."

    def question(self, form: int = 0) -> str:
        """The fact as a question, in one of two phrasings."""
        return words.RELATIONS[self.relation].questions[form].format(h=self.head)


@dataclass(frozen=True)
class Picture:
    """The content of one image: its facts in reading order, and what the renderer needs."""

    id: str
    kind: str
    facts: tuple[Fact, ...]
    layout: dict[str, object] = field(default_factory=dict, hash=False)

    @property
    def known(self) -> tuple[Fact, ...]:
        """Facts that can be guessed without looking."""
        return tuple(fact for fact in self.facts if fact.usual)


def picture(split: str, index: int, kind: str | None = None, seed: int = 0) -> Picture:
    """Picture ``index`` of a split; kinds take turns unless one (also of `UNSEEN`) is named.

    Splits have seeds of their own, so that benchmarks never show a training image.
    """
    if split not in SPLITS:
        raise UserError(f"the mini world has no split {split!r}{did_you_mean(split, SPLITS)}; its: {', '.join(SPLITS)}")
    kind = kind or KINDS[index % len(KINDS)]
    rng = random.Random(derive_seed("mini-world", seed, split, kind, index))
    plain = kind.partition("-")[0]
    facts, layout = _chart(rng, kind) if plain == "chart" else _MAKERS[kind](rng)
    return Picture(f"{split}-{kind}-{index:06d}", plain, tuple(facts), layout | {"seed": rng.randrange(2**31)})


def caption(facts: Sequence[Fact], kind: str, forms: Sequence[int] | None = None) -> str:
    """Caption of a picture of ``kind`` that tells ``facts`` in the order given, each in its phrasing (the first)."""
    told = (fact.sentence(form) for fact, form in zip(facts, forms or [0] * len(facts), strict=True))
    return " ".join([f"{words.INTRODUCTION[kind]}.", *told])


@functools.lru_cache
def _grammar() -> list[tuple[str, re.Pattern[str]]]:
    """(relation, pattern with groups h and v) of every phrasing."""
    found = []
    for relation, forms in words.RELATIONS.items():
        for form in forms.statements:
            pattern = re.escape(form).replace(r"\{h\}", "(?P<h>[A-Za-z]+)").replace(r"\{v\}", "(?P<v>[A-Za-z0-9]+)")
            found.append((relation, re.compile(pattern)))
    return found


def told_as(key: str, value: str) -> str:
    """The sentence that states a fact, in its first phrasing."""
    relation = key if key in words.ALONE else key.rpartition(" ")[0]
    return Fact(relation, key.removeprefix(relation).strip(), value, ()).sentence()


def statements(text: str) -> list[tuple[str, str] | None]:
    """What a caption states, see `registry.DrawnSource`."""
    told = []
    for sentence in text[: text.rfind(".")].split(". ") if "." in text else []:
        if sentence in words.INTRODUCTION.values():
            continue
        hits = ((relation, pattern.fullmatch(sentence)) for relation, pattern in _grammar())
        relation, hit = next(((relation, hit) for relation, hit in hits if hit), ("", None))
        head = hit.groupdict().get("h", "") if hit else ""
        known = hit and (not head or head in words.HEADS)
        told.append((f"{relation} {head}".rstrip(), hit["v"]) if known else None)
    return told


def distractors(rng: random.Random, fact: Fact, others: Sequence[Fact]) -> list[str]:
    """Three wrong options of a question: first values that other facts of the picture have, then any other value."""
    shown = {o.value for o in others} | {o.head for o in others}
    near = sorted(v for v in shown if v != fact.value and v in fact.options)
    near = rng.sample(near, min(len(near), rng.choice((1, 2, 3))))
    rest = [v for v in fact.options if v != fact.value and v not in near]
    return (near + rng.sample(rest, min(len(rest), 3)))[:3]


# The five kinds

Content = tuple[list[Fact], dict[str, object]]


def _alone(relation: str, value: str, options: Sequence[str]) -> Fact:
    return Fact(relation, "", value, tuple(options))


def _skewed(rng: random.Random, relation: str, table: dict, sure: bool = False) -> Fact:
    value = table["usual"] if sure or rng.random() < GUESSED else rng.choice(table["others"])
    return Fact(relation, "", value, (table["usual"], *table["others"]), usual=True)


def _extremes(pairs: dict[str, str], options: Sequence[str]) -> list[Fact]:
    """The largest and the smallest of what a picture shows."""
    ranked = sorted(pairs, key=lambda name: int(pairs[name]))
    return [_alone("largest", ranked[-1], options), _alone("smallest", ranked[0], options)]


def _numbers(low: int, high: int, step: int = 5) -> list[str]:
    return [str(n) for n in range(low, high + 1, step)]


def _unseen_pair(topic: str, label: str) -> bool:
    """Whether this topic and this label never stand in one chart of any training (one pair in eight)."""
    return derive_seed("pair", topic, label) % 8 == 0


def _labels(rng: random.Random, topic: str, count: int, unseen: bool = False) -> list[str]:
    return rng.sample([city for city in words.CITIES if _unseen_pair(topic, city) == unseen], count)


def _chart(rng: random.Random, kind: str) -> Content:
    topics = [t for t in words.CHART_TOPICS if sum(_unseen_pair(t, c) for c in words.CITIES) > 2]
    topic = rng.choice(topics if kind == "chart-pairs" else words.CHART_TOPICS)
    shape = "pie" if kind == "chart-type" else rng.choice(words.CHART_TYPES[:4])
    head = [_alone("chart type", shape, words.CHART_TYPES), _alone("topic", topic, words.CHART_TOPICS)]
    if kind == "chart" and shape != "area" and rng.random() < 0.3:
        more, layout = _several_series(rng, topic)
    else:
        count = rng.choice((6, 7)) if kind == "chart-labels" else 3 if kind == "chart-pairs" else rng.choice((3, 4, 5))
        more, layout = _one_series(rng, shape, _labels(rng, topic, count, kind == "chart-pairs"))
    unit = _skewed(rng, "unit", words.UNITS, sure=shape == "pie")
    return [*head, unit, *more], layout | {"type": shape, "topic": topic, "unit": unit.value}


def _one_series(rng: random.Random, shape: str, labels: list[str]) -> Content:
    printed = shape == "pie" or rng.random() < 0.5
    if shape == "pie":
        values = _parts(rng, len(labels))
    else:
        values = rng.sample(_numbers(10, 95) if printed else _numbers(10, 90, 10), len(labels))
    if shape in ("line", "area") and (trend := rng.choice(words.TRENDS)) != "mixed":
        values = sorted(values, key=int, reverse=trend == "falling")
    facts = [Fact("value of", c, v, tuple(_numbers(5, 95))) for c, v in zip(labels, values, strict=True)]
    facts += _extremes(dict(zip(labels, values, strict=True)), words.CITIES)
    if shape in ("line", "area"):
        rising = [int(a) < int(b) for a, b in pairwise(values)]
        trend = "rising" if all(rising) else "mixed" if any(rising) else "falling"
        facts.append(_alone("trend", trend, words.TRENDS))
    else:
        between = str(max(map(int, values)) - min(map(int, values)))
        facts.append(_alone("range", between, _numbers(5, 90)))
    return facts, {"labels": labels, "values": [values], "printed": printed, "colours": [rng.choice([*words.COLOURS])]}


def _several_series(rng: random.Random, topic: str) -> Content:
    """Two or three series: their colours, and who leads at each label."""
    labels = _labels(rng, topic, rng.choice((2, 3)))
    series = rng.sample(words.SERIES, rng.choice((2, 2, 3)))
    colours = rng.sample([*words.COLOURS], len(series))
    values = [rng.sample(_numbers(10, 90, 10), len(series)) for _ in labels]  # of one label: all different
    facts = [Fact("colour of", s, c, tuple(words.COLOURS)) for s, c in zip(series, colours, strict=True)]
    for label, row in zip(labels, values, strict=True):
        facts.append(Fact("leader in", label, series[row.index(max(row, key=int))], tuple(words.SERIES)))
    by_series = [list(column) for column in zip(*values, strict=True)]
    return facts, {"labels": labels, "values": by_series, "printed": False, "series": series, "colours": colours}


def _parts(rng: random.Random, count: int) -> list[str]:
    """Different multiples of five that make 100."""
    while True:
        cuts = sorted(rng.sample(range(5, 100, 5), count - 1))
        parts = [b - a for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]
        if len(set(parts)) == count:
            return [str(part) for part in parts]


def _infographic(rng: random.Random) -> Content:
    topic, colour, year = rng.choice(words.GOODS_TOPICS), rng.choice([*words.COLOURS]), rng.choice(words.YEARS)
    goods = rng.sample(words.GOODS, rng.choice((3, 4)))
    shares, region = _parts(rng, len(goods)), _skewed(rng, "region", words.REGIONS)
    facts = [_alone("topic", topic, words.GOODS_TOPICS), _alone("header colour", colour, tuple(words.COLOURS)),
             _alone("year", year, words.YEARS)]  # fmt: skip
    facts += [Fact("share of", g, s, tuple(_numbers(5, 85))) for g, s in zip(goods, shares, strict=True)]
    facts += [*_extremes(dict(zip(goods, shares, strict=True)), words.GOODS), region]
    return facts, {"topic": topic, "colour": colour, "year": year, "labels": goods, "values": shares,
                   "region": region.value}  # fmt: skip


def _document(rng: random.Random) -> Content:
    kind, currency = rng.choice(words.DOCUMENT_TYPES), _skewed(rng, "currency", words.CURRENCIES)
    fields = rng.sample([("name", words.NAMES), ("city", words.CITIES), ("month", words.MONTHS)], 2)
    told = [_alone(key, rng.choice(options), options) for key, options in fields]
    items = rng.sample(words.ITEMS, rng.choice((2, 3)))
    prices = rng.sample(_numbers(5, 50), len(items))
    total = str(sum(map(int, prices)))
    facts = [_alone("document type", kind, words.DOCUMENT_TYPES), *told]
    facts += [Fact("price of", i, p, tuple(_numbers(5, 50))) for i, p in zip(items, prices, strict=True)]
    facts += [_alone("total", total, _numbers(15, 135)), currency]
    return facts, {"type": kind, "fields": [(f.relation, f.value) for f in told], "labels": items, "values": prices,
                   "total": total, "currency": currency.value}  # fmt: skip


def _scene(rng: random.Random) -> Content:
    """Three or four shapes over ground and sky; one of them may stand there two or three times, and is then counted."""
    sky, ground = _skewed(rng, "sky", words.SKIES), rng.choice(words.GROUNDS)
    shapes = rng.sample([*words.SHAPES], rng.choice((3, 4)))
    colours = [rng.choice([*words.COLOURS]) for _ in shapes]
    counts = [rng.choice((1, 1, 2, 3)) if number == 0 else 1 for number in range(len(shapes))]
    objects = [s for s, n in zip(shapes, counts, strict=True) for _ in range(n)]
    rng.shuffle(objects)  # from left to right, as the facts are told
    order = sorted(shapes, key=objects.index)
    colour_of = dict(zip(shapes, colours, strict=True))
    biggest = rng.choice([s for s, n in zip(shapes, counts, strict=True) if n == 1])
    facts = [sky, _alone("ground", ground, words.GROUNDS)]
    facts += [Fact("colour of", s, colour_of[s], tuple(words.COLOURS)) for s in order]
    facts += [Fact("number of", words.SHAPES[s], words.COUNTS[n - 1], tuple(words.COUNTS[:4]))
              for s, n in zip(shapes, counts, strict=True) if n > 1]  # fmt: skip
    places = {"leftmost": objects[0], "rightmost": objects[-1], "biggest": biggest}
    facts += [_alone(f"{place} shape", name, tuple(words.SHAPES)) for place, name in places.items()]
    return facts, {"sky": sky.value, "ground": ground, "objects": objects, "biggest": biggest, "colours": colour_of}


def _geometry(rng: random.Random) -> Content:
    figure, colour = rng.choice(words.FIGURES), rng.choice([*words.COLOURS])
    a, b = sorted(rng.sample(_numbers(20, 60), 2), key=int)
    if figure == "triangle":  # the third side is longer than the difference of the others, shorter than their sum
        c = rng.choice([n for n in _numbers(20, 60) if int(b) - int(a) < int(n) < int(a) + int(b) and n not in (a, b)])
        names, sides = ["AB", "BC", "CA"], [a, b, c]
    else:
        names = ["AB", "BC", "CD", "DA"]
        sides = {"rectangle": [b, a, b, a], "square": [a, a, a, a], "kite": [a, b, b, a]}[figure]
    angles = {"triangle": "none", "kite": "none", "rectangle": "four", "square": "four"}[figure]
    if figure == "triangle" and rng.random() < 0.5:  # 3, 4, 5 times five or ten: right at B
        factor = rng.choice((5, 10))
        sides, angles = [str(3 * factor), str(4 * factor), str(5 * factor)], "one"
    unit, total = _skewed(rng, "unit", words.LENGTHS), str(sum(map(int, sides)))
    facts = [_alone("figure", figure, words.FIGURES), _alone("line colour", colour, tuple(words.COLOURS))]
    facts += [Fact("length of", n, s, tuple(_numbers(15, 65))) for n, s in zip(names, sides, strict=True)]
    facts += [_alone("perimeter", total, _numbers(60, 240)), _alone("right angle count", angles, words.RIGHT_ANGLES)]
    if figure == "triangle":
        facts.append(_alone("longest side", names[sides.index(max(sides, key=int))], words.SIDES))
    facts.append(unit)
    return facts, {"figure": figure, "colour": colour, "sides": names, "values": sides, "angles": angles,
                   "unit": unit.value, "fill": rng.random() < 0.5}  # fmt: skip


_MAKERS: dict[str, Callable[[random.Random], Content]] = {
    "infographic": _infographic, "document": _document, "scene": _scene, "geometry": _geometry,
}  # fmt: skip
