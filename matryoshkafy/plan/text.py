"""A plan as text: at most 80 columns, and layers that repeat are one row."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from matryoshkafy.plan.folding import Row, folded

# plan.py prints itself by this module, which therefore cannot name its type.
Plan = Any
WIDTH = 80
# A column that is not the first: what is longer is cut in the middle.
CELL = 24
# Rows for one reason.
MOST = 20
# Remarks that a plan may hold once for each of many axes.
OFTEN = ("demoted", "clamp", "per size", "held at full width")
# What the commonest reasons mean; the others say it themselves.
MEANINGS = {
    "input": "an axis of your inputs",
    "vocabulary": "rows of a table that ids look up",
    "classes": "what the model returns: your classes, items, tokens",
    "inner": "a factor inside the units that shrink, such as the size of a head",
    "copies": "how many copies there are of a width that shrinks",
    "indexed": "single positions are picked out of it",
    "frozen table": "features that the model holds and does not learn",
    "attended": "positions that attention chooses among",
    "table rows": "rows of a table that are read as keys and values",
    "kept": "you asked for it: keep=[...]",
    "frequency": "frequencies of a transform",
    "state": "what a recurrence keeps of each unit, the same at every width",
    "space": "positions in space or time",
    "range": "counted positions",
    "reshaped": "a reshape takes it apart in a way that no prefix follows",
    "misaligned": "two axes met whose pieces do not line up",
    "clamp": "masked nesting reads its smallest size only",
    "demoted": "masked nesting would sum over it inside the model",
    "groups": "groups of channels, which a norm or a convolution keeps apart",
    "sequence": "steps of a sequence",
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
        yield f"tail: {nodes} computed once per size ({percent(share)} of all)"


def percent(share: float) -> str:
    """Return a share as a person says it: 12%, under 1%, none."""
    if share == 0:
        return "none"
    return f"{share:.0%}" if share >= 0.005 else "under 1%"


def _groups(plan: Plan) -> Iterator[str]:
    rows: list[Row] = []
    for i, group in enumerate(plan.groups):
        widths = _few([str(w[i]) for w in plan.ladder], 5)
        name = group.name + (" (main)" if i == plan.main else "")
        rows.append((name, str(group.size), *widths))
    head = ("group", "units", *_few([f"at {m}" for m in plan.sizes], 5))
    yield from columns([head, *folded(rows, plan.parameters)], right=True)


def _few(words: list[str], most: int) -> list[str]:
    """The words, those in the middle left out where there are more than `most`."""
    return words if len(words) <= most else [*words[: most - 2], "..", words[-1]]


def _rest(plan: Plan) -> Iterator[str]:
    yield from _whole(whole_rows(plan))
    unknown = [(u.op, place_of(u.source) or u.node) for u in plan.unknown]
    scalars = list(dict.fromkeys((f"scalar:{s.name}", str(s)) for s in plan.scalars))
    yield from _section("ops without a rule (their axes stay whole)", unknown)
    yield from _section("scalars derived from a width (keep one with its name)", scalars)
    if plan.remarks:
        yield from ("", "remarks")
    for remark in told(plan.remarks):
        yield from _wrapped(remark, "  ")


def whole_rows(plan: Plan) -> list[Row]:
    """Return what stays whole as (tensor:dim, size, why, where), layers that repeat as one row.

    Where is the user's line, input or tensor; "" where the reason says it all.
    """
    first: dict[Row, str] = {}
    for axis in plan.whole:
        if axis.why != "no feature":
            first.setdefault((axis.axis, str(axis.size), axis.why), _where(axis))
    return folded([(*row, where) for row, where in first.items()], plan.parameters)


def _where(axis: Any) -> str:
    # Within the units of a layer only a line of code tells a person more than the layer does.
    if axis.why == "inner" and ".py:" not in axis.place:
        return ""
    place = place_of(axis.place, axis.axis)
    return "" if place == axis.axis.partition(":")[0] else place


def _whole(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what stays whole under its reasons, which are explained once."""
    reasons: dict[str, list[Row]] = {}
    for name, size, why, where in rows:
        reasons.setdefault(why, []).append((name, size, where))
    if rows:
        yield from ("", "stays whole (size, tensor:dim, where)")
    for why, found in reasons.items():
        means = meaning(why)
        yield from _wrapped(f"{why}: {means}" if means else why, "  ")
        shown = found[:MOST]
        sizes = max(len(size) for _, size, _ in shown)
        lines = columns([(name, where) for name, _, where in shown], WIDTH - sizes - 6)
        yield from (
            f"    {row[1]:>{sizes}}  {line}" for row, line in zip(shown, lines, strict=True)
        )
        if len(found) > MOST:
            yield f"    and {len(found) - MOST} more rows"


def told(remarks: Sequence[str]) -> list[str]:
    """Return remarks for a screen: one of a kind that comes once for each axis, and how many."""
    kinds = [remark.partition(":")[0] for remark in remarks]
    out: list[str] = []
    for at, (kind, remark) in enumerate(zip(kinds, remarks, strict=True)):
        if kind not in OFTEN or kind not in kinds[:at]:
            more = kinds.count(kind) - 1 if kind in OFTEN else 0
            out.append(f"{remark} (and {more} more like it)" if more else remark)
    return out


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ")


def meaning(why: str) -> str:
    """Return what a reason to stay whole means; "" where the word itself says it."""
    return MEANINGS.get(why, "")


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
        yield f"  and {len(rows) - MOST} more rows"


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
        rest = (cut_middle(c, n).rjust(n) if right else cut_middle(c, n).ljust(n) for c, n in cells)
        yield "  ".join([cut_middle(row[0], first).ljust(first), *rest]).rstrip()


def cut_middle(word: str, width: int) -> str:
    """Return a word of at most so many letters: its two ends where it is longer."""
    if len(word) <= width:
        return word
    left = (width - 2) // 2
    return f"{word[:left]}..{word[len(word) - (width - 2 - left) :]}"
