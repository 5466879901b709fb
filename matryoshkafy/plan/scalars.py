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
another formula (plan/by_formula.py): sqrt(3 * n), n * log(2 * pi); beside a gain, which is a weight
that multiplies a product, n is also what that product sums over. A number that the user's code
holds as such (x * 0.25, a default of 0.25, that of a class or a configuration), or computes of
something else (sqrt(2 * layers)), is none of these. What is found is reported in the plan and
rewritten at each size, unless keep=["scalar:model.py:31"], the line that the plan prints, holds it.
"""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx
from torch.fx.node import Target

from matryoshkafy.axes import dims
from matryoshkafy.errors import PlanError
from matryoshkafy.graph.formulas import attributes_of, expressions_of, formulas_of
from matryoshkafy.graph.literals import computed, written_out
from matryoshkafy.graph.nodes import bound_args, is_op, reached, source_of
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.by_formula import (
    clamped,
    elsewhere,
    explained,
    names_none,
    of_other_name,
    of_quotient,
)
from matryoshkafy.plan.kept_numbers import kept_numbers
from matryoshkafy.plan.near_widths import (
    Search,
    Summed,
    all_widths,
    alone,
    asked_widths,
    derived,
    takes_number,
    whole_widths,
    width_in,
    widths_within,
)
from matryoshkafy.plan.numbers import EXACT, number_of
from matryoshkafy.plan.plan import Plan, Scalar
from matryoshkafy.rules import op_of

ARITHMETIC: set[Target] = {operator.mul, operator.truediv}  # pyright: ignore[reportUnknownMemberType]
KEEP = "scalar:"


def find_scalars(trace: Trace, plan: Plan, summed: Summed) -> Plan:
    """Return the plan with its width-derived scalars (sliced nesting only: masked keeps them).

    Args:
        trace: the traced model.
        plan: its plan.
        summed: {node: the dims that it sums products or values over}.
    """
    if plan.masked or plan.options.scope == "output":
        return plan
    search = Search(trace.graph, plan, trace.state(), summed, _whole_numbers(trace.graph))
    nodes = trace.graph.nodes
    found = [s for n in nodes for s in (*_scalars_of(n, search), *_counts_in(n, search))]
    patterns = [p.removeprefix(KEEP) for p in plan.options.keep if p.startswith(KEEP)]
    kept = {s.node for p in patterns for s in _matching(found, p)}
    scalars = tuple(s for s in found if s.node not in kept)
    known = {s.node for s in found}
    remarks = (r for n in nodes if n.name not in known for r in kept_numbers(n, search))
    return replace(plan, scalars=scalars, remarks=tuple(dict.fromkeys((*plan.remarks, *remarks))))


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


def _scalars_of(node: fx.Node, search: Search) -> list[Scalar]:
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
    places = enumerate(node.args) if takes_number(node) else ()
    found = (_operand_of(node, index, argument, search) for index, argument in places)
    return list(filter(None, found))[:1]


def _in_sizes(node: fx.Node, search: Search) -> list[Scalar]:
    """A number beside a size of the call, where a tensor is scaled by both: sqrt(d) * length."""
    users = reached([node], lambda n: (u for u in n.users if n is node or n.target in ARITHMETIC))
    scaled = next((n for n in node.graph.nodes if n in users and op_of(n).scaling), None)
    if scaled is None:
        return []
    for index, number in enumerate(node.args):
        if isinstance(number, float) and computed(node, [number]):
            found = width_in(scaled, (number, EXACT), False, search)
            if found:
                return [_scalar(node, str(index), number, found)]
    return []


def _operand_of(node: fx.Node, index: int, argument: object, search: Search) -> Scalar | None:
    """Return the constant that an operand is, where it was derived from a width."""
    constant = number_of(argument, search.state)
    whole = type(argument) is int
    rounds = whole and len(search.whole.get((source_of(node) or node.name, node.target), ())) > 1
    if not constant[0] or rounds:
        return None
    found = width_in(node, constant, whole, search) if op_of(node).scaling else None
    if found and not written_out(node, constant[0]) and not _elsewhere(node, constant, search):
        return _scalar(node, str(index), constant[0], found)
    less = derived((constant[0] + 1, EXACT), whole_widths(node, search)) if whole else None
    if op_of(node).scaling and less and not written_out(node, constant[0]):
        return replace(_scalar(node, str(index), constant[0], (less[0], 1.0)), offset=-1.0)
    return _by_formula(node, str(index), constant, search)


def _elsewhere(node: fx.Node, constant: tuple[float, float], search: Search) -> bool:
    """Tell whether a line computes a constant of something else than the width that it equals."""
    formulas = formulas_of(node)
    if elsewhere(formulas, constant, search.weight_sizes):
        return True
    widths = all_widths(node, search)
    if explained([f for f in formulas if not names_none(f)], constant, widths):
        return False
    named = of_other_name(expressions_of(node), constant, search.group_sizes)
    hidden = clamped(formulas, constant, search.group_sizes) or of_quotient(attributes_of(node))
    return named or hidden


def _by_formula(
    node: fx.Node, name: str, constant: tuple[float, float], search: Search
) -> Scalar | None:
    """Return the constant where its line computes it of a width, whatever the formula."""
    # 1 scales nothing, and is the quotient of any two equal sizes.
    asked = constant[0] != 1 and computed(node, [constant[0]])
    formulas = [f for f in formulas_of(node) if asked and not names_none(f)]
    widths = all_widths(node, search) if formulas else ()
    asks = ((f, asked_widths(node, f, constant[0], search)) for f in formulas)
    found = explained(formulas, constant, widths)
    found = found or next(filter(None, (explained([f], constant, w) for f, w in asks)), None)
    if found is None:
        return None
    scalar = _scalar(node, name, constant[0], (found.width, found.power))
    return replace(scalar, offset=found.offset)


def _counts_in(node: fx.Node, search: Search) -> Iterator[Scalar]:
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


def _factors_of(node: fx.Node, search: Search) -> list[Scalar]:
    """An argument that multiplies the sums of a product (the scale of attention, alpha), or one of
    the operands of a sum.
    """
    name = op_of(node).factor
    argument = bound_args(node).get(name)
    constant = number_of(argument, search.state)
    if op_of(node).product or op_of(node).attends:
        found = derived(constant, widths_within(node, search))
    elif not computed(node, [constant[0]]):
        return []  # where the line is not known, a half that fills a tensor is a half
    else:
        found = width_in(node, constant, type(argument) is int, search)
    if found and not _elsewhere(node, constant, search):
        return [_scalar(node, name, constant[0], found)]
    by_formula = _by_formula(node, name, constant, search) if constant[0] else None
    return [by_formula] if by_formula else []


def _scalar(node: fx.Node, name: str, value: float, found: tuple[dims.Nested, float]) -> Scalar:
    factor, power = found
    source = node.meta.get("source") or ""
    return Scalar(node.name, name, value, factor.group, factor.size, power, source)


def _slopes_of(node: fx.Node, search: Search) -> list[Scalar]:
    """The slopes of ALiBi are base ** (1, 2, ..., heads)."""
    shape = search.plan.dims(node.name)
    value, _ = number_of(node.args[0], search.state)
    factor = alone(shape[-1]) if shape else None
    if factor is None or not math.isclose(value, 2.0 ** (-8.0 / factor.size), rel_tol=1e-6):
        return []
    source = node.meta.get("source") or ""
    return [Scalar(node.name, "0", value, factor.group, factor.size, 0.0, source, "alibi")]
