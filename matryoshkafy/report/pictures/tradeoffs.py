"""Trade-offs: what is achieved over what it costs, on a logarithmic axis where that helps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from matryoshkafy.report.pictures.charts import Format, colour, gridline
from matryoshkafy.report.pictures.svg import svg, tag, text

# Costs that lie further apart than this factor are drawn on a logarithmic axis.
LINEAR = 4.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 16.0, 130.0
HEIGHT = 166
# Room that a name beside a point, and a word under the axis, need in units of the drawing.
NAME, TICK = 26.0, 46.0


@dataclass(frozen=True)
class Point:
    """One choice: what it costs, what it achieves, its name, and the level it belongs to."""

    cost: float
    value: float
    name: str
    level: int | None = None


def tradeoff(
    series: Mapping[str, Sequence[Point]], form: Format, label: str, wide: float = 300
) -> str:
    """Return a line a series: value upward, cost to the right, each point with its name.

    Args:
        series: {name: points}.
        form: a cost as words.
        label: what the drawing shows, for a screen reader.
        wide: width of the drawing.
    """
    points = [p for line in series.values() for p in line]
    costs, values = [p.cost for p in points], [p.value for p in points]
    at = _Plane(min(costs), max(costs), min(values), max(values), wide)
    ruled = (at.low + (at.high - at.low) * k / 2 for k in range(3))
    body = "".join(gridline(LEFT, wide - RIGHT, at.y(value), value) for value in ruled)
    body += "".join(_tick(at, cost, form) for cost in _ticks(at))
    for order, (name, line) in enumerate(series.items()):
        body += _line(at, (name, sorted(line, key=lambda p: p.cost)), order, form)
    return svg(body, wide, HEIGHT, label + (", logarithmic" if at.logarithmic else ""))


@dataclass(frozen=True)
class _Plane:
    """Where a (cost, value) is drawn."""

    least: float
    most: float
    low: float
    high: float
    wide: float

    @property
    def logarithmic(self) -> bool:
        return self.least > 0 and self.most / self.least > LINEAR

    def x(self, cost: float) -> float:
        of = math.log if self.logarithmic else float
        share = (of(cost) - of(self.least)) / ((of(self.most) - of(self.least)) or 1.0)
        return LEFT + 14 + share * (self.wide - LEFT - RIGHT - 28)

    def y(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return BOTTOM - 8 - share * (BOTTOM - TOP - 12)


def _ticks(at: _Plane) -> list[float]:
    """Round costs on the axis, as many as have room; the ends where no round one lies between."""
    chosen: list[float] = []
    for cost in _round_costs(at):
        if not chosen or at.x(cost) - at.x(chosen[-1]) >= TICK:
            chosen.append(cost)
    return chosen if len(chosen) > 1 else sorted({at.least, at.most})


def _round_costs(at: _Plane) -> list[float]:
    if at.most <= at.least:
        return [at.least]
    if at.logarithmic:
        decades = range(math.floor(math.log10(at.least)), math.ceil(math.log10(at.most)) + 1)
        tried = [step * 10.0**d for d in decades for step in (1, 2, 5)]
    else:
        step = 10.0 ** math.floor(math.log10((at.most - at.least) / 2))
        first = math.ceil(at.least / step)
        tried = [step * k for k in range(first, math.floor(at.most / step) + 1)]
    return [cost for cost in tried if at.least <= cost <= at.most]


def _tick(at: _Plane, cost: float, form: Format) -> str:
    x = at.x(cost)
    mark = tag("line", x1=x, y1=BOTTOM, x2=x, y2=BOTTOM + 4, class_="rule")
    return mark + text(form(cost), x, BOTTOM + 18, text_anchor="middle", class_="soft")


def _line(at: _Plane, named: tuple[str, Sequence[Point]], order: int, form: Format) -> str:
    name, line = named
    stroke = colour(order)
    places = " ".join(f"{at.x(p.cost):.1f},{at.y(p.value):.1f}" for p in line)
    drawn = tag("polyline", points=places, class_="line", style=f"stroke:{stroke}")
    told = -NAME
    for point in line:
        x, y = at.x(point.cost), at.y(point.value)
        said = f"{name}, {point.name}: {point.value:.6g} at {form(point.cost)}".lstrip(", ")
        dot = tag("circle", tag("title", escape(said)), cx=x, cy=y, r=4.0, style=f"fill:{stroke}")
        if order == 0 and x - told >= NAME:
            told = x
            dot += text(point.name, x, y - 7, text_anchor="middle")
        drawn += tag("g", dot, data_level=point.level, class_="mark")
    return drawn
