"""The words of the mini world, and what everybody in it knows without looking (the source of leaking questions)."""

from __future__ import annotations

NUMBERS = [str(n) for n in range(21, 97, 3)]
COLOURS = {
    "red": (214, 39, 40),
    "blue": (31, 95, 180),
    "green": (44, 140, 44),
    "orange": (245, 130, 20),
    "purple": (140, 70, 170),
    "brown": (125, 80, 50),
    "pink": (235, 120, 180),
    "black": (40, 40, 40),
}
SHAPES = ["circle", "square", "triangle", "star", "heart", "cross", "diamond", "hexagon"]
POSITIONS = ["top left", "top right", "bottom left", "bottom right"]

COUNTRY = {
    "Rome": "Italy",
    "Oslo": "Norway",
    "Lima": "Peru",
    "Bern": "Switzerland",
    "Riga": "Latvia",
    "Kyiv": "Ukraine",
    "Baku": "Azerbaijan",
    "Doha": "Qatar",
    "Nice": "France",
    "Bonn": "Germany",
    "Graz": "Austria",
    "Cork": "Ireland",
    "Lagos": "Nigeria",
    "Cairo": "Egypt",
    "Tokyo": "Japan",
    "Delhi": "India",
}
SEASON = {
    "January": "winter",
    "March": "spring",
    "April": "spring",
    "May": "spring",
    "June": "summer",
    "July": "summer",
    "August": "summer",
    "October": "autumn",
    "November": "autumn",
    "December": "winter",
}
SIDES = {"triangle": "three", "square": "four", "hexagon": "six", "rectangle": "four", "kite": "four"}
SOURCE = {
    "milk": "cows",
    "wool": "sheep",
    "silk": "worms",
    "eggs": "hens",
    "honey": "bees",
    "bread": "wheat",
    "paper": "trees",
    "wine": "grapes",
    "sugar": "beets",
    "cheese": "goats",
}
CITIES = list(COUNTRY)
MONTHS = list(SEASON)
GOODS = list(SOURCE)
NAMES = ["Anna", "Ben", "Carl", "Dora", "Emil", "Fred", "Gina", "Hugo", "Ida", "Jack", "Lena", "Maria"]
CHART_TOPICS = ["sales", "rainfall", "visitors", "exports", "prices", "accidents", "births", "energy"]
CHART_TYPES = ["columns", "bars", "line", "dots"]
GOODS_TOPICS = ["trade", "diet", "harvest", "market", "budget", "stocks"]
DOCUMENT_TYPES = ["invoice", "receipt", "ticket", "contract", "certificate"]
FIGURES = ["triangle", "rectangle", "kite", "square"]

INTRODUCTION = {
    "chart": "This is a chart",
    "infographic": "This is an infographic",
    "document": "This is a document",
    "scene": "This is a scene",
    "geometry": "This is a drawing",
}

KNOWLEDGE: dict[str, str] = (
    {f"country of {city}": country for city, country in COUNTRY.items()}
    | {f"season of {month}": season for month, season in SEASON.items()}
    | {f"number of sides of a {shape}": sides for shape, sides in SIDES.items()}
    | {f"source of {good}": source for good, source in SOURCE.items()}
)
"""Key -> value of what needs no image: a question about it leaks its answer to whoever knows the world."""
