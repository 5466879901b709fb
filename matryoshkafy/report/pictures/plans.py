"""A plan as a picture: every group as a bar of nested prefixes, darkest where all sizes share."""

from __future__ import annotations

from matryoshkafy.plan.plan import Plan
from matryoshkafy.report.pictures.svg import Box, segment, svg, text


def groups(plan: Plan, most: int = 24) -> str:
    """Return every group as a bar of nested prefixes, the main group first."""
    order = sorted(range(len(plan.groups)), key=lambda g: (g != plan.main, -plan.groups[g].size))
    shown = order[:most]
    body = "".join(_group_row(plan, g, 20 + 34 * row) for row, g in enumerate(shown))
    if len(order) > most:
        body += text(f"and {len(order) - most} more groups (table below)", 0, 22 + 34 * most,
                     class_="soft")  # fmt: skip
    height = 34 * (len(shown) + (len(order) > most)) + 8
    return svg(body, 400, height, f"{len(order)} groups and their widths at each size")


def _group_row(plan: Plan, group: int, y: float) -> str:
    name, units = plan.groups[group].name, plan.groups[group].size
    ends = [0, *(widths[group] for widths in plan.ladder)]
    bars = "".join(
        segment(Box(400 * a / units, y, 400 * (b - a) / units, 12), level, plan.levels)
        for level, (a, b) in enumerate(zip(ends, ends[1:], strict=False))
        if b > a
    )
    mark = "main group: " if group == plan.main else ""
    words = text(f"{mark}{_shortened(name, 44)}", 0, y - 4)
    return words + text(f"{units} units", 400, y - 4, text_anchor="end", class_="soft") + bars


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 + 1 :]}"
