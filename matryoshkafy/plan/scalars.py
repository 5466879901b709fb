"""find_scalars(): constants of the graph that were derived from a width, such as sqrt(d_model).

A sliced model of width m must scale by sqrt(m). A constant is taken for derived when it multiplies
or divides a tensor and equals n ** p: n the units of the tensor's last dimension, a nested axis,
and p one of 1/2, -1/2, 1, -1; or n the width that holds the heads of the tensor (heads times units
of a head), or that the product before it was summed over, and p one of 1/2, -1/2. What is found is
reported in the plan and rewritten at each size, unless keep=["scalar:NODE"] holds it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.errors import PlanError
from matryoshkafy.graph.nodes import op_key
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.plan import Plan, Scalar
from matryoshkafy.rules import op_of

POWERS = (0.5, -0.5, 1.0, -1.0)
EXACT = 1e-6
KEEP = "scalar:"
# Products and sums over a last dim: the argument that holds it, and the powers that may follow.
SUMMED: dict[str, tuple[int, tuple[float, ...]]] = {
    **dict.fromkeys(("matmul", "bmm", "mm"), (0, POWERS[:2])),
    "baddbmm": (1, POWERS[:2]),
    "sum": (0, POWERS),
}


def find_scalars(trace: Trace, plan: Plan) -> Plan:
    """Return the plan with its width-derived scalars (sliced nesting only: masked keeps them)."""
    if plan.masked or plan.options.scope == "output":
        return plan
    state = trace.state()
    found = [s for n in trace.graph.nodes for s in _scalars_of(n, plan, state)]
    kept = {s.node for p in _scalar_patterns(plan.options.keep) for s in _matching(found, p)}
    return replace(plan, scalars=tuple(s for s in found if s.node not in kept))


def _scalar_patterns(keep: Sequence[str]) -> list[str]:
    """Return the keep patterns that hold constants: "scalar:mul_3", "scalar:*"."""
    return [p.removeprefix(KEEP) for p in keep if p.startswith(KEEP)]


def _matching(found: Sequence[Scalar], pattern: str) -> list[Scalar]:
    matching = [s for s in found if fnmatch.fnmatch(s.node, pattern)]
    if not matching:
        raise PlanError(
            f"keep={KEEP + pattern!r} matches no constant derived from a width; the constants are "
            f"{[KEEP + s.node for s in found]}"
        )
    return matching


def _scalars_of(node: fx.Node, plan: Plan, state: dict[str, torch.Tensor]) -> list[Scalar]:
    if node.op != "call_function" or len(node.args) != 2:
        return []
    if op_key(node) == "pow":
        return _slopes_of(node, plan, state)
    if not op_of(node).scaling:
        return []
    for index, argument in enumerate(node.args):
        value, tolerance = _constant(argument, state)
        derived = _derivation(value, tolerance, node, plan) if value else None
        if derived:
            group, units, power = derived
            source = node.meta.get("source") or ""
            return [Scalar(node.name, str(index), value, group, units, power, source)]
    return []


def _derivation(
    value: float, tolerance: float, node: fx.Node, plan: Plan
) -> tuple[int, int, float] | None:
    """Return the group, its units, and the power of its width that the value holds."""
    for factor, width, powers in _widths_of(node, plan):
        for power in powers:
            if width > 1 and math.isclose(value, width**power, rel_tol=tolerance):
                return factor.group, factor.size, power
    return None


def _widths_of(node: fx.Node, plan: Plan) -> Iterator[tuple[dims.Nested, int, tuple[float, ...]]]:
    """Yield the widths that a constant at this node may come from."""
    axes = plan.nodes.get(node.name, ())
    alone = [dim[0] if len(dim) == 1 else None for dim in axes]
    if alone and isinstance(alone[-1], dims.Nested):
        yield alone[-1], alone[-1].size, POWERS
    for factor in (f for f in alone if isinstance(f, dims.Nested)):
        for width in _widths_holding(factor, plan):
            yield factor, width, POWERS[:2]
    for factor, powers in _summed_widths(node, plan):
        yield factor, factor.size, powers


def _summed_widths(node: fx.Node, plan: Plan) -> Iterator[tuple[dims.Nested, tuple[float, ...]]]:
    """Yield the width that a product or a sum was taken over, right before the constant."""
    for value in (n for n in node.all_input_nodes if op_key(n) in SUMMED):
        first, powers = SUMMED[op_key(value)]
        source = value.args[first]
        shape = plan.nodes.get(source.name, ()) if isinstance(source, fx.Node) else ()
        over = value.args[1] if op_key(value) == "sum" and len(value.args) > 1 else [-1]
        last = [-1] if over == [len(shape) - 1] else over
        if shape and last == [-1] and len(shape[-1]) == 1 and isinstance(shape[-1][0], dims.Nested):
            yield shape[-1][0], powers


def _widths_holding(heads: dims.Nested, plan: Plan) -> set[int]:
    """Return the widths of parameters that are these heads, times whole units of a head."""
    found = {dim for terms in plan.parameters.values() for dim in terms if heads in dim}
    return {
        dims.size(dim)
        for dim in found
        if len(dim) > 1 and all(isinstance(f, int) for f in dim if f != heads)
    }


def _slopes_of(node: fx.Node, plan: Plan, state: dict[str, torch.Tensor]) -> list[Scalar]:
    """The slopes of ALiBi are base ** (1, 2, ..., heads)."""
    axes = plan.nodes.get(node.name)
    value, _ = _constant(node.args[0], state)
    if not axes or not isinstance(axes[-1][0], dims.Nested) or len(axes[-1]) != 1:
        return []
    factor = axes[-1][0]
    if not math.isclose(value, 2.0 ** (-8.0 / factor.size), rel_tol=1e-6):
        return []
    source = node.meta.get("source") or ""
    return [Scalar(node.name, "0", value, factor.group, factor.size, 0.0, source, "alibi")]


def _constant(argument: Any, state: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return a number and how far off its type may have made it; (0, 0) where it is none.

    It may stand in a tensor of one element that is no parameter and was made from numbers.
    """
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return float(argument), EXACT
    while isinstance(argument, fx.Node) and op_of(argument).casts:
        argument = argument.args[0]
    if isinstance(argument, fx.Node) and op_key(argument) == "full" and argument.args[0] == []:
        return float(argument.args[1]), EXACT  # type: ignore[arg-type]
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return 0.0, 0.0
    tensor = state.get(str(argument.target))
    scalar = tensor is not None and tensor.numel() == 1 and not tensor.requires_grad
    if not scalar or tensor is None or tensor.is_meta or not tensor.is_floating_point():
        return 0.0, 0.0
    return float(tensor), max(EXACT, torch.finfo(tensor.dtype).eps)
