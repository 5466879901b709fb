"""Search: the widths near a constant of the graph, and which of them it holds.

What stands nearest comes first: the units of the value that is scaled, what a product before it
summed over, heads and what holds them, the weights that it is made of.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx
from torch.fx.node import Target

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim
from matryoshkafy.graph.formula import Formula
from matryoshkafy.graph.formulas import function_of
from matryoshkafy.graph.literals import computed, takes_root
from matryoshkafy.graph.nodes import reached
from matryoshkafy.plan.numbers import POWERS, number_of
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rules import op_of
from matryoshkafy.rules.weights import made_of

ROOTS, WHOLE = POWERS[:2], POWERS[2:]
FOURTH_ROOTS = (0.25, -0.25)
# How many elementwise ops may stand between the sums of a product and their scale (masks, biases).
BETWEEN = 4
# x.shape[-1] and x.size(-1).
ASKED = re.compile(r"(?:\.shape\[|\.size\()(-?\d+)[\])]")

Summed = Mapping[str, tuple[Dim, ...]]
Candidate = tuple[dims.Nested, int, tuple[float, ...]]


@dataclass(frozen=True)
class Search:
    """What is asked while constants are looked for; `summed` is {node: dims that it sums over}.

    `whole` are the integers by which an op scales on one line of the user's: where they are
    several, they count the rounds of a loop.
    """

    graph: fx.Graph
    plan: Plan
    state: Mapping[str, torch.Tensor]
    summed: Summed
    whole: Mapping[tuple[str, Target], set[int]]

    @cached_property
    def functions(self) -> dict[ast.AST, dict[fx.Node, None]]:
        """The values that each function of the user's reads and makes."""
        found: dict[ast.AST, dict[fx.Node, None]] = {}
        for node in self.graph.nodes:
            function = function_of(node)
            if function is not None:
                found.setdefault(function, {}).update(dict.fromkeys((*node.all_input_nodes, node)))
        return found

    @cached_property
    def weight_sizes(self) -> frozenset[int]:
        """The sizes of the dims of all parameters."""
        shapes = self.plan.parameters.values()
        return frozenset(dims.size(d) for shape in shapes for d in shape)

    @cached_property
    def group_sizes(self) -> frozenset[int]:
        """The units of all groups."""
        return frozenset(group.size for group in self.plan.groups)


def takes_number(node: fx.Node) -> bool:
    """Tell whether an operand of a node may be a constant that was derived from a width."""
    row = op_of(node)
    return row.scaling or row.algebra in ("add", "subtract")


def all_widths(node: fx.Node, search: Search) -> list[tuple[dims.Nested, int]]:
    """Return the widths that a formula at a node may be of, the likeliest first."""
    near = ((factor, width) for factor, width, _ in _near(node, search))
    return list(dict.fromkeys((*near, *_inside_weights(node, search), *_of_gains(node, search))))


def asked_widths(
    node: fx.Node, formula: Formula, value: float, search: Search
) -> list[tuple[dims.Nested, int]]:
    """Return the width that a line asks a tensor for (x.shape[-1]), where it can be only one."""
    leaf = formula.leaf(value)
    found = {d for d in asked_dims(node, formula, search) if math.isclose(dims.size(d), leaf)}
    return [(f, width) for dim in found for f, width, _ in _factors(dim)] if len(found) == 1 else []


def asked_dims(node: fx.Node, formula: Formula, search: Search) -> Iterator[Dim]:
    """Yield the dims whose size a line may ask for: in that place, of all that the same function of
    the user's reads and makes.
    """
    asked = ASKED.search(formula.leaves[0][0]) if formula.counts and formula.leaves else None
    function = function_of(node) if asked is not None else None
    if asked is None or function is None:
        return
    place = int(asked[1])
    for value in search.functions[function]:
        shape = search.plan.dims(value.name)
        if -len(shape) <= place < len(shape):
            yield shape[place]


def summed_before(node: fx.Node, search: Search) -> Iterator[Dim]:
    """Yield what the products and totals whose sums reach a node were taken over, and what the
    products before such totals were.
    """
    before = list(_before(node))
    inner = [v for total in before if op_of(total).totals for v in _before(total)]
    for value in dict.fromkeys((*before, *inner)):
        yield from search.summed.get(value.name, ())


def width_in(
    node: fx.Node, constant: tuple[float, float], whole: bool, search: Search
) -> tuple[dims.Nested, float] | None:
    """Return the width that a constant at a node holds, and the power of it."""
    if whole:  # a root is no integer, unless the statement rounds what it takes
        return derived(constant, whole_widths(node, search)) or _of_model(node, constant, search)
    return (
        derived(constant, _widths_of(node, search))
        or derived(constant, _scaled_widths(node, constant[0], search))
        or _of_model(node, constant, search)
        or derived(constant, _widths_of_scores(node, search))
    )


