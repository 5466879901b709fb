"""The last linear of a model: how it is found in a graph, and the graph of what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.nodes import bound_args, is_op, is_tensor, outputs_of, reached, tensor_info
from matryoshkafy.graph.trace import Trace
from matryoshkafy.outputs import scores_of
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.actions import ACTIONS
from matryoshkafy.rewrite.codegen import CallCodeGen
from matryoshkafy.rewrite.writer import Rewriter
from matryoshkafy.rules import op_of


@dataclass(frozen=True)
class Factor:
    """A node that scales the product by a value or number.

    `divides`: it divides; `of_bias`: the bias is scaled, too.
    """

    node: str
    value: fx.Node | float
    divides: bool
    of_bias: bool


@dataclass(frozen=True)
class LastLinear:
    """scores = factors * (hidden @ table' + bias), where the scores are output number `position`.

    Attributes:
        turned: the table stands as [D, V] in the graph.
        bias: what is added, a value of [V]; None where nothing is.
        factors: what the product is multiplied or divided by.
        chain: the nodes from the scores back to the product.
        alone: the product is the scores, and the scores are the only output.
    """

    position: int
    product: fx.Node
    hidden: fx.Node
    table: fx.Node
    turned: bool
    bias: fx.Node | None
    factors: tuple[Factor, ...]
    chain: tuple[fx.Node, ...]
    alone: bool

    @property
    def values(self) -> list[fx.Node | None]:
        """What the graph computes: hidden, table, bias, and each factor that is no number."""
        named = [f.value for f in self.factors if isinstance(f.value, fx.Node)]
        return [self.hidden, self.table, self.bias, *named]

    def scales(self, tensors: list[Any], plan: Plan, level: int) -> tuple[Any, Any]:
        """Return the factor of the product and that of the bias at a level of a plan.

        tensors: what the factors that are no numbers hold. A constant that was derived from a
        width is the one of this level.
        """
        widths = plan.ladder[level]
        derived = {s.node: s.at(widths[s.group]) for s in plan.scalars}
        given, scale, of_bias = iter(tensors), 1.0, 1.0
        for factor in self.factors:
            known = isinstance(factor.value, fx.Node)
            number: Any = next(given).reshape(()) if known else factor.value
            number = derived.get(factor.node, number)
            number = 1 / number if factor.divides else number
            scale, of_bias = scale * number, of_bias * number if factor.of_bias else of_bias
        return scale, of_bias


def last_linear(trace: Trace, plan: Plan) -> LastLinear | None:
    """Return the last linear that the scores are, where the whole tail of the scores is one."""
    flat = outputs_of(trace.graph)
    position = scores_of(trace.signature.unflatten(list(range(len(flat)))))
    scores = flat[position] if isinstance(position, int) else None
    if not isinstance(position, int) or not isinstance(scores, fx.Node):
        return None
    found = _unwound(position, scores, alone=len(flat) == 1)
    return found if found is not None and _is_plain(found, plan) else None


def readout_graph(trace: Trace, plan: Plan, found: LastLinear, level: int) -> fx.Graph:
    """Return the graph of the last linear's operands at a level, as one flat list."""
    writer = Rewriter(trace, plan, ACTIONS)
    graph = writer.finish_values(found.values, level)
    graph.set_codegen(CallCodeGen(trace.signature, flat=True))
    return graph


def inner_width(plan: Plan, found: LastLinear, level: int) -> int:
    """Return how many units of the hidden value the scores of a level read."""
    return dims.size_at(plan.dims(found.hidden.name)[-1], plan.ladder[level])


def _unwound(position: int, node: fx.Node, *, alone: bool) -> LastLinear | None:
    """Walk from the scores through factors and one bias to the product."""
    chain: list[fx.Node] = []
    factors: list[Factor] = []
    bias: fx.Node | None = None
    while not _is_product(node):
        pair = _operands(node)
        if pair is None:
            return None
        inner, other = pair
        if op_of(node).algebra == "add":
            if bias is not None or not isinstance(other, fx.Node):
                return None
            bias = other
        else:
            divides = op_of(node).algebra == "divide"
            factors.append(Factor(node.name, other, divides, bias is None))
        chain.append(node)
        node = inner
    own = bound_args(node).get("bias")
    if own is not None and bias is not None:
        return None
    hidden, table = node.args[:2]
    turned = op_of(node).product
    if not isinstance(hidden, fx.Node) or not isinstance(table, fx.Node):
        return None
    return LastLinear(
        position=position,
        product=node,
        hidden=hidden,
        table=table,
        turned=turned,
        bias=bias or own,
        factors=tuple(factors[::-1]),
        chain=(*chain, node),
        alone=alone and not chain,
    )


def _is_product(node: fx.Node) -> bool:
    """Whether a node is hidden @ table, in this order and with nothing but a bias added."""
    reads = op_of(node).reads
    return reads is not None and reads[1] == -1 and next(iter(bound_args(node))) == reads[0]


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node | float] | None:
    """Return the scores that an add, mul or div goes on with, and its bias or factor."""
    if op_of(node).algebra not in ("add", "multiply", "divide") or not is_op(node):
        return None
    given = bound_args(node)
    if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
        return None
    one, other = given["self"], given["other"]
    if isinstance(one, fx.Node) and _is_small(node, other):
        return one, other
    turned = op_of(node).algebra != "divide" and isinstance(other, fx.Node) and _is_small(node, one)
    return (other, one) if turned else None


def _is_small(node: fx.Node, value: object) -> bool:
    """Whether a value is a factor (one number) or, in an addition, a bias (one number a class)."""
    if not isinstance(value, fx.Node):
        return op_of(node).algebra != "add" and isinstance(value, (int, float))
    if not is_tensor(value):
        return False
    shape, whole = tensor_info(value).shape, tensor_info(node).shape
    if op_of(node).algebra == "add":
        return bool(shape) and prod(shape) == shape[-1] == whole[-1] and whole[-1] > 1
    return prod(shape) == 1


def _is_plain(found: LastLinear, plan: Plan) -> bool:
    """Whether product and chain are all that is computed per size, over a plain table."""
    hidden, table = plan.dims(found.hidden.name), plan.dims(found.table.name)
    if len(table) != 2 or not hidden or any(map(dims.is_nested, hidden[:-1])):
        return False
    if not plan.masked:
        return True
    # What else stands in the tail would have to be computed once per size before the product.
    inner, rows = hidden[-1], table[1 if found.turned else 0]
    nested = isinstance(inner[0], dims.Nested) and not dims.is_nested(rows)
    tail = reached(found.chain[:1], lambda n: (m for m in n.all_input_nodes if m.name in plan.tail))
    return nested and {n for n in tail if n.name in plan.tail} == set(found.chain)
