"""table(): a plan as text that a person can read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from matryoshkafy.plan.plan import Plan


def table(plan: Plan) -> str:
    """Return the plan as an aligned table: groups, then what stays whole, then remarks."""
    return "\n".join([*_heading(plan), "", *_groups(plan), *_rest(plan)])


def _heading(plan: Plan) -> Iterator[str]:
    o = plan.options
    yield f"width {plan.width} ({plan.groups[plan.main].name}), sizes {list(plan.sizes)}"
    norm = f", norm {o.norm}" if plan.masked else ""
    yield f"nesting {o.nesting}, scope {o.scope}{norm}"
    if plan.tail:
        share = len(plan.tail) / max(1, sum(1 for _ in plan.nodes))
        yield f"tail: {len(plan.tail)} nodes ({share:.0%}) are computed once per size"


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()


def _groups(plan: Plan) -> Iterator[str]:
    rows = [("group", "units", *map(str, plan.sizes), "parameters' axes")]
    for i, group in enumerate(plan.groups):
        mark = "* " if i == plan.main else "  "
        widths = [str(w[i]) for w in plan.ladder]
        rows.append((mark + group.name, str(group.size), *widths, _short(group.parameters)))
    yield from _columns(rows)


def _short(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _rest(plan: Plan) -> Iterator[str]:
    yield from _section("stays whole", _whole_rows(plan))
    yield from _section(
        "ops without a rule (their axes stay whole)",
        [(u.op, u.node, u.source) for u in plan.unknown],
    )
    yield from _section(
        "scalars derived from a width (keep one with its name)",
        [(f"scalar:{s.node}", str(s), s.source) for s in plan.scalars],
    )
    yield from _section("remarks", [(r,) for r in plan.remarks])


def _whole_rows(plan: Plan) -> list[tuple[str, ...]]:
    rows = [(w.axis, str(w.size), w.why, w.place) for w in plan.whole if w.why != "no feature"]
    return rows[:60] + ([("...", "", f"{len(rows) - 60} more", "")] if len(rows) > 60 else [])


def _section(title: str, rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    rows = list(rows)
    if rows:
        yield ""
        yield title
        yield from ("  " + line for line in _columns(rows))