def whole_widths(node: fx.Node, search: Search) -> Iterator[Candidate]:
    """Yield the widths that an integer at a node may count."""
    for factor, width, powers in _near(node, search):
        if 1.0 in powers:
            yield factor, width, (1.0,)


def _near(node: fx.Node, search: Search) -> Iterator[Candidate]:
    yield from _widths_of(node, search)
    yield from _counted_widths(node, search)
    yield from _widths_of_scores(node, search)


def widths_within(node: fx.Node, search: Search) -> Iterator[Candidate]:
    """Yield the widths that a product sums over itself; of attention also those of all heads."""
    for dim in search.summed.get(node.name, ()):
        yield from _factors(dim)
    for heads in filter(None, map(alone, search.plan.dims(node.name))):
        whole = _widths_holding(heads, search.plan) if op_of(node).attends else ()
        yield from ((heads, width, ROOTS) for width in whole)
    yield from _widths_of_scores(node, search)


def _widths_of_scores(node: fx.Node, search: Search) -> Iterator[Candidate]:
    """Yield the widths by which scores of attention are divided whole, as in muP: of a head and of
    all of them. They come last, since sqrt(64) is also an eighth of 64; and where the line is not
    known, a half is a half.
    """
    if not computed(node, []):
        return
    products = [node] if op_of(node).attends else filter(_of_activations, _before(node))
    for value in products:
        for dim in search.summed.get(value.name, ()):
            yield from _factors(dim, WHOLE)
        for factor in filter(None, map(alone, search.plan.dims(value.name))):
            yield from ((factor, n, WHOLE) for n in _widths_holding(factor, search.plan))


def derived(
    constant: tuple[float, float], candidates: Iterable[Candidate]
) -> tuple[dims.Nested, float] | None:
    """Return the width that a constant holds, and the power of it."""
    value, tolerance = constant
    for factor, width, powers in candidates if value else ():
        for power in powers:
            # 1 is every power of 1, and says of no constant where it came from.
            if width > 1 and math.isclose(value, width**power, rel_tol=tolerance):
                return factor, power
    return None


def _of_model(
    node: fx.Node, constant: tuple[float, float], search: Search
) -> tuple[dims.Nested, float] | None:
    """Return a width and the power, where the statement takes a root of something: the width that
    a layer before it sums over, as a head does, or in the trunk the model's own.
    """
    plan = search.plan
    summed = (dim for v in node.all_input_nodes for dim in search.summed.get(v.name, ()))
    widths = list(filter(None, map(alone, summed)))
    if any(map(dims.is_nested, plan.dims(node.name))):
        widths.append(dims.Nested(plan.main, plan.groups[plan.main].size))
    found = derived(constant, ((width, width.size, ROOTS) for width in widths))
    return found if found and takes_root(node, constant[0]) else None


def _widths_of(node: fx.Node, search: Search) -> Iterator[Candidate]:
    """Yield the widths that a constant at this node may come from."""
    plan = search.plan
    shape = plan.dims(node.name)
    last = alone(shape[-1]) if shape else None
    # Of a value that is made of nothing every dim may be what it averages over: ones(d, 1) / d.
    made = op_of(node).scaling and all(n.op == "call_function" for n in made_of(node))
    for width in filter(None, map(alone, shape) if made else [last]):
        yield width, width.size, POWERS
    yield from _factors(shape[-1]) if shape else ()
    for factor in filter(None, map(alone, shape)):
        for width in _widths_holding(factor, plan):
            yield factor, width, ROOTS
    yield from _summed_widths(node, search)
    yield from _inputs_of_weight(node, search)


def _inputs_of_weight(node: fx.Node, search: Search) -> Iterator[Candidate]:
    """Yield how many inputs each output of a weight sums over: an equalised rate divides by it."""
    weight = next(iter(node.all_input_nodes), node)
    while op_of(weight).picks and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    held = weight.op == "get_attr"
    shape = search.plan.parameters.get(str(weight.target), ()) if held else ()
    nested = [f for dim in shape[1:] for f in dim if isinstance(f, dims.Nested)]
    if len(shape) > 2 and len(nested) == 1:
        yield nested[0], math.prod(map(dims.size, shape[1:])), ROOTS
    elif len(shape) > 2:  # [1, out, in, k, k] of modulated convolutions: the inputs stand behind
        whole = math.prod(dims.size(d) for d in shape if not dims.is_nested(d))
        yield from ((factor, factor.size * whole, ROOTS) for factor in reversed(nested))


def _inside_weights(node: fx.Node, search: Search) -> Iterator[tuple[dims.Nested, int]]:
    """Yield the dims of the weights that a value is made of, and their products: fans."""
    made = made_of(node)
    if any(n.op == "placeholder" for n in made):
        return
    for weight in (n for n in node.graph.find_nodes(op="get_attr") if n in made):
        shape = search.plan.parameters.get(str(weight.target), ())
        fixed = math.prod(dims.size(d) for d in shape if not dims.is_nested(d))
        for factor in filter(None, map(alone, shape)):
            yield factor, factor.size
            yield factor, factor.size * fixed


