"""kept_numbers(): constants that stay at every size though their line may compute them of a width.

Whatever is not understood is said, and so is what stands where constants are not looked for: a
bound of a clamp, a slope, what fills a mask.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.formulas import formulas_of
from matryoshkafy.graph.literals import computed
from matryoshkafy.graph.nodes import is_op, source_of
from matryoshkafy.plan.by_formula import undecided
from matryoshkafy.plan.near_widths import Search, takes_number
from matryoshkafy.plan.numbers import EXACT, number_of
from matryoshkafy.plan.text import place_of


def kept_numbers(node: fx.Node, search: Search) -> Iterator[str]:
    """Say of each constant of a node of what its line may compute it, and that it stays."""
    formulas = formulas_of(node) if is_op(node) else ()
    if not formulas:
        return
    near = [*search.plan.dims(node.name), *(d for v in _summed_near(node, search) for d in v)]
    # A head that stays whole explains its own scale, whatever else has as many units.
    whole = {dims.size(d) for d in (*near, *_read(node, search)) if not dims.is_nested(d)}
    sizes = search.group_sizes - whole
    counting = [f for f in formulas if f.known and len(f.leaves) == 1]
    beside = takes_number(node) and any(map(dims.is_nested, near))
    for constant in _numbers(node, search):
        # A number that the line holds as well may still be the one that it computes.
        asked = formulas if beside and computed(node, [constant[0]]) else counting
        names = undecided(asked, constant, sizes)
        if names:
            yield (
                f"number: {constant[0]:.6g} at {place_of(source_of(node) or '') or node.name} "
                f"is the same at every size; its line computes it of {names}: where that is a "
                "width, let the model read it of a tensor's shape, or scale the slice"
            )


def _numbers(node: fx.Node, search: Search) -> Iterator[tuple[float, float]]:
    """Yield the constants of a node and how far off they may be; 0 and 1 come of nothing."""
    if takes_number(node):
        found = [number_of(argument, search.state) for argument in node.args[:2]]
    else:
        given = (*node.args, *node.kwargs.values())
        found = [(a, EXACT) for a in given if isinstance(a, float)]
    return (constant for constant in found if constant[0] not in (0, 1))


def _read(node: fx.Node, search: Search) -> Iterator[dims.Dim]:
    """Yield the dims of what a node reads, and of what that was made of."""
    for value in node.all_input_nodes:
        for source in (value, *value.all_input_nodes):
            yield from search.plan.dims(source.name)


def _summed_near(node: fx.Node, search: Search) -> Iterator[tuple[dims.Dim, ...]]:
    """Yield what the products and sums that a node reads were taken over."""
    return (search.summed[v.name] for v in node.all_input_nodes if v.name in search.summed)
