"""A plan as text: at most 80 columns, and layers that repeat are one row."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# plan.py prints itself by this module, which therefore cannot name its type.
Plan = Any
WIDTH = 80
# A column that is not the first: what is longer is cut in the middle.
CELL = 24
MOST = 60
Row = tuple[str, ...]
# What the commonest reasons mean; the others say it themselves.
MEANINGS = {
    "input": "an axis of your inputs",
    "vocabulary": "rows of a table that ids look up",
    "classes": "what the model returns: your classes, items, tokens",
    "inner": "a factor inside the units that shrink, such as the size of a head",
    "indexed": "single positions are picked out of it",
    "frozen table": "features that the model holds and does not learn",
    "space": "positions in space or time",
    "range": "counted positions",
    "reshaped": "a reshape takes it apart in a way that no prefix follows",
    "misaligned": "two axes met whose pieces do not line up",
    "clamp": "masked nesting reads its smallest size only",
    "demoted": "masked nesting sums over it inside the model",
}


def table(plan: Plan) -> str:
    """Return the plan as an aligned table: groups, then what stays whole, then remarks."""
    return "\n".join([*_heading(plan), "", *_groups(plan), *_rest(plan)])


def _heading(plan: Plan) -> Iterator[str]:
    o = plan.options
    sizes = ", ".join(_few(list(map(str, plan.sizes)), 8))
    yield from textwrap.wrap(
        f"width {plan.width} ({plan.groups[plan.main].name}), sizes {sizes}", WIDTH
    )
    for stair in plan.stairs:
        pieces = " + ".join(str(plan.groups[g].size) for g in stair)
        said = f"nested already: {plan.groups[stair[0]].name}, of {pieces} units, piece by piece"
        yield from textwrap.wrap(said, WIDTH)
    norm = f", norm {o.norm}" if plan.masked else ""
    yield f"nesting {o.nesting}, scope {o.scope}{norm}"
    if plan.tail:
        share = len(plan.tail) / max(1, sum(1 for _ in plan.nodes))
        nodes = "1 node is" if len(plan.tail) == 1 else f"{len(plan.tail)} nodes are"
        yield f"tail: {nodes} computed once per size ({share:.0%} of all)"


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
    whole = [(w.axis, str(w.size), w.why, place_of(w.place, w.axis)) for w in plan.whole
             if w.why != "no feature"]  # fmt: skip
    unknown = [(u.op, place_of(u.source) or u.node) for u in plan.unknown]
    scalars = [(f"scalar:{s.node}", str(s), place_of(s.source)) for s in plan.scalars]
    yield from _section("stays whole (tensor:dim, size, why, where)", whole)
    yield from _meanings({row[2] for row in whole})
    yield from _section("ops without a rule (their axes stay whole)", unknown)
    yield from _section("scalars derived from a width (keep one with its name)", scalars)
    if plan.remarks:
        yield from ("", "remarks")
    for remark in plan.remarks:
        yield from textwrap.wrap(remark, WIDTH, initial_indent="  ", subsequent_indent="    ")


def meaning(why: str) -> str:
    """Return what a reason to stay whole means; "" where the word itself says it."""
    return MEANINGS.get(why, "")


def _meanings(reasons: set[str]) -> Iterator[str]:
    told = [f"  {why}: {means}" for why, means in MEANINGS.items() if why in reasons]
    yield from ("", *told) if told else ()


def place_of(source: str, axis: str = "") -> str:
    """Return "/path/model.py:7 (forward)" as "model.py:7"; nothing where it is the axis itself."""
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
