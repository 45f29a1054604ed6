"""Charts of the mini world, by matplotlib: five types, five looks, five families of fonts."""

from __future__ import annotations

import math
import random
import threading
from dataclasses import dataclass

from PIL import Image

from caprl_utils.mini.canvas import FACES, GREY, INK, SIZE, WHITE, Canvas, Colour, fit, font_file, ink_on, mix, overlap, text_width
from caprl_utils.mini.vocabulary import COLOURS

TITLES = ("{T} by city", "{T} in 2020", "The {t} in 2019", "{T} at a glance", "{T}, city by city", "Report: {t}")
UNITS = ("in {u}", "unit: {u}", "({u})", "all in {u}")
SOURCES = ("Source: city offices", "Source: own count", "Data: yearbook")
TICK, UNDER = 17, 8  # size of a tick's number; pixels between a mark and its words
_LOCK = threading.Lock()  # matplotlib's settings belong to the whole process


@dataclass(frozen=True)
class Look:
    """One of matplotlib's styles, as far as a small chart shows it."""

    paper: str
    panel: str
    grid: str
    dashes: str
    spines: tuple[str, ...]
    edge: str  # of bars and wedges
    title: str  # where it stands


LOOKS = (
    Look("white", "#e5e5e5", "white", "-", (), "none", "center"),  # ggplot
    Look("white", "white", "#cccccc", "-", ("left", "right", "top", "bottom"), "white", "center"),  # seaborn, whitegrid
    Look("#f0f0f0", "#f0f0f0", "#c4c4c4", "-", (), "none", "left"),  # fivethirtyeight
    Look("white", "white", "#808080", ":", ("left", "right", "top", "bottom"), "black", "center"),  # classic
    Look("#fffdf7", "#fffdf7", "#dddddd", "-", ("left", "bottom"), "none", "left"),  # minimal
)


