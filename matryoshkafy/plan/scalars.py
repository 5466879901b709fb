"""find_scalars(): constants of the graph that were derived from a width, such as sqrt(d_model).

A sliced model of width m must scale by sqrt(m). A constant is taken for derived when it multiplies
or divides a tensor, fills one or scales an operand (alpha, value), and equals n ** p: n the units
of the tensor's last dimension, a nested axis, and p one of 1/2, -1/2, 1, -1; or p one of 1/2, -1/2
and n a width that stands in a product of factors (heads times units of a head: the whole, or the
head where that is what shrinks), or that the products before it were summed over, or that a
convolution sums over whose weight is scaled (equalised rates); or p one of 1, -1 and n the width
of a head or of all heads under scores of attention (q k / d of muP); or p one of 1/4, -1/4, where
both operands of a product are scaled by it. An integer counts: it is n or n - 1, also as a factor
of a count of all that was summed (x.sum() / x.numel()). Or its line computes it of such a width by
another formula (plan/by_formula.py): sqrt(3 * n), n * log(2 * pi). A number that the user's code
holds as such (x * 0.25, a default of 0.25, that of a class or a configuration), or computes of
something else (sqrt(2 * layers)), is none of these. What is found is reported in the plan and
rewritten at each size, unless keep=["scalar:model.py:31"], the line that the plan prints, holds it.
"""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx.node import Target

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim
from matryoshkafy.errors import PlanError
from matryoshkafy.graph.formulas import formulas_of
from matryoshkafy.graph.literals import computed, takes_root, written_out
from matryoshkafy.graph.nodes import bound_args, is_op, reached, source_of
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.by_formula import elsewhere, explained
from matryoshkafy.plan.numbers import EXACT, POWERS, number_of
from matryoshkafy.plan.plan import Plan, Scalar
from matryoshkafy.rules import op_of
from matryoshkafy.rules.weights import made_of

ROOTS, WHOLE = POWERS[:2], POWERS[2:]
ARITHMETIC = {operator.mul, operator.truediv}
FOURTH_ROOTS = (0.25, -0.25)
KEEP = "scalar:"
# How many elementwise ops may stand between the sums of a product and their scale (masks, biases).
BETWEEN = 4

Summed = Mapping[str, tuple[Dim, ...]]
Candidate = tuple[dims.Nested, int, tuple[float, ...]]


@dataclass(frozen=True)
class _Search:
    """What is asked while constants are looked for; `summed` is {node: dims that it sums over}.

    `whole` are the integers by which an op scales on one line of the user's: where they are
    several, they count the rounds of a loop.
    """

    plan: Plan
    state: Mapping[str, torch.Tensor]
    summed: Summed
    whole: Mapping[tuple[str, Target], set[int]]


def find_scalars(trace: Trace, plan: Plan, summed: Summed) -> Plan:
    """Return the plan with its width-derived scalars (sliced nesting only: masked keeps them).

    Args:
        trace: the traced model.
        plan: its plan.
        summed: {node: the dims that it sums products or values over}.
    """
    if plan.masked or plan.options.scope == "output":
        return plan
    search = _Search(plan, trace.state(), summed, _whole_numbers(trace.graph))
    nodes = trace.graph.nodes
    found = [s for n in nodes for s in (*_scalars_of(n, search), *_counts_in(n, search))]
    patterns = [p.removeprefix(KEEP) for p in plan.options.keep if p.startswith(KEEP)]
    kept = {s.node for p in patterns for s in _matching(found, p)}
    return replace(plan, scalars=tuple(s for s in found if s.node not in kept))


def _whole_numbers(graph: fx.Graph) -> dict[tuple[str, Target], set[int]]:
    found: dict[tuple[str, Target], set[int]] = {}
    for node in (n for n in graph.nodes if op_of(n).scaling):
        numbers = (a for a in node.args if type(a) is int)
        found.setdefault((source_of(node) or node.name, node.target), set()).update(numbers)
    return found


def _matching(found: Sequence[Scalar], pattern: str) -> list[Scalar]:
    matching = [s for s in found if any(fnmatch.fnmatch(n, pattern) for n in (s.name, s.node))]
    if not matching:
        raise PlanError(
            f"keep={KEEP + pattern!r} matches no constant derived from a width; the constants are "
            f"{sorted({KEEP + s.name for s in found})}"
        )
    return matching


