"""The constants of a node that are sizes follow the level; the op's row says which they are."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Widths
from matryoshkafy.graph.nodes import Argument, bound_args, set_arg
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rules.table import op_of

_FLOORDIV = cast("Callable[..., int]", operator.floordiv)  # pyright: ignore[reportUnknownMemberType]


def exchanged(graph: fx.Graph, count: Argument, width: int, other: int) -> fx.Node:
    """Write a count that is computed from the inputs and holds a width as a factor, with another
    width in its place; return its node.
    """
    product = graph.call_function(operator.mul, (count, other))
    return graph.call_function(_FLOORDIV, (product, width))


class Resize:
    """The `Sizes` of the rules: one node being written at one level."""

    def __init__(self, plan: Plan, widths: Widths, old: fx.Node, new: fx.Node) -> None:
        self.plan, self.widths, self.old, self.new = plan, widths, old, new

    @property
    def args(self) -> dict[str, Any]:
        return bound_args(self.new)

    @property
    def source(self) -> tuple[Dim, ...]:
        first = self.old.args[0]
        return next(iter(self.plan.outputs(first.name)), ()) if isinstance(first, fx.Node) else ()

    @property
    def outputs(self) -> tuple[tuple[Dim, ...], ...]:
        return self.plan.outputs(self.old.name)

    def note(self, name: str) -> Dim | None:
        return self.plan.notes.get(self.old.name, {}).get(name)

    def at(self, dim: Dim) -> int:
        return dims.size_at(dim, self.widths)

    def kept_before(self, dim: Dim, index: int) -> int:
        return sum(min(b, index) - a for a, b in dims.kept(dim, self.widths) if a < index)

    def scaled(self, value: Argument, dim: Dim) -> Any:
        # -1 is what is left, at every size.
        if not dims.is_nested(dim) or (isinstance(value, int) and value < 0):
            return value
        if isinstance(value, int):
            return self.at(dim)
        with self.new.graph.inserting_before(self.new):
            return exchanged(self.new.graph, value, dims.size(dim), self.at(dim))

    def set(self, name: str, value: Argument) -> None:
        set_arg(self.new, name, value)

    def replace(self, target: Callable[..., object], *args: Argument) -> None:
        self.new.target = target
        self.new.args, self.new.kwargs = (self.new.args[0], *args), {}


def resize(plan: Plan, widths: Widths, old: fx.Node, new: fx.Node) -> None:
    """Write the size constants of `new`, a copy of `old`, for a level."""
    row = op_of(old).sizes
    if row is None or old.name not in plan.nodes:
        return
    sizes = Resize(plan, widths, old, new)
    if not isinstance(row, str):
        row(sizes)
    elif row in sizes.args:
        _trailing(sizes, row)


def _trailing(sizes: Resize, name: str) -> None:
    """One constant for each of the last dims of the output; a number is that of the last."""
    value, out = sizes.args[name], sizes.outputs[0]
    if not isinstance(value, (int, fx.Node)):
        last = out[len(out) - len(value) :]
        sizes.set(name, [sizes.scaled(v, d) for v, d in zip(value, last, strict=True)])
    else:
        sizes.set(name, sizes.scaled(value, out[-1]))
