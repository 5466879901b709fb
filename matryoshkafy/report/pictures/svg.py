"""SVG as text: elements, drawings that a screen reader can name, colours for light and dark.

Every element that belongs to a level says so in `data-level`, so that a page can dim what lies
beyond the size that the reader picked. Colours come from CSS (`STYLE`), for light and dark alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

STYLE = """
:root { --ink: #1d2733; --soft: #66717f; --rule: #d5dbe2; --hue: #2b6cb0;
      --line-1: #2b6cb0; --line-2: #b7591c; --line-3: #2f7d4f; --line-4: #8a4ba8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf1; --soft: #9aa7b5; --rule: #39434e; --hue: #6cb0f2;
        --line-1: #6cb0f2; --line-2: #f0a46b; --line-3: #74c795; --line-4: #c99be0; } }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); } svg .rule { stroke: var(--rule); fill: none; }
svg .unit { fill: var(--hue); } svg .whole { fill: var(--soft); opacity: .3; }
svg .line { fill: none; stroke-width: 2; } svg .title { font-weight: 600; }
"""


@dataclass(frozen=True)
class Box:
    """A drawing area in units of the SVG: left, top, width, height."""

    x: float
    y: float
    width: float
    height: float


def tag(name: str, *children: str, **attributes: object) -> str:
    """Return an element. `class_` is written class, `data_level` data-level; values are escaped."""
    pairs = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v is not None)
    written = "".join(f' {k}="{escape(_number(v))}"' for k, v in pairs)
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(words: object, x: float, y: float, **attributes: object) -> str:
    """Return a text element; the words are escaped."""
    return tag("text", escape(str(words)), x=x, y=y, **attributes)


def svg(body: str, width: float, height: float, label: str) -> str:
    """Return a drawing that scales with its column and tells a screen reader what it shows."""
    return tag(
        "svg",
        tag("title", escape(label)),
        body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_number(float(width))} {_number(float(height))}",
        role="img",
    )


def sized(drawing: str) -> str:
    """Return a drawing that a page shows at its own size: words in all are equally large."""
    width = drawing.partition('viewBox="0 0 ')[2].partition(" ")[0]
    return drawing.replace("<svg ", f'<svg width="{width}" ', 1)


def standalone(drawing: str) -> str:
    """Return a drawing as a file of its own: with the colours that a page would give it."""
    start = drawing.index(">") + 1
    return f"{drawing[:start]}<style>{STYLE}</style>{drawing[start:]}\n"


def opacity(level: int, levels: int) -> float:
    """Return how dense a level is drawn: the smallest size is the core and the darkest."""
    return 1.0 if levels == 1 else 1.0 - 0.78 * level / (levels - 1)


def segment(box: Box, level: int, levels: int) -> str:
    """Return a rectangle of units that a level adds."""
    return rect(box, class_="unit", data_level=level, fill_opacity=opacity(level, levels))


def rect(box: Box, **attributes: object) -> str:
    """Return a rectangle."""
    return tag("rect", x=box.x, y=box.y, width=box.width, height=box.height, **attributes)
