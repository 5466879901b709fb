"""kept_numbers(): constants that stay at every size though their line may compute them of a width.

Whatever is not understood is said, and so is what stands where constants are not looked for: a
bound of a clamp, a slope, what fills a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.formula import Formula
from matryoshkafy.graph.formulas import expressions_of
from matryoshkafy.graph.literals import computed
from matryoshkafy.graph.nodes import is_op, is_tensor, source_of, tensor_info
from matryoshkafy.plan.by_formula import accounted, of_call, typed, undecided
from matryoshkafy.plan.near_widths import Search, asked_dims, summed_before, takes_number
from matryoshkafy.plan.numbers import number_in, number_of
from matryoshkafy.plan.text import place_of
from matryoshkafy.rules import op_of

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Masks and norms hold these, of any width.
LIMITS = {n for t in map(torch.finfo, TYPES) for n in (t.max, t.eps, t.tiny)}


def kept_numbers(node: fx.Node, search: Search) -> Iterator[str]:
    """Say of each constant of a node of what its line may compute it, and that it stays."""
    numbers = list(_numbers(node, search)) if is_op(node) and is_tensor(node) else []
    if not numbers:
        return
    expressions = expressions_of(node)
    summed = [*search.summed.get(node.name, ()), *summed_before(node, search)]
    near = [*search.plan.dims(node.name), *summed]
    # A head that stays whole explains its own scale, whatever else has as many units.
    whole = {dims.size(d) for d in (*near, *_read(node, search)) if not dims.is_nested(d)}
    asked = {d for f in expressions for d in asked_dims(node, f, search) if dims.is_nested(d)}
    last = [shape[-1] for n in (node, *node.all_input_nodes) if (shape := search.plan.dims(n.name))]
    line = _Line(
        expressions,
        frozenset(whole),
        frozenset(_whole_in((*last, *summed))),
        (search.group_sizes - whole) | frozenset(map(dims.size, asked)),
        frozenset(map(dims.size, filter(dims.is_nested, near))),
        tensor_info(node).dtype.is_floating_point,
        op_of(node).elementwise or op_of(node).algebra == "power",
    )
    for constant in numbers:
        # A number that the line holds as well may still be the one that it computes.
        written = any(not f.leaves and f.coefficient == constant[0] for f in expressions)
        of = line.computes(constant, not written and computed(node, [constant[0]]))
        if of:
            yield (
                f"number: {constant[0]:.6g} at {place_of(source_of(node) or '') or node.name} "
                f"is the same at every size; {of}: where that is a width, let the model read it of "
                "a tensor's shape, or scale the slice"
            )


@dataclass(frozen=True)
class _Line:
    """What the line of a constant says, what stays whole near it (any dim, and its features), the
    sizes that nest in the model and near the constant, and whether it is a float, and scales
    or bounds values one by one.
    """

    expressions: tuple[Formula, ...]
    whole: frozenset[int]
    features: frozenset[int]
    sizes: frozenset[int]
    near: frozenset[int]
    floats: bool
    pointwise: bool

    def computes(self, constant: tuple[float, float], unwritten: bool) -> str:
        """Say of what a constant may be computed; "" where it is no width."""
        if any(_is_power(constant, width) for width in self.features):
            return ""
        asked = self._asked(constant) if unwritten else self._counting()
        names = undecided(asked, constant, self.sizes, self.near, self.whole)
        if names:
            return f"its line computes it of {names}"
        unknown = unwritten and self.near and constant[0] != 1
        if not unknown or accounted(self.expressions, constant, self.sizes):
            return ""
        return "where its line takes it from is not found"

    def _asked(self, constant: tuple[float, float]) -> list[Formula]:
        """Return the formulas that count: beside a width all, elsewhere those of one name, and in
        what way none says of numbers that nobody types.
        """
        if constant[0] == 1:  # is a power of everything; alpha / rank may be 1 at one rank alone
            return [f for f in self.expressions if self.near and len(f.leaves) > 1]
        if self.near and (self.pointwise or not typed(constant)):
            short = typed(constant) and not constant[0].is_integer()
            return [f for f in self.expressions if not f.plain and not (short and of_call(f))]
        if self.near or not self.floats:  # positions and masks of them
            return self._counting()
        single = [f for f in self.expressions if len(f.leaves) == 1]
        return [f for f in single if f.known or (f.opaque and not typed(constant))]

    def _counting(self) -> list[Formula]:
        named = (f for f in self.expressions if f.known and not f.plain)
        return [f for f in named if len(f.leaves) == 1]


def _whole_in(features: Iterable[dims.Dim]) -> Iterator[int]:
    """Yield the sizes that stay whole, alone or within a product: a head of 64 units."""
    for dim in features:
        if not dims.is_nested(dim):
            yield dims.size(dim)
        yield from (factor for factor in dim if isinstance(factor, int))


def _is_power(constant: tuple[float, float], width: int) -> bool:
    roots = (power / 4 for power in (-4, -2, -1, 1, 2, 4))
    return width > 1 and any(math.isclose(constant[0], width**p, rel_tol=1e-6) for p in roots)


def _numbers(node: fx.Node, search: Search) -> Iterator[tuple[float, float]]:
    """Yield the constants of a node and how far off they may be; 0 comes of nothing, and limits of
    a type of the type.
    """
    row = op_of(node)
    if takes_number(node):
        given = (*node.args[:2], *(a for a in node.kwargs.values() if isinstance(a, float)))
        found = [_number_in(argument, search) for argument in given]
    else:
        kinds = (int, float, fx.Node) if row.elementwise or row.algebra == "power" else (float,)
        given = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, kinds)]
        found = [_number_in(argument, search) for argument in given]
    return (c for c in found if c[0] and math.isfinite(c[0]) and abs(c[0]) not in LIMITS)


def _number_in(argument: object, search: Search) -> tuple[float, float]:
    """Return the number that an argument is, or that all elements of a buffer are."""
    held = search.state.get(str(argument.target)) if isinstance(argument, fx.Node) else None
    many = held is not None and held.numel() > 1 and held.is_floating_point() and not held.is_meta
    if held is None or not many or held.requires_grad:
        return number_of(argument, search.state)
    number = number_in(held.flatten()[0])
    return number if bool((held == number[0]).all()) else (0.0, 0.0)


def _read(node: fx.Node, search: Search) -> Iterator[dims.Dim]:
    """Yield the dims of what a node reads, and of what that was made of."""
    for value in node.all_input_nodes:
        for source in (value, *value.all_input_nodes):
            yield from search.plan.dims(source.name)