def _scalars_of(node: fx.Node, search: _Search) -> list[Scalar]:
    if node.target in ARITHMETIC:
        return _in_sizes(node, search)
    if not is_op(node):
        return []
    row = op_of(node)
    factors = _factors_of(node, search) if row.factor else []
    if factors or len(node.args) != 2:
        return factors
    if row.algebra == "power":
        return _slopes_of(node, search)
    places = enumerate(node.args) if row.scaling or row.algebra in ("add", "subtract") else ()
    found = (_operand_of(node, index, argument, search) for index, argument in places)
    return list(filter(None, found))[:1]


def _in_sizes(node: fx.Node, search: _Search) -> list[Scalar]:
    """A number beside a size of the call, where a tensor is scaled by both: sqrt(d) * length."""
    users = reached([node], lambda n: (u for u in n.users if n is node or n.target in ARITHMETIC))
    scaled = next((u for u in users if op_of(u).scaling), None)
    for index, number in enumerate(node.args if scaled is not None else ()):
        if isinstance(number, float) and scaled is not None:
            constant = (number, EXACT)
            found = _width_in(scaled, constant, False, search)
            if found and computed(node, [number]):
                return [_scalar(node, str(index), number, found)]
    return []


def _operand_of(node: fx.Node, index: int, argument: object, search: _Search) -> Scalar | None:
    """Return the constant that an operand is, where it was derived from a width."""
    constant = number_of(argument, search.state)
    whole = type(argument) is int
    rounds = whole and len(search.whole.get((source_of(node) or node.name, node.target), ())) > 1
    if not constant[0] or rounds:
        return None
    found = _width_in(node, constant, whole, search) if op_of(node).scaling else None
    if found and not written_out(node, constant[0]) and not _elsewhere(node, constant, search):
        return _scalar(node, str(index), constant[0], found)
    less = _derived((constant[0] + 1, EXACT), _whole(node, search)) if whole else None
    if op_of(node).scaling and less and not written_out(node, constant[0]):
        return replace(_scalar(node, str(index), constant[0], (less[0], 1.0)), offset=-1.0)
    return _by_formula(node, str(index), constant, search)


def _elsewhere(node: fx.Node, constant: tuple[float, float], search: _Search) -> bool:
    return elsewhere(formulas_of(node), constant, _all_widths(node, search))


def _by_formula(
    node: fx.Node, name: str, constant: tuple[float, float], search: _Search
) -> Scalar | None:
    """Return the constant where its line computes it of a width, whatever the formula."""
    formulas = formulas_of(node) if computed(node, [constant[0]]) else ()
    widths = _all_widths(node, search) if formulas else ()
    sizes = {
        n for v in node.all_input_nodes for d in search.plan.dims(v.name) for n in [dims.size(d)]
    }
    found = explained(formulas, constant, widths, sizes)
    if found is None:
        return None
    scalar = _scalar(node, name, constant[0], (found.width, found.power))
    return replace(scalar, offset=found.offset)


def _all_widths(node: fx.Node, search: _Search) -> list[tuple[dims.Nested, int]]:
    """Return the widths that a formula at a node may be of, the likeliest first."""
    near = (*_widths_of(node, search), *_counted_widths(node, search))
    candidates = (*near, *_widths_of_scores(node, search), *_inside_weights(node, search))
    return list(dict.fromkeys((factor, width) for factor, width, _ in candidates))


def _width_in(
    node: fx.Node, constant: tuple[float, float], whole: bool, search: _Search
) -> tuple[dims.Nested, float] | None:
    """Return the width that a constant at a node holds, and the power of it."""
    if whole:  # a root is no integer, unless the statement rounds what it takes
        return _derived(constant, _whole(node, search)) or _of_model(node, constant, search)
    return (
        _derived(constant, _widths_of(node, search))
        or _derived(constant, _scaled_widths(node, constant[0], search))
        or _of_model(node, constant, search)
        or _derived(constant, _widths_of_scores(node, search))
    )


def _whole(node: fx.Node, search: _Search) -> Iterator[Candidate]:
    """Yield the widths that an integer at a node may count."""
    widths = (*_widths_of(node, search), *_counted_widths(node, search))
    for factor, width, powers in (*widths, *_widths_of_scores(node, search)):
        if 1.0 in powers:
            yield factor, width, (1.0,)