def draw(layout: dict) -> Canvas:
    """A chart; the same layout gives the same pixels, whatever matplotlib's settings are."""
    import matplotlib

    with _LOCK, matplotlib.rc_context({k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"}):
        return _Chart(layout).drawn()


class _Chart:
    """One chart while it is drawn; all places are pixels from the top left."""

    def __init__(self, layout: dict) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.layout, self.rng = layout, random.Random(layout["seed"])
        self.look, self.face = self.rng.choice(LOOKS), self.rng.choice([*FACES])
        self.labels, self.values = layout["labels"], [[int(v) for v in row] for row in layout["values"]]
        self.colours = [COLOURS[name] for name in layout["colours"]]
        self.lying = layout["type"] == "bars"
        self.figure = Figure(figsize=(SIZE / 72, SIZE / 72), dpi=72, facecolor=self.look.paper)  # a point is a pixel
        FigureCanvasAgg(self.figure)
        self.words = []  # (matplotlib's text, key)

    def drawn(self) -> Canvas:
        import numpy as np

        paint = self._pie if self.layout["type"] == "pie" else self._marks
        self._titles()
        paint()
        canvas = self.figure.canvas
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        shown = Canvas(Image.fromarray(np.ascontiguousarray(pixels)))
        for text, key in self.words:
            box = text.get_window_extent(canvas.get_renderer())
            shown.boxes.append((text.get_text(), (box.x0, SIZE - box.y1, box.x1, SIZE - box.y0)))
            if key:
                shown.places[key] = ((box.x0 + box.x1) / 2, SIZE - (box.y0 + box.y1) / 2)
        return shown

    def _word(self, x: float, y: float, text: str, size: float, key: str = "", colour: Colour = INK, bold=True, **how):
        how = {"ha": "center", "va": "center"} | how
        shape = self._font(size, bold)
        rgb = tuple(c / 255 for c in colour)
        self.words.append((self.figure.text(x / SIZE, 1 - y / SIZE, text, font=shape, color=rgb, **how), key))

    def _font(self, size: float, bold: bool = True):
        from matplotlib.font_manager import FontProperties

        return FontProperties(fname=str(font_file(self.face, bold)), size=size)

    def _axes(self, left: float, top: float, right: float, bottom: float):
        axes = self.figure.add_axes((left / SIZE, 1 - bottom / SIZE, (right - left) / SIZE, (bottom - top) / SIZE))
        axes.set_facecolor(self.look.panel)
        axes.xaxis.set_visible(False)
        axes.yaxis.set_visible(False)
        for side, spine in axes.spines.items():
            spine.set_visible(side in self.look.spines)
            spine.set_color("#999999" if self.look.edge == "white" else "black")
        return axes

    # titles, legend, labels

    def _titles(self) -> None:
        """The title, and below it the unit and the legend where they stand there; `top` is what is left."""
        rng, topic = self.rng, self.layout["topic"]
        title = rng.choice(TITLES).format(t=topic, T=topic.capitalize())
        left = self.look.title == "left"
        x, how = (12, {"ha": "left"}) if left else (SIZE / 2, {})
        self._word(x, 21, title, fit([title], SIZE - 28, 27, self.face), "topic", **how)
        self.unit = rng.choice(UNITS).format(u=self.layout["unit"])
        self.scaled = not self.layout["printed"] or (self.layout["type"] != "pie" and rng.random() < 0.4)
        self.unit_aside = self.scaled and rng.random() < 0.4
        self.top = 44
        if not self.unit_aside:
            self._word(x, 50, self.unit, 20, "unit", bold=rng.random() < 0.5, **how)
            self.top = 68
        self.bottom = SIZE - 8
        if series := self.layout.get("series"):
            below = rng.random() < 0.4
            self._legend(series, SIZE - 18 if below else self.top + 13)
            self.top, self.bottom = (self.top, SIZE - 38) if below else (self.top + 32, self.bottom)
        elif len(self.labels) < 6 and rng.random() < 0.4:
            self._word(SIZE - 10, SIZE - 12, rng.choice(SOURCES), 15, colour=GREY, bold=False, ha="right")
            self.bottom = SIZE - 24

    def _legend(self, series: list[str], y: float) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        line = self.layout["type"] == "line"
        rgb = [tuple(c / 255 for c in colour) for colour in self.colours]
        handles = [Line2D([], [], color=c, lw=5, marker="o", ms=10) if line else Patch(color=c) for c in rgb]
        gaps = 46 * len(series)
        size = fit(["".join(series)], SIZE - 16 - gaps, 22, self.face)
        legend = self.figure.legend(
            handles, series, loc="center", bbox_to_anchor=(0.5, 1 - y / SIZE), ncols=len(series), prop=self._font(size),
            handlelength=24 / size, handletextpad=6 / size, columnspacing=14 / size, borderpad=0.2, borderaxespad=0,
            frameon=self.look.edge in ("white", "black"))  # fmt: skip
        self.words += [(text, f"colour of {name}") for text, name in zip(legend.get_texts(), series, strict=True)]

    def _key(self, label: str) -> str:
        return f"leader in {label}" if self.layout.get("series") else f"value of {label}"

    # columns, bars, lines and areas

    def _marks(self) -> None:
        peak = max(map(max, self.values))
        self.limit = self.rng.choice((100, math.ceil(peak / 20) * 20))
        self.inside = self.layout["printed"] and self.layout["type"] in ("columns", "bars") and self.rng.random() < 0.4
        room = 1.14 if self.layout["printed"] and not self.inside else 1.04
        self.high = max(self.limit, peak * room) if self.scaled else peak * room
        (self._lying_frame if self.lying else self._standing_frame)()
        axes = self._axes(self.left, self.top, self.right, self.bottom)
        along, across = (axes.set_ylim, axes.set_xlim) if self.lying else (axes.set_xlim, axes.set_ylim)
        count = len(self.labels)
        along(*((count - 0.5, -0.5) if self.lying else (-0.5, count - 0.5)))
        across(0, self.high)
        if self.scaled:
            self._grid(axes)
        {"line": self._lines, "area": self._area}.get(self.layout["type"], self._bars)(axes)
        if self.layout["printed"]:
            self._print()

    def _standing_frame(self) -> None:
        """Room for the scale at the left and the labels below, at a slant where they are too long."""
        self.left = (48 if self.scaled else 12) + (22 if self.unit_aside else 0)
        self.right = SIZE - 10
        slot = (self.right - self.left) / len(self.labels)
        size = fit(self.labels, slot - 7, 24, self.face)
        if size >= 17:
            self.bottom -= size + UNDER
            for number, label in enumerate(self.labels):
                self._word(self._along(number), self.bottom + UNDER, label, size, self._key(label), va="top")
        else:
            self.left = max(self.left, 34)
            slant = self.rng.choice((45, 90))
            how = {"rotation": slant, "va": "top", "ha": "right" if slant == 45 else "center"}
            longest = max(len(label) for label in self.labels) * 14
            self.bottom -= longest if slant == 90 else longest * 0.7 + 16
            for number, label in enumerate(self.labels):
                x = self._along(number) + (12 if slant == 45 else 0)
                self._word(x, self.bottom + 6, label, 20, self._key(label), **how)
        if self.unit_aside:
            self._word(15, (self.top + self.bottom) / 2, self.unit, 20, "unit", rotation=90)

    def _lying_frame(self) -> None:
        size = fit(self.labels, 92, min(25, int((self.bottom - self.top) / len(self.labels)) - 8), self.face)
        self.left = 14 + max(text_width(label, size, self.face) for label in self.labels) + UNDER
        self.right = SIZE - 20
        self.bottom -= (26 if self.scaled else 4) + (24 if self.unit_aside else 0)
        for number, label in enumerate(self.labels):
            self._word(self.left - UNDER, self._along(number), label, size, self._key(label), ha="right")
        if self.unit_aside:
            self._word((self.left + self.right) / 2, self.bottom + 38, self.unit, 20, "unit")

    def _along(self, number: float) -> float:
        """Pixels of a label's place."""
        start, end = (self.top, self.bottom) if self.lying else (self.left, self.right)
        return start + (end - start) * (number + 0.5) / len(self.labels)

    def _across(self, value: float) -> float:
        """Pixels of a value."""
        start, end = (self.left, self.right) if self.lying else (self.bottom, self.top)
        return start + (end - start) * value / self.high

    def _grid(self, axes) -> None:
        for tick in range(0, int(self.high) + 1, 20):
            line = axes.axvline if self.lying else axes.axhline
            line(tick, color=self.look.grid, ls=self.look.dashes, lw=1.6, zorder=0.5)
            where = (self._across(tick), self.bottom + 15) if self.lying else (self.left - 6, self._across(tick))
            how = {} if self.lying else {"ha": "right"}
            self._word(*where, str(tick), TICK, **how)

    def _bars(self, axes) -> None:
        from matplotlib.colors import to_rgba

        count, whole = len(self.values), self.rng.uniform(0.6, 0.82)
        draw = axes.barh if self.lying else axes.bar
        for number, (values, colour) in enumerate(zip(self.values, self.colours, strict=True)):
            places = [place + whole * ((number + 0.5) / count - 0.5) for place in range(len(values))]
            face = to_rgba([c / 255 for c in colour])
            draw(places, values, whole / count, color=face, edgecolor=self.look.edge, linewidth=1.5, zorder=2)

    def _lines(self, axes) -> None:
        markers = self.rng.sample("osD^v", len(self.values))
        width = self.rng.choice((3, 4, 5))
        for values, colour, marker in zip(self.values, self.colours, markers, strict=True):
            rgb = [c / 255 for c in colour]
            axes.plot(values, color=rgb, lw=width, marker=marker, ms=12, mec="white", mew=1, zorder=3)

    def _area(self, axes) -> None:
        (values,), (colour,) = self.values, self.colours
        rgb = [c / 255 for c in colour]
        axes.fill_between(range(len(values)), values, color=rgb, alpha=self.rng.choice((0.4, 0.55)), lw=0, zorder=2)
        axes.plot(values, color=rgb, lw=3, marker=self.rng.choice(("o", "")), ms=9, zorder=3)

    def _print(self) -> None:
        """The values of the only series, beside their marks or in them."""
        (values,), (colour,) = self.values, self.colours
        slot = (self.right - self.left) / len(values)
        size = min(23, int(slot * 0.5)) if not self.lying else min(24, int((self.bottom - self.top) / len(values)) - 4)
        for number, value in enumerate(values):
            along, across = self._along(number), self._across(value)
            if self.layout["type"] in ("line", "area"):
                x, y, how = self._beside(values, number)
                self._word(along + x, across + y, str(value), size, **how)
            elif self.inside and abs(across - self._across(0)) > 2 * size:
                where, how = ((across - 6, along), {"ha": "right"}) if self.lying else ((along, across + 5), {"va": "top"})
                self._word(*where, str(value), size, colour=ink_on(colour), **how)
            else:
                where, how = ((across + 6, along), {"ha": "left"}) if self.lying else (
                    (along, across - 4), {"va": "bottom"})  # fmt: skip
                self._word(*where, str(value), size, **how)

    def _beside(self, values: list[int], number: int) -> tuple[float, float, dict]:
        """Where a line's value is free of the line: under a valley, else over the point, on the outer side of a slope."""
        here = values[number]
        before = values[number - 1] if number else None
        after = values[number + 1] if number + 1 < len(values) else None
        up = [n > here for n in (before, after) if n is not None]
        if all(up) and here > self.high * 0.2 and self.layout["type"] == "line":
            return 0, 10, {"va": "top"}
        rises = (after is not None and after > here) - (before is not None and before > here)
        return -10 * rises, -9, {"va": "bottom"}

    # pies

    def _pie(self) -> None:
        """A pie or a ring; of some turns the one whose words share the fewest pixels."""
        (values,), rng = self.values, self.rng
        y, radius = (self.top + SIZE) / 2 - 4, 98
        axes = self._axes(SIZE / 2 - radius, y - radius, SIZE / 2 + radius, y + radius)
        axes.patch.set_visible(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        colours = [mix(COLOURS[name], WHITE, 0.15) for name in rng.sample([*COLOURS], len(values))]
        inside = min(values) >= 15 and rng.random() < 0.5
        turns = [(start, self._places(start, y, radius, inside)) for start in rng.sample(range(0, 360, 15), 12)]
        start, places = min(turns, key=lambda turn: overlap(_around(x, y, inside) for x, y, _ in turn[1]))
        axes.pie(values, startangle=start, counterclock=False, radius=1, normalize=True,
                 colors=[[c / 255 for c in colour] for colour in colours],
                 wedgeprops={"edgecolor": self.look.paper, "linewidth": 2, "width": rng.choice((1, 1, 0.6))})  # fmt: skip
        axes.set_xlim(-1, 1)
        axes.set_ylim(-1, 1)
        for label, value, colour, (x, y_, (inner_x, inner_y)) in zip(self.labels, values, colours, places, strict=True):
            self._word(x, y_ if inside else y_ - 12, label, 22, self._key(label))
            if inside:
                self._word(inner_x, inner_y, f"{value}%", 21, colour=ink_on(colour))
            else:
                self._word(x, y_ + 12, f"{value}%", 22)

    def _places(self, start: float, y: float, radius: float, inside: bool) -> list:
        """Middle of each wedge's words (outside it), and a point in it, for a first wedge that starts at an angle."""
        (values,), places, done = self.values, [], 0
        for value in values:
            angle = math.radians(start - 3.6 * (done + value / 2))
            cos, sin, done = math.cos(angle), math.sin(angle), done + value
            reach = radius + 8 + abs(cos) * 34 + abs(sin) * (12 if inside else 24)
            point = (SIZE / 2 + cos * radius * 0.7, y - sin * radius * 0.7)
            places.append((SIZE / 2 + cos * reach, y - sin * reach, point))
        return places


def _around(x: float, y: float, inside: bool) -> tuple[float, float, float, float]:
    height = 14 if inside else 26
    return x - 38, y - height, x + 38, y + height

