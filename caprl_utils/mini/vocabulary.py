"""The words of the mini world, and the sentences and questions in which each relation is told and asked."""

from __future__ import annotations

from dataclasses import dataclass

NUMBERS = [str(n) for n in range(5, 245, 5)]
COUNTS = ["one", "two", "three", "four", "five", "six", "seven"]
YEARS = [str(year) for year in range(2015, 2025)]
COLOURS = {
    "red": (214, 39, 40), "blue": (31, 95, 180), "green": (44, 140, 44), "orange": (245, 130, 20),
    "purple": (140, 70, 170), "brown": (125, 80, 50), "pink": (235, 120, 180), "black": (40, 40, 40),
}  # fmt: skip
SHAPES = {
    "circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "heart": "hearts",
    "cross": "crosses", "diamond": "diamonds", "hexagon": "hexagons",
}  # fmt: skip
CITIES = ["Rome", "Oslo", "Lima", "Bern", "Riga", "Kyiv", "Baku", "Doha",
          "Nice", "Bonn", "Graz", "Cork", "Lagos", "Cairo", "Tokyo", "Delhi"]  # fmt: skip
SERIES = ["exports", "imports", "cars", "trains", "boys", "girls", "coal", "solar"]
GOODS = ["milk", "wool", "silk", "eggs", "honey", "bread", "paper", "wine", "sugar", "cheese"]
ITEMS = ["soap", "pens", "lamp", "desk", "rope", "paint", "tape", "nails", "tea", "rice"]
MONTHS = ["January", "March", "April", "May", "June", "July", "August", "October", "November", "December"]
NAMES = ["Anna", "Ben", "Carl", "Dora", "Emil", "Fred", "Gina", "Hugo", "Ida", "Jack", "Lena", "Maria"]
CHART_TOPICS = ["sales", "rainfall", "visitors", "prices", "accidents", "births", "energy", "wages"]
CHART_TYPES = ["columns", "bars", "line", "area", "pie"]
TRENDS = ["rising", "falling", "mixed"]
GOODS_TOPICS = ["trade", "diet", "harvest", "market", "budget", "stocks"]
DOCUMENT_TYPES = ["invoice", "receipt", "ticket", "contract", "certificate"]
GROUNDS = ["grass", "sand", "snow", "water"]
FIGURES = ["triangle", "rectangle", "kite", "square"]
SIDES = ["AB", "BC", "CD", "DA", "CA"]
RIGHT_ANGLES = ["none", "one", "four"]

# Values that everybody guesses right three times in four: what leaks.
UNITS = {"usual": "percent", "others": ["euros", "tons", "hours"]}
SKIES = {"usual": "blue", "others": ["grey", "pink", "black"]}
REGIONS = {"usual": "world", "others": ["Europe", "Asia", "Africa"]}
CURRENCIES = {"usual": "euros", "others": ["dollars", "pounds", "francs"]}
LENGTHS = {"usual": "cm", "others": ["mm", "km", "inch"]}

INTRODUCTION = {
    "chart": "This is a chart",
    "infographic": "This is an infographic",
    "document": "This is a document",
    "scene": "This is a scene",
    "geometry": "This is a drawing",
}


@dataclass(frozen=True)
class Relation:
    """How facts of a relation are told and asked; ``{h}`` is whom it is about, ``{v}`` the value.

    Value and the word that it belongs to stand two tokens apart in every sentence, either way round: what small
    readers can learn to bind (reports/lab-log.md).
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _about(key: str, having: str, asked: str) -> Relation:
    """A relation with a head, which comes first in all phrasings: with the value first, small readers went on to mix up
    the heads of a picture (reports/lab-log.md).
    """
    return Relation(
        (f"The {key} {{h}} is {{v}}", f"{{h}} {having} {{v}}", f"For {{h}} the {key.split()[0]} is {{v}}"),
        (f"What is the {key} {{h}}?", asked),
    )


def _alone(key: str) -> Relation:
    """A relation of the whole picture: its name is the word that the value belongs to."""
    return Relation(
        (f"The {key} is {{v}}", f"Its {key} is {{v}}", f"We see {{v}} as the {key}"),
        (f"What is the {key}?", f"What is given as the {key}?"),
    )


ALONE = ["chart type", "topic", "unit", "largest", "smallest", "range", "trend", "header colour", "year", "region",
         "document type", "name", "city", "month", "total", "currency", "sky", "ground", "leftmost shape",
         "rightmost shape", "biggest shape", "figure", "line colour", "perimeter", "longest side",
         "right angle count"]  # fmt: skip
RELATIONS: dict[str, Relation] = {
    "value of": _about("value of", "has a value of", "How high is {h}?"),
    "leader in": _about("leader in", "has as leader", "Who leads in {h}?"),
    "share of": _about("share of", "has a share of", "How large is the part of {h}?"),
    "price of": _about("price of", "has a price of", "How much is paid for {h}?"),
    "length of": _about("length of", "has a length of", "How long is {h}?"),
    "colour of": _about("colour of", "has the colour", "Which colour do we see at {h}?"),
    "number of": _about("number of", "come in the number", "How many are there of {h}?"),
} | {key: _alone(key) for key in ALONE}
HEADS = [*CITIES, *SERIES, *GOODS, *ITEMS, *SHAPES, *SHAPES.values(), *SIDES]
"""Every word that a relation can be about."""