def _counts_in(node: fx.Node, search: _Search) -> Iterator[Scalar]:
    """Yield the widths in a count of what was summed over: x.sum() / x.numel()."""
    if not op_of(node).scaling:
        return
    summed = [d for v in node.all_input_nodes for d in search.summed.get(v.name, ())]
    counted = {f.size: f for d in summed for f in d if isinstance(f, dims.Nested)}
    for index, argument in enumerate(node.args):
        for number in _sizes_in(argument):
            factor = counted.get(number)
            if factor is not None and computed(node, [number]):
                found = _scalar(node, str(index), float(number), (factor, 1.0))
                yield replace(found, form="count")


def _sizes_in(count: object) -> Iterator[int]:
    """Yield the fixed factors of a product of sizes."""
    if isinstance(count, fx.Node) and count.target is operator.mul:
        for factor in count.args:
            yield from [factor] if type(factor) is int else _sizes_in(factor)


def _factors_of(node: fx.Node, search: _Search) -> list[Scalar]:
    """An argument that multiplies the sums of a product (the scale of attention, alpha), or one of
    the operands of a sum.
    """
    name = op_of(node).factor
    argument = bound_args(node).get(name)
    constant = number_of(argument, search.state)
    if op_of(node).product or op_of(node).attends:
        found = _derived(constant, _widths_within(node, search))
    elif not computed(node, [constant[0]]):
        return []  # where the line is not known, a half that fills a tensor is a half
    else:
        found = _width_in(node, constant, type(argument) is int, search)
    if found and not _elsewhere(node, constant, search):
        return [_scalar(node, name, constant[0], found)]
    by_formula = _by_formula(node, name, constant, search) if constant[0] else None
    return [by_formula] if by_formula else []


def _widths_within(node: fx.Node, search: _Search) -> Iterator[Candidate]:
    """Yield the widths that a product sums over itself; of attention also those of all heads."""
    for dim in search.summed.get(node.name, ()):
        yield from _factors(dim)
    for heads in filter(None, map(_alone, search.plan.dims(node.name))):
        whole = _widths_holding(heads, search.plan) if op_of(node).attends else ()
        yield from ((heads, width, ROOTS) for width in whole)
    yield from _widths_of_scores(node, search)


def _widths_of_scores(node: fx.Node, search: _Search) -> Iterator[Candidate]:
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
        for factor in filter(None, map(_alone, search.plan.dims(value.name))):
            yield from ((factor, n, WHOLE) for n in _widths_holding(factor, search.plan))


def _scalar(node: fx.Node, name: str, value: float, found: tuple[dims.Nested, float]) -> Scalar:
    factor, power = found
    source = node.meta.get("source") or ""
    return Scalar(node.name, name, value, factor.group, factor.size, power, source)


def _derived(
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
    node: fx.Node, constant: tuple[float, float], search: _Search
) -> tuple[dims.Nested, float] | None:
    """Return a width and the power, where the statement takes a root of something: the width that
    a layer before it sums over, as a head does, or in the trunk the model's own.
    """
    plan = search.plan
    summed = (dim for v in node.all_input_nodes for dim in search.summed.get(v.name, ()))
    widths = list(filter(None, map(_alone, summed)))
    if any(map(dims.is_nested, plan.dims(node.name))):
        widths.append(dims.Nested(plan.main, plan.groups[plan.main].size))
    found = _derived(constant, ((width, width.size, ROOTS) for width in widths))
    return found if found and takes_root(node, constant[0]) else None


def _widths_of(node: fx.Node, search: _Search) -> Iterator[Candidate]:
    """Yield the widths that a constant at this node may come from."""
    plan = search.plan
    shape = plan.dims(node.name)
    last = _alone(shape[-1]) if shape else None
    # Of a value that is made of nothing every dim may be what it averages over: ones(d, 1) / d.
    made = op_of(node).scaling and all(n.op == "call_function" for n in made_of(node))
    for width in filter(None, map(_alone, shape) if made else [last]):
        yield width, width.size, POWERS
    yield from _factors(shape[-1]) if shape else ()
    for factor in filter(None, map(_alone, shape)):
        for width in _widths_holding(factor, plan):
            yield factor, width, ROOTS
    yield from _summed_widths(node, search)
    yield from _inputs_of_weight(node, search)


