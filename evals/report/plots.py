"""Plots as inline SVG; colours and fonts are the page's, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evals.report.markup import Markup, join, tag

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 44
COLOURS = 6


@dataclass(frozen=True)
class Dot:
    """A measured value at x with its 95 % interval (nan: none), and what a pointer is told."""

    x: float
    value: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Line:
    """Dots that belong together; one line through them. colour: which of the page's."""

    name: str
    dots: tuple[Dot, ...]
    colour: int


@dataclass(frozen=True)
class Axes:
    """Where values lie in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        """From the left edge."""
        share = (x - self.x[0]) / (self.x[1] - self.x[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def down(self, y: float) -> float:
        """From the top."""
        share = (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def plot(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    band: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    level: Dot | None = None,
) -> Markup:
    """A plot. band: intervals as an area along the line, not as a bar at each dot. marks: vertical
    lines, `(x, what it is)`. level: a value to hold the others against, with its interval.
    """
    dots = [dot for line in lines for dot in line.dots]
    shown = dots if level is None else [*dots, level]
    axes = Axes(_range([dot.x for dot in dots]), _range([y for d in shown for y in _ends(d)]))
    parts = [tag("title", title), *_grid(axes, x_label, y_label)]
    parts.append(tag("text", title, x=LEFT, y=18, class_="plot-title"))
    parts += [_mark(axes, *mark) for mark in marks if axes.x[0] <= mark[0] <= axes.x[1]]
    parts += [] if level is None else _level(axes, level)
    for line in lines:
        parts += _line(axes, line, band)
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="plot")


def _ends(dot: Dot) -> list[float]:
    return [y for y in (dot.low, dot.value, dot.high) if math.isfinite(y)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the values take."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - room, high + room


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within a range: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(axes: Axes, x_label: str, y_label: str) -> Iterator[Markup]:
    bottom = HEIGHT - BOTTOM
    for y in ticks(*axes.y):
        at = axes.down(y)
        yield tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid")
        yield tag("text", f"{y:g}", x=LEFT - 7, y=at + 4, class_="tick end")
    for x in ticks(*axes.x):
        at = axes.across(x)
        yield tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis")
        yield tag("text", f"{x:g}", x=at, y=bottom + 17, class_="tick middle")
    yield tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis")
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield tag("text", x_label, x=middle, y=HEIGHT - 8, class_="label middle")
    yield tag("text", y_label, x=WIDTH - RIGHT, y=18, class_="label end")


def _mark(axes: Axes, x: float, text: str) -> Markup:
    at = axes.across(x)
    ends = {"x1": at, "x2": at, "y1": TOP, "y2": HEIGHT - BOTTOM}
    return tag("line", tag("title", text), **ends, class_="mark")


def _level(axes: Axes, level: Dot) -> Iterator[Markup]:
    across = {"x1": LEFT, "x2": WIDTH - RIGHT}
    if math.isfinite(level.low) and math.isfinite(level.high):
        top, bottom = axes.down(level.high), axes.down(level.low)
        box = {"x": LEFT, "width": WIDTH - LEFT - RIGHT, "y": top, "height": bottom - top}
        yield tag("rect", **{key: round(value, 2) for key, value in box.items()}, class_="level")
    at = axes.down(level.value)
    yield tag("line", tag("title", level.title), **across, y1=at, y2=at, class_="level-line")


def _line(axes: Axes, line: Line, band: bool) -> Iterator[Markup]:
    colour = f"c{line.colour % COLOURS}"
    sure = [dot for dot in line.dots if math.isfinite(dot.low) and math.isfinite(dot.high)]
    if band and len(sure) > 1:
        edge = [(dot.x, dot.high) for dot in sure] + [(dot.x, dot.low) for dot in reversed(sure)]
        yield tag("path", d=_path(axes, edge) + "Z", class_=f"band {colour}")
    if len(line.dots) > 1:
        points = [(dot.x, dot.value) for dot in line.dots]
        yield tag("path", d=_path(axes, points), class_=f"line {colour}")
    for dot in [] if band else sure:
        at = axes.across(dot.x)
        ends = {"x1": at, "x2": at, "y1": axes.down(dot.low), "y2": axes.down(dot.high)}
        yield tag("line", **ends, class_=f"error {colour}")
    for dot in line.dots:
        place = {"cx": axes.across(dot.x), "cy": axes.down(dot.value), "r": 3.5}
        values = {"data_x": f"{dot.x:g}", "data_value": repr(dot.value)}
        yield tag("circle", tag("title", dot.title), **place, **values, class_=f"dot {colour}")


def _path(axes: Axes, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{axes.across(x)} {axes.down(y)}" for x, y in points)


def legend(lines: Sequence[tuple[str, int]]) -> Markup:
    """Names with their colours."""
    return tag(
        "ul",
        *(
            tag("li", join(tag("span", class_=f"swatch c{colour % COLOURS}"), name))
            for name, colour in lines
        ),
        class_="legend",
    )


def interval(value: float, low: float, high: float, ends: tuple[float, float]) -> Markup:
    """An error bar for a cell of a table, on the scale of `ends`."""
    span = (ends[1] - ends[0]) or 1.0
    at = lambda x: round(3 + 84 * (x - ends[0]) / span, 2)  # noqa: E731
    parts = [tag("circle", cx=at(value), cy=6, r=2.6)]
    if math.isfinite(low) and math.isfinite(high):
        parts.insert(0, tag("line", x1=at(low), x2=at(high), y1=6, y2=6))
    return tag("svg", *parts, viewBox="0 0 90 12", class_="interval", aria_hidden="true")