def _of_gains(node: fx.Node, search: Search) -> Iterator[tuple[dims.Nested, int]]:
    """Yield what the products were summed over that a scaled weight multiplies: a gain of nGPT
    (arXiv 2410.01131) makes up for rows of length 1.
    """
    if _of_weights(node):
        gains = reached([node], lambda n: filter(_of_weights, n.users))
        users = [u for u in node.graph.nodes if not gains.isdisjoint(u.all_input_nodes)]
        for value in (v for u in users if op_of(u).scaling for v in u.all_input_nodes):
            for dim in search.summed.get(value.name, ()):
                yield from ((factor, width) for factor, width, _ in _factors(dim))


def _of_weights(node: fx.Node) -> bool:
    """Tell whether a value is elementwise of weights alone."""
    made = made_of(node)
    plain = all(n.op == "get_attr" or op_of(n).elementwise for n in made)
    return plain and any(n.op == "get_attr" for n in made)


def _factors(dim: Dim, powers: tuple[float, ...] = ROOTS) -> Iterator[Candidate]:
    """Yield the one width in a product: by its own units where they stand last, and the whole."""
    nested = [f for f in dim if isinstance(f, dims.Nested)]
    if len(nested) == 1 and not any(isinstance(f, dims.Sum) for f in dim):
        if dim[-1] is nested[0]:
            yield nested[0], nested[0].size, powers
        yield nested[0], dims.size(dim), powers


def _summed_widths(node: fx.Node, search: Search) -> Iterator[Candidate]:
    """Yield the width that a product or a total was taken over, before the constant."""
    before = list(_before(node))
    totals = [(value, POWERS) for value in before if op_of(value).totals]
    products = [(value, ROOTS) for value in node.all_input_nodes if op_of(value).product]
    for value, powers in (*products, *totals):
        factor = next(map(alone, search.summed.get(value.name, ())[-1:]), None)
        if factor is not None:
            yield factor, factor.size, powers
    for value in filter(_of_activations, before):
        for dim in search.summed.get(value.name, ()):
            yield from _factors(dim)
            factor = alone(dim)
            if factor is not None:
                yield from ((factor, n, ROOTS) for n in _widths_holding(factor, search.plan))


def _counted_widths(node: fx.Node, search: Search) -> Iterator[Candidate]:
    """Yield what the products before an integer were summed over: a mean of them divides by it, as
    does the head of muP.
    """
    for value in _before(node):
        for factor in filter(None, map(alone, search.summed.get(value.name, ()))):
            yield factor, factor.size, (1.0,)


def alone(dim: Dim) -> dims.Nested | None:
    """Return the group of a dim that is nothing else."""
    return dim[0] if len(dim) == 1 and isinstance(dim[0], dims.Nested) else None


def _before(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the products and totals whose sums reach a node through masks and biases."""
    near, seen = [node], set[fx.Node]()
    for _ in range(BETWEEN):
        near = [v for n in near for v in n.all_input_nodes if v not in seen]
        seen.update(near)
        yield from (v for v in near if op_of(v).weights or op_of(v).product or op_of(v).totals)
        near = [v for v in near if _passes(v)]


def _of_activations(node: fx.Node) -> bool:
    """Tell whether a node is a product of which no operand is a weight."""
    return op_of(node).product and all(n.op != "get_attr" for n in node.all_input_nodes)


def _passes(node: fx.Node) -> bool:
    row = op_of(node)
    return (row.elementwise and not row.nonlinear) or row.picks


def _scaled_widths(node: fx.Node, value: float, search: Search) -> Iterator[Candidate]:
    """Yield what a product sums over that reads a value, where a constant scales both operands."""
    for product in _products_of(node):
        if all(_scaled_by(operand, value, search) for operand in product.all_input_nodes):
            for dim in search.summed.get(product.name, ()):
                yield from ((factor, width, FOURTH_ROOTS) for factor, width, _ in _factors(dim))


def _products_of(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the products that read a value, rearranged or masked on its way at most."""
    found = reached([node], lambda n: (u for u in n.users if _passes(u)) if n.users else ())
    return (u for n in found for u in n.users if op_of(u).product)


def _scaled_by(node: fx.Node, value: float, search: Search) -> bool:
    """Tell whether a value is scaled by a constant, rearranged at most since."""
    while not op_of(node).scaling:
        if not op_of(node).picks or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return any(number_of(argument, search.state)[0] == value for argument in node.args)


def _widths_holding(heads: dims.Nested, plan: Plan) -> set[int]:
    """Return the widths of parameters that are these heads, times whole units of a head (or this
    head, so many times).
    """
    found = {dim for terms in plan.parameters.values() for dim in terms if heads in dim}
    return {
        dims.size(dim)
        for dim in found
        if len(dim) > 1 and all(isinstance(f, int) for f in dim if f != heads)
    }
