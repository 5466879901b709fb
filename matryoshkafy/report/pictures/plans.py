"""A plan as a picture: every group as a bar of nested prefixes, darkest where all sizes share."""

from __future__ import annotations

from html import escape

from matryoshkafy.plan.folding import folded
from matryoshkafy.plan.plan import Plan
from matryoshkafy.plan.text import cut_middle
from matryoshkafy.report.pictures.svg import Box, segment, svg, tag, text

Bar = tuple[str, int, tuple[int, ...]]


def groups(plan: Plan, most: int = 24, wide: float = 400) -> str:
    """Return every group as a bar of nested prefixes, the main group first.

    Groups of layers that repeat are one bar: `layers.0-31.mlp`.
    """
    found = bars_of(plan)
    body = "".join(_row(plan, bar, 20 + 34 * row, wide) for row, bar in enumerate(found[:most]))
    if len(found) > most:
        body += text(f"and {len(found) - most} more (table below)", 0, 22 + 34 * most,
                     class_="soft")  # fmt: skip
    height = 34 * (min(most, len(found)) + (len(found) > most)) + 8
    return svg(body, wide, height, f"{len(plan.groups)} groups and their widths at each size")


def bars_of(plan: Plan) -> list[Bar]:
    """Return (name, units, width at each size) of the groups, repeated layers as one, largest
    first after the main one.
    """
    order = sorted(range(len(plan.groups)), key=lambda g: (g != plan.main, -plan.groups[g].size))
    rows = [
        (plan.groups[g].name, "main" if g == plan.main else "", *(str(w[g]) for w in plan.ladder))
        for g in order
    ]
    return [
        (f"{'main: ' if main else ''}{name}", int(widths[-1]), tuple(map(int, widths)))
        for name, main, *widths in folded(rows, plan.parameters)
    ]


def _row(plan: Plan, bar: Bar, y: float, wide: float) -> str:
    name, units, widths = bar
    ends = [0, *widths]
    bars = "".join(
        segment(Box(wide * a / units, y, wide * (b - a) / units, 12), level, plan.levels)
        for level, (a, b) in enumerate(zip(ends, ends[1:], strict=False))
        if b > a
    )
    # A letter of the page's face is about six units wide; the units stand at the right.
    words = text(cut_middle(name, int(wide / 6.4) - 14), 0, y - 4)
    count = text(f"{units} units", wide, y - 4, text_anchor="end", class_="soft")
    return tag("g", tag("title", escape(name)), words, count, bars)
