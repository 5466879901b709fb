"""find_scalars(): constants of the graph that were derived from a width, such as sqrt(d_model).

A sliced model of width m must scale by sqrt(m). A constant is taken for derived when it
multiplies or
divides a tensor whose last dimension is a nested axis of n units and equals n ** p for p in
1/2, -1/2, 1, -1; what is found is reported in the plan and rewritten at each size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from matryoshkafy import dims
from matryoshkafy.cleaning import op_name
from matryoshkafy.plan import Plan, Scalar
from matryoshkafy.tracing import Trace

POWERS = (0.5, -0.5, 1.0, -1.0)
SCALING = {"mul", "div", "true_divide", "multiply", "divide"}


def find_scalars(trace: Trace, plan: Plan) -> Plan:
    """Return the plan with its width-derived scalars (sliced nesting only: masked keeps them)."""
    if plan.masked or plan.options.scope == "output":
        return plan
    state = trace.state()
    found = [s for n in trace.graph.nodes for s in _scalars_of(n, plan, state)]
    kept = plan.options.keep
    return replace(plan, scalars=tuple(s for s in found if s.node not in kept))


def _scalars_of(node: fx.Node, plan: Plan, state: dict[str, torch.Tensor]) -> list[Scalar]:
    if node.op != "call_function" or len(node.args) != 2:
        return []
    if op_name(node) == "pow":
        return _slopes_of(node, plan, state)
    if op_name(node) not in SCALING:
        return []
    axes = plan.nodes.get(node.name)
    if not axes or len(axes[-1]) != 1 or not isinstance(axes[-1][0], dims.Nested):
        return []
    factor = axes[-1][0]
    for index, argument in enumerate(node.args):
        value = _constant(argument, state)
        power = None if value is None else _power(value, factor.size)
        if power is not None:
            source = node.meta.get("source") or ""
            return [
                Scalar(
                    node.name,
                    str(index),
                    float(value or 0),
                    factor.group,
                    factor.size,
                    power,
                    source,
                )
            ]
    return []


def _slopes_of(node: fx.Node, plan: Plan, state: dict[str, torch.Tensor]) -> list[Scalar]:
    """The slopes of ALiBi are base ** (1, 2, ..., heads)."""
    axes = plan.nodes.get(node.name)
    value = _constant(node.args[0], state)
    if not axes or value is None or not isinstance(axes[-1][0], dims.Nested) or len(axes[-1]) != 1:
        return []
    factor = axes[-1][0]
    if not math.isclose(value, 2.0 ** (-8.0 / factor.size), rel_tol=1e-6):
        return []
    source = node.meta.get("source") or ""
    return [Scalar(node.name, "0", value, factor.group, factor.size, 0.0, source, "alibi")]


def _constant(argument: Any, state: dict[str, torch.Tensor]) -> float | None:
    """A number, or a tensor of one element that is no parameter and was made from numbers."""
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return float(argument)
    if isinstance(argument, fx.Node) and op_name(argument) in ("to", "_to_copy"):
        argument = argument.args[0]
    if isinstance(argument, fx.Node) and op_name(argument) == "full" and argument.args[0] == []:
        return float(argument.args[1])  # type: ignore[arg-type]
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    tensor = state.get(str(argument.target))
    scalar = tensor is not None and tensor.numel() == 1 and not tensor.requires_grad
    if not scalar or tensor is None or tensor.is_meta or not tensor.is_floating_point():
        return None
    return float(tensor)


def _power(value: float, n: int) -> float | None:
    """Half precision keeps three digits of such a constant, so it may be that far off."""
    if n < 2:
        return None
    return next((p for p in POWERS if math.isclose(value, n**p, rel_tol=1e-6)), None)
