"""One layer's weight as a picture: the blocks that each size adds."""

from __future__ import annotations

from collections.abc import Iterator

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim
from matryoshkafy.plan.plan import Plan
from matryoshkafy.report.pictures.svg import Box, rect, segment, svg, tag, text

MOST_RUNS = 64
SLIMMEST = 0.7
Span = tuple[float, float, int]


def drawn_layer(plan: Plan) -> str | None:
    """Return the name of the parameter that shows the nesting best; None where no matrix nests.

    Both of its axes nest, in few pieces; of those the one with most weights.
    """
    names = [n for n, shape in plan.parameters.items() if _drawable(plan, shape)]
    return max(names, key=lambda n: _weights(plan.parameters[n]), default=None)


def _drawable(plan: Plan, shape: tuple[Dim, ...]) -> bool:
    if len(shape) < 2 or not (dims.is_nested(shape[0]) and dims.is_nested(shape[1])):
        return False
    return all(len(dims.runs(d, plan.ladder)) // 2 <= MOST_RUNS for d in shape[:2])


def _weights(shape: tuple[Dim, ...]) -> tuple[int, int]:
    rows, columns = dims.size(shape[0]), dims.size(shape[1])
    return (-len(shape), rows * columns)


def weight(plan: Plan, name: str, side: float = 300) -> str:
    """Return a weight matrix [out, in] as its blocks, each at the level that first holds it.

    In masked nesting an output block reads inputs of its own level and below: the blocks above
    the diagonal are structural zeros. In sliced nesting every block holds weights.
    """
    out, into = plan.parameters[name][:2]
    tall, wide = dims.size(out), dims.size(into)
    # A long or a wide matrix is drawn less so: its blocks are what is to be seen.
    width = side * min(1.0, max(SLIMMEST, wide / tall))
    box = Box(40, 24, width, side * min(1.0, max(SLIMMEST, tall / wide)))
    body = "".join(_blocks(plan, _scaled(out, plan, box.height), _scaled(into, plan, box.width)))
    frame = rect(Box(0, 0, box.width, box.height), class_="rule")
    body = tag("g", body, frame, transform=f"translate({box.x:g} {box.y:g})")
    words = text(f"{wide} inputs", box.x, 14) + text(
        f"{tall} outputs", 0, 0, transform=f"translate(30 {box.y + box.height:g}) rotate(-90)"
    )
    label = f"weight {name}, {tall} outputs by {wide} inputs, in blocks of {plan.levels} levels"
    return svg(body + words, box.x + box.width + 4, box.y + box.height + 6, label)


def _scaled(dim: Dim, plan: Plan, length: float) -> list[Span]:
    """Return (start, stop, level) of each run of a dim, scaled to a length."""
    unit = length / dims.size(dim)
    return [(a * unit, b * unit, level) for a, b, level in dims.spans(dim, plan.ladder)]


def _blocks(plan: Plan, rows: list[Span], columns: list[Span]) -> Iterator[str]:
    for top, bottom, row in rows:
        for left, right, column in columns:
            if row >= column or not plan.masked:
                box = Box(left, top, right - left, bottom - top)
                yield segment(box, max(row, column), plan.levels)
