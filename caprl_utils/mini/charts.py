"""Charts of the mini world, by matplotlib: five types, five of its styles, three families of its fonts."""

from __future__ import annotations

import math
import random
import threading
from functools import partial

from PIL import Image

from caprl_utils.mini.canvas import INK, SIZE, STEP, Canvas, fit, ink_on, stepped, widest
from caprl_utils.mini.vocabulary import COLOURS

TITLES = ("{T} by city", "{T} in 2020", "The {t} in 2019", "{T} at a glance", "{T}, city by city", "Report: {t}")
UNITS = ("in {u}", "unit: {u}", "({u})", "all in {u}")
STYLES = ("ggplot", "seaborn-v0_8-whitegrid", "fivethirtyeight", "bmh", "default")
FAMILIES = {"sans": "DejaVu Sans", "serif": "DejaVu Serif", "mono": "DejaVu Sans Mono"}
_LOCK = threading.Lock()  # matplotlib's settings belong to the whole process


def draw(layout: dict) -> Canvas:
    """A chart; the same layout gives the same pixels, whatever matplotlib's settings are."""
    import matplotlib.style

    rng = random.Random(layout["seed"])
    face, style = rng.choice([*FAMILIES]), matplotlib.style.library.get(rng.choice(STYLES), {})
    fixed = {k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"}
    own = {"font.family": FAMILIES[face], "font.weight": "bold", "font.size": 20, "axes.axisbelow": True}
    dark = dict.fromkeys(("text.color", "xtick.color", "ytick.color"), "#191919")
    with _LOCK, matplotlib.rc_context({**fixed, **style, **own, **dark}):
        return _Chart(layout, rng, face).drawn()


class _Chart:
    """One chart while it is drawn; sizes are pixels."""

    def __init__(self, layout: dict, rng: random.Random, face: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.layout, self.kind, self.rng, self.face = layout, layout["type"], rng, face
        self.size = partial(fit, face=face)  # at which every text has room, as matplotlib counts it
        self.labels, self.values = layout["labels"], [[int(v) for v in row] for row in layout["values"]]
        self.colours, self.series = [_rgb(COLOURS[name]) for name in layout["colours"]], layout.get("series", ())
        self.figure = Figure(figsize=(SIZE / 72, SIZE / 72), dpi=72)  # a point is a pixel
        self.canvas = FigureCanvasAgg(self.figure)
        self.words = []  # (matplotlib's text, key)

    def drawn(self) -> Canvas:
        self._titles()
        (self._pie if self.kind == "pie" else self._marks)()
        self.canvas.draw()
        shown = Canvas(Image.frombuffer("RGBA", (SIZE, SIZE), self.canvas.buffer_rgba()).convert("RGB"))
        for text, key in self.words:
            box = text.get_window_extent()
            shown.note(text.get_text(), (box.x0, SIZE - box.y1, box.x1, SIZE - box.y0), key)
        return shown

    def _titles(self) -> None:
        """The title, the unit, and the names of the series."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        topic, align = self.layout["topic"], self.rng.choice(("left", "center"))
        x = 0.03 if align == "left" else 0.5
        title, unit = self.rng.choice(TITLES).format(t=topic, T=topic.capitalize()), self.rng.choice(UNITS)
        unit = unit.format(u=self.layout["unit"])
        for y, text, size, key in ((0.945, title, 27, "topic"), (0.875, unit, 21, "unit")):
            size = self.size([text], SIZE - 28, size)
            self.words.append((self.figure.text(x, y, text, size=size, ha=align, va="center"), key))
        if self.series:
            dots = {"marker": "o", "ms": 10, "lw": 5}
            marks = [Line2D([], [], color=c, **dots) if self.kind == "line" else Patch(color=c) for c in self.colours]
            size = self.size(["".join(self.series)], SIZE - 20 - 44 * len(marks), 22)
            legend = self.figure.legend(
                marks, self.series, loc="center", bbox_to_anchor=(0.5, 0.8), ncols=3, fontsize=size, borderpad=0.2,
                handlelength=24 / size, handletextpad=5 / size, columnspacing=14 / size)  # fmt: skip
            self.words += zip(legend.get_texts(), (f"colour of {name}" for name in self.series), strict=True)

    def _axes(self, left: float, bottom: float, right: float, top: float):
        return self.figure.add_axes((left / SIZE, bottom / SIZE, (right - left) / SIZE, (top - bottom) / SIZE))

    @staticmethod
    def _stepped(low: float, high: float, count: int) -> tuple[float, float]:
        """The longest stretch within two ends whose `count` equal parts have their middles at places for texts."""
        part = int((high - low) / count / STEP) * STEP
        middle = math.ceil((low + part / 2) / STEP) * STEP
        if middle + part * (count - 0.5) > high + STEP / 2:
            part, middle = part - STEP, math.ceil((low + part / 2 - STEP / 2) / STEP) * STEP
        return middle - part / 2, middle + part * (count - 0.5)

    def _marks(self) -> None:
        """Columns, bars, lines or an area, with a scale where the values are not printed."""
        printed, peak, bars = self.layout["printed"], max(map(max, self.values)), self.kind == "bars"
        scaled, lined = not printed or self.rng.random() < 0.4, self.kind in ("line", "area")
        scale = self.rng.choice((100, math.ceil(peak / 20) * 20)) if scaled else 0
        high = max(scale, peak * (1.2 if printed else 1.04))  # with room for a value at the end
        axes, size, turned = self._framed(scaled)
        along, across = (axes.set_yticks, axes.set_xticks) if bars else (axes.set_xticks, axes.set_yticks)
        labels = along(range(len(self.labels)), self.labels, size=size, rotation=90 if turned else 0)
        key = "leader in" if self.series else "value of"
        self.words += [(tick.label1, f"{key} {label}") for tick, label in zip(labels, self.labels, strict=True)]
        ticks = [*range(0, int(high) + 1, 20)] if scaled else []
        numbers = across(ticks, map(str, ticks), size=self.size(["100"], 46, 19))
        self.words += [(tick.label1, "") for tick in numbers]
        axes.tick_params(length=0, pad=5)
        axes.grid(scaled, axis="x" if bars else "y")
        low = -0.12 * high if printed and lined else 0  # room for a value under its point
        limits = (-0.5, len(self.labels) - 0.5), (low, high)
        axes.set(ylim=limits[0][::-1], xlim=limits[1]) if bars else axes.set(xlim=limits[0], ylim=limits[1])
        (self._lines if lined else self._bars)(axes)

    def _framed(self, scaled: bool):
        """Axes with room for the labels; the labels' size, and whether they are turned because they are too long."""
        count, top, bottom = len(self.labels), SIZE * (0.74 if self.series else 0.81), 34 if scaled else 10
        if self.kind == "bars":
            size = self.size(self.labels, 92, min(25, (top - bottom) / count - 6))
            low, high = self._stepped(SIZE - top, SIZE - bottom, count)
            left = stepped(widest(self.labels, size, self.face) + 16)
            return self._axes(left, SIZE - high, SIZE - 22, SIZE - low), size, False
        left, right = self._stepped(54 if scaled else 12, SIZE - 8, count)
        part = (right - left) / count
        size = self.size(self.labels, part - 7, 24)
        if turned := widest(self.labels, size, self.face) > part - 3:
            size = self.size(self.labels, SIZE, 21)
        high = widest(self.labels, size, self.face) if turned else size
        return self._axes(left, 18 + high, right, top), size, turned

    def _bars(self, axes) -> None:
        whole, inside = self.rng.uniform(0.6, 0.82), self.rng.random() < 0.4
        wide = whole / len(self.values)
        for number, (values, colour) in enumerate(zip(self.values, self.colours, strict=True)):
            places = [place - whole / 2 + wide * (number + 0.5) for place in range(len(values))]
            marks = (axes.barh if self.kind == "bars" else axes.bar)(places, values, wide, color=colour, zorder=2)
            if self.layout["printed"]:
                inside = inside and min(values) * 3.5 > max(values) and len(values) < 6
                ink = _rgb(ink_on(COLOURS[self.layout["colours"][0]]) if inside else INK)
                texts = axes.bar_label(marks, label_type="center" if inside else "edge", padding=3, color=ink)
                self.words += [(text, "") for text in texts]

    def _lines(self, axes) -> None:
        width, markers = self.rng.choice((3, 4, 5)), self.rng.sample("osD^v", 3)
        for values, colour, marker in zip(self.values, self.colours, markers, strict=False):
            axes.plot(values, color=colour, lw=width, marker=marker, ms=12, mec="white", mew=1, zorder=3)
            if self.kind == "area":
                axes.fill_between(range(len(values)), values, color=colour, alpha=0.5, lw=0, zorder=2)
        for number, value in enumerate(values if self.layout["printed"] else ()):
            before, after = values[max(number - 1, 0)], values[min(number + 1, len(values) - 1)]
            under = before >= value <= after  # where the line leaves room
            at = (0, -9) if under else (-10 * ((after > value) - (before > value)), 9)
            text = axes.annotate(str(value), (number, value), at, textcoords="offset points", ha="center",
                                 va="top" if under else "bottom", zorder=4)  # fmt: skip
            self.words.append((text, ""))

    def _pie(self) -> None:
        """A pie or a ring; the smallest part lies at a side, where words have most room."""
        (values,), radius = self.values, 98
        axes = self._axes(SIZE / 2 - radius, 62, SIZE / 2 + radius, 62 + 2 * radius)
        small = values.index(min(values))
        start = 3.6 * (sum(values[:small]) + values[small] / 2) + self.rng.choice((0, 180))
        colours = [_rgb(COLOURS[name]) for name in self.rng.sample([*COLOURS], len(values))]
        ring = {"edgecolor": "white", "linewidth": 2, "width": self.rng.choice((1, 1, 0.6))}
        axes.pie(values, startangle=start, counterclock=False, radius=1, colors=colours, wedgeprops=ring)
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        done = 0
        for label, value in zip(self.labels, values, strict=True):
            angle = math.radians(start - 3.6 * (done + value / 2))
            cos, sin, done = math.cos(angle), math.sin(angle), done + value
            at = (cos * (1.08 + 0.35 * abs(cos) + 0.25 * abs(sin)), sin * (1.08 + 0.35 * abs(cos) + 0.25 * abs(sin)))
            text = axes.text(*at, f"{label}\n{value}%", ha="center", va="center", linespacing=1)
            self.words.append((text, f"value of {label}"))


def _rgb(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(part / 255 for part in colour)
