"""Charts over sizes: bars for what a size costs, lines for what it achieves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from matryoshkafy.report.pictures.svg import Box, rect, svg, tag, text

LINES = 4
# Room that the words of a mark need, in units of the drawing.
ROOM = 42
HEIGHT = 170
Format = Callable[[float], str]


def bars(values: Mapping[int, float], form: Format, label: str, wide: float = 360) -> str:
    """Return one bar per size, from zero, each with its value."""
    top = max(values.values(), default=1.0) or 1.0
    step = (wide - 10) / max(1, len(values))
    body = tag("line", x1=5.0, y1=150.0, x2=wide - 5.0, y2=150.0, class_="rule")
    named = _named(len(values), wide)
    for level, (size, value) in enumerate(values.items()):
        height = 120 * value / top
        box = Box(5 + step * (level + 0.14), 150 - height, step * 0.72, height)
        bar = rect(box, class_="unit", rx=2.0)
        words = _words(Box(box.x + box.width / 2, box.y, 0, 0), form(value), size, level in named)
        tip = tag("title", escape(f"size {size}: {form(value)}"))
        body += tag("g", tip, bar, words, data_level=level, class_="mark")
    return svg(body, wide, HEIGHT, label)


def _words(at: Box, value: str, size: int, named: bool) -> str:
    if not named:
        return ""
    above = text(value, at.x, at.y - 5, text_anchor="middle")
    return above + text(size, at.x, 165, text_anchor="middle", class_="soft")


def _named(count: int, wide: float) -> set[int]:
    """Return which of so many marks have room for words: all, or every n-th and the last."""
    every = -(-count // int(wide / ROOM))
    return {*range(count - 1, -1, -every)}


def lines(
    series: Mapping[str, Mapping[int, float]],
    sizes: Sequence[int],
    label: str,
    wide: float = 360,
) -> str:
    """Return values over sizes, one line a series; sizes stand at equal distances, as rungs do."""
    values = [v for line in series.values() for v in line.values()]
    low, high = min(values), max(values)
    slack = (high - low or abs(high) or 1.0) * 0.08
    at = _Plane(tuple(sizes), low - slack, high + slack, wide)
    ruled = (low + (high - low) * k / 2 for k in range(3))
    body = "".join(gridline(50.0, wide - 8.0, at.y(value), value) for value in ruled)
    named = _named(len(sizes), wide)
    for level, size in enumerate(sizes):
        if level in named:
            body += text(size, at.x(size), 165, text_anchor="middle", class_="soft")
    body += "".join(_line(at, name, line, k) for k, (name, line) in enumerate(series.items()))
    return svg(body, wide, HEIGHT, label)


@dataclass(frozen=True)
class _Plane:
    """Where a (size, value) is drawn."""

    sizes: tuple[int, ...]
    low: float
    high: float
    wide: float

    def x(self, size: int) -> float:
        return 58 + (self.wide - 75) * self.sizes.index(size) / max(1, len(self.sizes) - 1)

    def y(self, value: float) -> float:
        return 146 - 136 * (value - self.low) / (self.high - self.low)


def gridline(left: float, right: float, y: float, value: float) -> str:
    """Return a line across a drawing, and the value that it stands for before it."""
    words = text(f"{value:.3g}", left - 4, y + 4, text_anchor="end", class_="soft")
    return tag("line", x1=left, y1=y, x2=right, y2=y, class_="rule") + words


def _line(at: _Plane, name: str, line: Mapping[int, float], order: int) -> str:
    stroke = colour(order)
    points = " ".join(f"{at.x(s):.1f},{at.y(v):.1f}" for s, v in line.items())
    drawn = tag("polyline", points=points, class_="line", style=f"stroke:{stroke}")
    for size, value in line.items():
        tip = tag("title", escape(f"{name}, size {size}: {value:.6g}".lstrip(", ")))
        level = at.sizes.index(size)
        drawn += tag("circle", tip, cx=at.x(size), cy=at.y(value), r=4.0, data_level=level,
                     class_="mark", style=f"fill:{stroke}")  # fmt: skip
    return drawn


def colour(order: int) -> str:
    """Return the colour of the n-th line; past the fourth all are grey."""
    return f"var(--line-{order + 1})" if order < LINES else "var(--soft)"