def _inputs_of_weight(node: fx.Node, search: _Search) -> Iterator[Candidate]:
    """Yield how many inputs each output of a weight sums over: an equalised rate divides by it."""
    weight = next(iter(node.all_input_nodes), node)
    while op_of(weight).picks and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    held = weight.op == "get_attr"
    shape = search.plan.parameters.get(str(weight.target), ()) if held else ()
    nested = [f for dim in shape[1:] for f in dim if isinstance(f, dims.Nested)]
    if len(shape) > 2 and len(nested) == 1:
        yield nested[0], math.prod(map(dims.size, shape[1:])), ROOTS


def _inside_weights(node: fx.Node, search: _Search) -> Iterator[Candidate]:
    """Yield the dims of the weights that a value is made of, and their products: fans."""
    made = made_of(node)
    if any(n.op == "placeholder" for n in made):
        return
    for weight in (n for n in made if n.op == "get_attr"):
        shape = search.plan.parameters.get(str(weight.target), ())
        fixed = math.prod(dims.size(d) for d in shape if not any(map(dims.is_nested, [d])))
        for factor in filter(None, map(_alone, shape)):
            yield factor, factor.size, WHOLE
            yield factor, factor.size * fixed, WHOLE


def _factors(dim: Dim, powers: tuple[float, ...] = ROOTS) -> Iterator[Candidate]:
    """Yield the one width in a product: by its own units where they stand last, and the whole."""
    nested = [f for f in dim if isinstance(f, dims.Nested)]
    if len(nested) == 1 and not any(isinstance(f, dims.Sum) for f in dim):
        if dim[-1] is nested[0]:
            yield nested[0], nested[0].size, powers
        yield nested[0], dims.size(dim), powers


def _summed_widths(node: fx.Node, search: _Search) -> Iterator[Candidate]:
    """Yield the width that a product or a total was taken over, before the constant."""
    before = list(_before(node))
    totals = [(value, POWERS) for value in before if op_of(value).totals]
    products = [(value, ROOTS) for value in node.all_input_nodes if op_of(value).product]
    for value, powers in (*products, *totals):
        factor = next(map(_alone, search.summed.get(value.name, ())[-1:]), None)
        if factor is not None:
            yield factor, factor.size, powers
    for value in filter(_of_activations, before):
        for dim in search.summed.get(value.name, ()):
            yield from _factors(dim)
            factor = _alone(dim)
            if factor is not None:
                yield from ((factor, n, ROOTS) for n in _widths_holding(factor, search.plan))


def _counted_widths(node: fx.Node, search: _Search) -> Iterator[Candidate]:
    """Yield what the products before an integer were summed over: a mean of them divides by it, as
    does the head of muP.
    """
    for value in _before(node):
        for factor in filter(None, map(_alone, search.summed.get(value.name, ()))):
            yield factor, factor.size, (1.0,)


def _alone(dim: Dim) -> dims.Nested | None:
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


def _scaled_widths(node: fx.Node, value: float, search: _Search) -> Iterator[Candidate]:
    """Yield what a product sums over that reads a value, where a constant scales both operands."""
    for product in _products_of(node):
        if all(_scaled_by(operand, value, search) for operand in product.all_input_nodes):
            for dim in search.summed.get(product.name, ()):
                yield from ((factor, width, FOURTH_ROOTS) for factor, width, _ in _factors(dim))


def _products_of(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the products that read a value, rearranged or masked on its way at most."""
    found = reached([node], lambda n: (u for u in n.users if _passes(u)) if n.users else ())
    return (u for n in found for u in n.users if op_of(u).product)


def _scaled_by(node: fx.Node, value: float, search: _Search) -> bool:
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


def _slopes_of(node: fx.Node, search: _Search) -> list[Scalar]:
    """The slopes of ALiBi are base ** (1, 2, ..., heads)."""
    shape = search.plan.dims(node.name)
    value, _ = number_of(node.args[0], search.state)
    factor = _alone(shape[-1]) if shape else None
    if factor is None or not math.isclose(value, 2.0 ** (-8.0 / factor.size), rel_tol=1e-6):
        return []
    source = node.meta.get("source") or ""
    return [Scalar(node.name, "0", value, factor.group, factor.size, 0.0, source, "alibi")]
