"""What masked nesting writes at a node: a row per action."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.nodes import bound_args, gives_several, tensor_info
from matryoshkafy.plan.plan import Action, Plan, Shape
from matryoshkafy.rewrite.blocks import write_blocks
from matryoshkafy.rewrite.resize import resize
from matryoshkafy.rewrite.writer import Actions, Rewriter, nested
from matryoshkafy.rules.table import op_of, reduced_dims
from matryoshkafy.rules.weights import Place, weight_places

aten = torch.ops.aten


def _plain(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    del action
    return writer.copy(node, level)


def _clamp(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    """Every operand keeps the smallest size of the axes that are summed here.

    Values of an attention are not summed over their features, though they may share the group.
    """
    spared = bound_args(node)["value"] if op_of(node).attends else None
    summed = reduced_dims(node)
    groups = set(action.groups)
    ladder = list(writer.plan.ladder[level])
    smallest = [w if i in groups else ladder[i] for i, w in enumerate(writer.plan.ladder[0])]

    def narrowed(value: fx.Node) -> Any:
        new = writer.written[writer.key(value, level)]
        shape = writer.plan.dims(value.name)
        if gives_several(value) or not isinstance(new, fx.Node) or value is spared:
            return new
        for i, dim in enumerate(shape):
            if groups & set(dims.groups_of(dim)) and (summed is None or i in summed):
                new = writer.narrow(new, i, dim, (tuple(ladder), tuple(smallest)))
        return new

    args, kwargs = fx.map_arg((node.args, node.kwargs), narrowed)
    new = writer.call(node, node.target, args, kwargs)
    resize(writer.plan, tuple(smallest), node, new)
    return new


def _mask(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    """A contraction with a parameter: fast nested operators where they exist, masked weights
    else.
    """
    masked = writer.plan.masks.get(node.name, {})
    # Zeros that stand in the stored weight need no mask: a slice runs torch's own operator.
    if writer.standalone and all(
        _has_zeros(n, writer.plan) for n in node.all_input_nodes if n.name in masked
    ):
        return writer.copy(node, level)
    fast = FAST.get(op_of(node).nested)
    new = fast(writer, node, level) if fast else None
    return new if new is not None else _mask_weights(writer, node, level, action)


def _has_zeros(weight: fx.Node, plan: Plan) -> bool:
    """Tell whether a sub-model stores a weight with its zeros written out."""
    kept = plan.stored.get(str(weight.target)) if weight.op == "get_attr" else None
    return kept is not None and kept.mask is not None


def _mask_weights(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    masks = writer.plan.masks.get(node.name, {})

    def masked(value: fx.Node) -> Any:
        new = writer.written[writer.key(value, level)]
        shape = writer.plan.dims(value.name)
        for mask in masks.get(value.name, ()):
            runs = [writer.runs(shape[d], level) for d in (mask.out, mask.into)]
            new = writer.graph.call_function(nested.mask.default, (new, mask.out, mask.into, *runs))
        return new

    del action
    args, kwargs = fx.map_arg((node.args, node.kwargs), masked)
    new = writer.call(node, node.target, args, kwargs)
    resize(writer.plan, writer.plan.ladder[level], node, new)
    return new


def _fast_linear(writer: Rewriter, node: fx.Node, level: int) -> fx.Node | None:
    shape = writer.plan.dims(bound_args(node)["weight"].name)
    if len(shape) != 2:
        return None
    new = writer.given(node, level)
    return _linear(writer, node, (new["input"], new["weight"], new["bias"]), (shape, level))


def _linear(
    writer: Rewriter, node: fx.Node, operands: tuple[Any, Any, Any], place: tuple[Shape, int]
) -> fx.Node:
    shape, level = place
    runs = [writer.runs(d, level) for d in shape]
    return writer.call(node, nested.linear.default, (*operands, *runs))


def _fast_product(writer: Rewriter, node: fx.Node, level: int) -> fx.Node | None:
    """x @ W (and bias + x @ W): the weight turned is the weight of a linear."""
    a = bound_args(node)
    biased = "beta" in a
    x, weight = list(a)[1:3] if biased else list(a)[:2]
    shape = writer.plan.dims(a[weight].name)
    if len(shape) != 2 or a[weight].name not in writer.plan.masks.get(node.name, {}):
        return None
    if biased and ((a["beta"], a["alpha"]) != (1, 1) or len(writer.plan.dims(a["self"].name)) != 1):
        return None
    new = writer.given(node, level)
    # A view: the kernel reads the weight through its strides, so nothing is copied.
    turned = writer.graph.call_function(aten.t.default, (new[weight],))
    bias = new["self"] if biased else None
    return _linear(writer, node, (new[x], turned, bias), (shape[::-1], level))


def _fast_conv(writer: Rewriter, node: fx.Node, level: int) -> fx.Node | None:
    a = bound_args(node)
    shape = writer.plan.dims(a["weight"].name)
    spans = any(dims.is_nested(d) for d in shape[2:])
    if isinstance(a["padding"], str) or a["groups"] != 1 or spans:
        return None
    transposed = weight_places(node)[a["weight"]] == Place((1,), (0,))
    rank = len(shape) - 2
    out, into = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    new = writer.given(node, level)
    geometry = (
        _spread(a["stride"], rank),
        _spread(a["padding"], rank),
        _spread(a["dilation"], rank),
        transposed,
        _spread(a.get("output_padding", 0), rank),
        1,
    )
    runs = [writer.runs(d, level) for d in (out, into)]
    args = (new["input"], new["weight"], new["bias"], *geometry, *runs)
    return writer.call(node, nested.conv.default, args)


def _spread(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


FAST: Mapping[str, Callable[[Rewriter, fx.Node, int], fx.Node | None]] = {
    "linear": _fast_linear,
    "product": _fast_product,
    "conv": _fast_conv,
}


@dataclass(frozen=True)
class _Norm:
    """A norm layer with statistics per level: operator, dim of its units, what is learned."""

    target: Any
    dim: int
    affine: tuple[str, ...]


NORMS: Mapping[str, _Norm] = {
    "layer_norm": _Norm(nested.layer_norm.default, -1, ("weight", "bias")),
    "rms_norm": _Norm(nested.rms_norm.default, -1, ("weight",)),
    "group_norm": _Norm(nested.group_norm.default, 1, ("weight", "bias")),
}


def _norm(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    """Statistics of each unit's own level, or of its prefix."""
    del action
    a, norm = bound_args(node), NORMS[op_of(node).nested]
    new = writer.given(node, level)
    tensors = [new[name] for name in ("input", *norm.affine)]
    eps = a["eps"] if a["eps"] is not None else torch.finfo(tensor_info(node).dtype).eps
    runs = writer.runs(writer.plan.dims(a["input"].name)[norm.dim], level)
    prefix = writer.plan.options.norm == "prefix"
    args = (*tensors, eps, runs, prefix)
    return writer.call(node, norm.target, args)


def _level(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    """A statistic over a nested axis, kept at full length: each unit has its own level's."""
    del action
    a = bound_args(node)
    source: Any = node.args[0]
    shape = writer.plan.dims(source.name)
    over = [d % len(shape) for d in ([a["dim"]] if isinstance(a["dim"], int) else a["dim"])]
    dim = next(d for d in over if dims.is_nested(shape[d]))
    biased = a.get("correction") == 0 or a.get("unbiased") is False
    kind = op_of(node).statistic + ("0" if biased else "")
    args = (
        writer.written[writer.key(source, level)],
        over,
        dim,
        writer.runs(shape[dim], level),
        kind,
        writer.plan.options.norm == "prefix",
    )
    return writer.call(node, nested.level_reduce.default, args)


ACTIONS: Actions = {
    "mask": _mask,
    "norm": _norm,
    "level": _level,
    "clamp": _clamp,
    "readout": _plain,
    "inner": _plain,
    "blocks": write_blocks,
}
