"""number_of(): the one number that an argument of a node holds, whatever it is written as;
output_remarks(): outputs that are numbers of a width, or made of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import Argument

from matryoshkafy.graph.nodes import (
    bound_args,
    is_op,
    is_tensor,
    outputs_of,
    tensor_info,
)
from matryoshkafy.graph.trace import Trace
from matryoshkafy.rules import op_of
from matryoshkafy.rules.weights import made_of

EXACT = 1e-6
FEW = 16
POWERS = (0.5, -0.5, 1.0, -1.0)


def number_of(argument: Any, state: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Return a number and how far off its type may have made it; (0, 0) where it is none.

    It may stand in a tensor of one element that is no parameter and was made from numbers.
    """
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return float(argument), EXACT
    while isinstance(argument, fx.Node) and op_of(argument).casts:
        argument = argument.args[0]
    if isinstance(argument, fx.Node) and op_of(argument).uniform:
        filled = bound_args(argument).get("fill_value")
        if tensor_info(argument).shape == () and isinstance(filled, (int, float)):
            return float(filled), EXACT
    # Or the graph computes it of such numbers: torch.sqrt(torch.tensor(width)).
    value = _run(argument, state) if isinstance(argument, fx.Node) else None
    return (0.0, 0.0) if value is None or not value.is_floating_point() else number_in(value)


def number_in(tensor: torch.Tensor) -> tuple[float, float]:
    """Return the one number of a tensor, and how far off its type may have made it."""
    eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
    return float(tensor), max(EXACT, eps)


def number_held(node: fx.Node, state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the tensor of one number that a node reads and nobody trains; None of any other."""
    tensor = state.get(str(node.target)) if node.op == "get_attr" else None
    held = tensor is not None and tensor.numel() == 1 and not tensor.requires_grad
    return tensor if held and tensor is not None and not tensor.is_meta else None


def _small(argument: object, state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return a constant of a few numbers: torch.tensor(x.shape)."""
    held = state.get(str(argument.target)) if isinstance(argument, fx.Node) else None
    few = held is not None and held.numel() <= FEW and not (held.is_meta or held.requires_grad)
    return held if few else None


def _run(node: fx.Node, state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the one number that a node holds, None where it is not known."""
    if node.op == "get_attr":
        return number_held(node, state)
    if op_of(node).casts and node.all_input_nodes:
        return _run(node.all_input_nodes[0], state)
    if op_of(node).picks and all(type(a) is int for a in node.args[1:]) and len(node.args) > 1:
        held = _small(node.args[0], state)
        picked = None if held is None else cast("Any", node.target)(held, *node.args[1:])
        return picked if isinstance(picked, torch.Tensor) and picked.numel() == 1 else None
    single = is_op(node) and op_of(node).elementwise and math.prod(tensor_info(node).shape) == 1
    values = {n: _run(n, state) for n in node.all_input_nodes} if single else {}
    if not values or not callable(node.target) or any(v is None for v in values.values()):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: cast("Argument", values[n]))
    return node.target(*args, **kwargs)


def output_remarks(trace: Trace, widths: Collection[int]) -> Iterator[str]:
    """Say which outputs are a width, a root or an inverse of it, or constants of its shape: what a
    forward returns beside its values (h.shape[-1], torch.ones(h.shape)) is the same at every size.
    """
    state = trace.state()
    for place, output in enumerate(outputs_of(trace.graph)):
        held = list(_numbers_in(output, state))
        of = [w for w in widths for n in held if any(math.isclose(n, w**p) for p in POWERS)]
        if of:
            yield (
                f"full width: output {place} of the flat ones is a constant that holds the width "
                f"{of[0]}, or comes of it, and is the same at every size"
            )


def _numbers_in(output: Argument, state: Mapping[str, torch.Tensor]) -> Iterator[float]:
    """Yield the number that an output is, or the sizes of a tensor that is made of nothing."""
    if not is_tensor(output):
        yield from [float(output)] if isinstance(output, (int, float)) else []
        return
    held = number_held(output, state)
    yield from [float(held)] if held is not None else []
    if all(n.op == "call_function" for n in made_of(output)):
        yield from map(float, tensor_info(output).shape)
