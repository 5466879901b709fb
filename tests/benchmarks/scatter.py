"""A file of its own for a trade-off: the drawing of the report page, with a title and a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matryoshkafy.report.pictures.charts import colour
from matryoshkafy.report.pictures.svg import standalone, svg, tag, text
from matryoshkafy.report.pictures.tradeoffs import Point, tradeoff

WIDE, HIGH = 600.0, 270.0


def scatter(series: Mapping[str, Sequence[tuple[float, float]]], costs: str, title: str) -> str:
    """Return quality against cost, a line a series, as an SVG file.

    Args:
        series: {name: [(cost, quality)]}.
        costs: what the costs are.
        title: what the drawing shows.
    """
    named = {name: [Point(x, y, f"{y:.3g}") for x, y in line] for name, line in series.items()}
    drawing = tradeoff(named, lambda cost: f"{cost:,.3g}".replace("e+0", "e"), title, WIDE)
    body = text(f"{title}, against {costs}", 10, 18, class_="title")
    body += drawing.replace("<svg ", f'<svg x="0" y="24" width="{WIDE:g}" height="190" ', 1)
    for order, name in enumerate(series):
        x = 14.0 + 190 * order
        body += tag("circle", cx=x, cy=242.0, r=4.0, style=f"fill:{colour(order)}")
        body += text(name, x + 10, 246)
    return standalone(svg(body, WIDE, HIGH, title))
