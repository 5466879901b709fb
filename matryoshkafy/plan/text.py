"""A plan as text: at most 80 columns, and layers that repeat are one row."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# plan.py prints itself by this module, which therefore cannot name its type.
Plan = Any
WIDTH = 80
# A column that is not the first: what is longer is cut in the middle.
CELL = 30
MOST = 60
Row = tuple[str, ...]


def table(plan: Plan) -> str:
    """Return the plan as an aligned table: groups, then what stays whole, then remarks."""
    return "\n".join([*_heading(plan), "", *_groups(plan), *_rest(plan)])


def _heading(plan: Plan) -> Iterator[str]:
    o = plan.options
    sizes = ", ".join(_few(list(map(str, plan.sizes)), 8))
    yield from textwrap.wrap(
        f"width {plan.width} ({plan.groups[plan.main].name}), sizes {sizes}", WIDTH
    )
    norm = f", norm {o.norm}" if plan.masked else ""
    yield f"nesting {o.nesting}, scope {o.scope}{norm}"
    if plan.tail:
        share = len(plan.tail) / max(1, sum(1 for _ in plan.nodes))
        yield f"tail: {len(plan.tail)} nodes ({share:.0%}) are computed once per size"


def _groups(plan: Plan) -> Iterator[str]:
    rows: list[Row] = []
    for i, group in enumerate(plan.groups):
        widths = _few([str(w[i]) for w in plan.ladder], 5)
        name = group.name + (" (main)" if i == plan.main else "")
        rows.append((name, str(group.size), *widths, str(len(group.parameters))))
    head = ("group", "units", *_few([f"at {m}" for m in plan.sizes], 5), "axes")
    yield from columns([head, *folded(rows)], right=True)


def _few(words: list[str], most: int) -> list[str]:
    """The words, those in the middle left out where there are more than `most`."""
    return words if len(words) <= most else [*words[: most - 2], "..", words[-1]]


def _rest(plan: Plan) -> Iterator[str]:
    whole = [(w.axis, str(w.size), w.why, _place(w.place, w.axis)) for w in plan.whole
             if w.why != "no feature"]  # fmt: skip
    unknown = [(u.op, u.node, _place(u.source, "")) for u in plan.unknown]
    scalars = [(f"scalar:{s.node}", str(s), _place(s.source, "")) for s in plan.scalars]
    yield from _section("stays whole", whole)
    yield from _section("ops without a rule (their axes stay whole)", unknown)
    yield from _section("scalars derived from a width (keep one with its name)", scalars)
    if plan.remarks:
        yield from ("", "remarks")
    for remark in plan.remarks:
        yield from textwrap.wrap(remark, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _place(source: str, axis: str) -> str:
    """ "/path/model.py:7 (forward)" as "model.py:7"; nothing where it is the axis itself."""
    word = source.partition(" (")[0].replace("\\", "/").rpartition("/")[2]
    return "" if word == axis else word


def _section(title: str, rows: Sequence[Row]) -> Iterator[str]:
    rows = folded(rows)
    if rows:
        yield from ("", title)
        yield from (f"  {line}" for line in columns(rows[:MOST], WIDTH - 2))
    if len(rows) > MOST:
        yield f"  and {len(rows) - MOST} more"


def columns(rows: Sequence[Row], width: int = WIDTH, *, right: bool = False) -> Iterator[str]:
    """Yield aligned lines of at most `width` columns; what is too long is cut in the middle.

    Args:
        rows: cells, of the same number in each row.
        width: of a line.
        right: whether the cells after the first are numbers.
    """
    sizes = [min(max(len(row[i]) for row in rows), CELL) for i in range(1, len(rows[0]))]
    first = min(max(len(row[0]) for row in rows), max(width - sum(sizes) - 2 * len(sizes), 16))
    for row in rows:
        cells = zip(row[1:], sizes, strict=True)
        rest = (_cut(c, n).rjust(n) if right else _cut(c, n).ljust(n) for c, n in cells)
        yield "  ".join([_cut(row[0], first).ljust(first), *rest]).rstrip()


def _cut(word: str, width: int) -> str:
    if len(word) <= width:
        return word
    left = (width - 2) // 2
    return f"{word[:left]}..{word[len(word) - (width - 2 - left) :]}"


def folded(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, those that differ in one number of their name alone as one: `layers.0-31`.

    Args:
        rows: (dotted name, cells that are equal in the rows that are folded).
    """
    split = [(row[0].split("."), row[1:]) for row in rows]
    depth = max((len(parts) for parts, _ in split), default=0)
    for at in reversed(range(depth)):
        split = _folded_at(split, at)
    return [(".".join(parts), *cells) for parts, cells in split]


def _folded_at(rows: list[tuple[list[str], Row]], at: int) -> list[tuple[list[str], Row]]:
    """Fold the rows that differ in part `at` of the name, a number, and nowhere else."""
    same: dict[tuple[object, ...], list[tuple[list[str], Row]]] = {}
    for number, (parts, cells) in enumerate(rows):
        fits = at < len(parts) and parts[at].isdecimal()
        key = (*parts[:at], None, *parts[at + 1 :], cells) if fits else (number,)
        same.setdefault(key, []).append((parts, cells))
    out: list[tuple[list[str], Row]] = []
    for group in same.values():
        parts, cells = group[0]
        if len(group) > 1:
            found = sorted({int(p[at]) for p, _ in group})
            parts = [*parts[:at], ",".join(_ranges(found)), *parts[at + 1 :]]
        out.append((parts, cells))
    return out


def _ranges(numbers: list[int]) -> Iterator[str]:
    """Yield "0-3", "7" for 0, 1, 2, 3, 7."""
    start = last = numbers[0]
    for number in [*numbers[1:], -1]:
        if number != last + 1:
            yield str(start) if start == last else f"{start}-{last}"
            start = number
        last = number
