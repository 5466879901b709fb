"""written_back(): the base of a view with a new value where the view is, for every kind of view."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from matryoshkafy.graph.nodes import (
    Argument,
    TensorInfo,
    bound_args,
    info_of,
    is_item,
    is_tensor,
    op_key,
    reached,
    set_info,
    tensor_info,
)

aten = torch.ops.aten
Target = Callable[..., object]


def keeping_gradient(graph: fx.Graph, base: fx.Node, value: fx.Node) -> fx.Node:
    """Return the value with the gradient of the base: what x.data or no_grad wrote, autograd did
    not see. base - base.detach() is exactly zero, but where the base is infinite: what has no
    gradient, as all that is made under no_grad, is not asked for any.
    """
    if not tensor_info(base).dtype.is_floating_point:
        return value
    asked = _has_gradient(base, value)
    with graph.inserting_before(value.next):
        made = [call(graph, aten.detach.default, value)]
        if asked:
            still = call(graph, aten.detach.default, base)
            zero = call(graph, aten.sub.Tensor, base, still)
            made += [still, zero, call(graph, aten.add.Tensor, made[0], zero)]
    for node in made:
        node.meta = dict(value.meta)
        set_info(node, tensor_info(base))
    return made[-1]


def _has_gradient(node: fx.Node, value: fx.Node) -> bool:
    """Tell whether a float that comes into the graph stands behind a node, detached nowhere, nor
    wherever the node is read; views, and what was written before, are read through others.
    """
    written = any(n.meta.get("written") is node for n in node.graph.nodes if n is not value)
    own = not written and op_key(node) not in INVERSES and not is_item(node)
    if own and all(op_key(user) == "detach" for user in node.users):
        return False
    behind = reached([node], lambda n: () if op_key(n) == "detach" else n.all_input_nodes)
    held = (n for n in behind if n.op in ("placeholder", "get_attr") and is_tensor(n))
    return any(tensor_info(n).dtype.is_floating_point for n in held)


def written_back(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    """Return the base with a new value where the view is."""
    if is_item(view):
        pieces = view.all_input_nodes[0]
        at = cast("int", view.args[1])
        return PIECES[op_key(pieces)](graph, pieces, base, value, at)
    if op_key(view) == "detach":
        return keeping_gradient(graph, base, value)
    return INVERSES.get(op_key(view), _same)(graph, view, base, value)


def call(graph: fx.Graph, target: Target, *args: Argument) -> fx.Node:
    """Return a new node that calls an operator."""
    return graph.call_function(target, args)


def aten_op(node: fx.Node) -> Target:
    """Return the operator that a node calls."""
    assert not isinstance(node.target, str), f"{node} calls nothing"
    return node.target


def _scattered(
    graph: fx.Graph, target: Target, base: fx.Node, value: fx.Node, where: tuple[Any, ...]
) -> fx.Node:
    """Call a scatter along a dim, the first of `where`; torch differentiates them for real numbers
    alone.
    """
    dim, *rest = where
    if not tensor_info(base).dtype.is_complex:
        return call(graph, target, base, value, dim, *rest)
    dim %= len(tensor_info(base).shape)
    parts = [call(graph, aten.view_as_real.default, part) for part in (base, value)]
    for part, whole in zip(parts, (base, value), strict=True):
        info = tensor_info(whole)
        set_info(part, TensorInfo((*info.shape, 2), info.dtype.to_real()))
    real = call(graph, target, *parts, dim, *rest)
    set_info(real, info_of(parts[0]))
    return call(graph, aten.view_as_complex.default, real)


def _slice(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    a = bound_args(view)
    run = (a["dim"], a["start"], a["end"], a["step"])
    return _scattered(graph, aten.slice_scatter.default, base, value, run)


def _narrowed(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    a = bound_args(view)
    run = (a["dim"], a["start"], _sum(graph, a["start"], a["length"]))
    return _scattered(graph, aten.slice_scatter.default, base, value, run)


def _select(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    a = bound_args(view)
    return _scattered(graph, aten.select_scatter.default, base, value, (a["dim"], a["index"]))


def _real(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    del view
    other = call(graph, aten.imag.default, base)
    set_info(other, tensor_info(value))
    return call(graph, aten.complex.default, value, other)


def _imag(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    del view
    other = call(graph, aten.real.default, base)
    set_info(other, tensor_info(value))
    return call(graph, aten.complex.default, other, value)


def _permuted(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    del base
    order = cast("Sequence[int]", view.args[1])
    dims = [d % len(order) for d in order]
    return call(graph, aten.permute.default, value, [dims.index(i) for i in range(len(dims))])


def _same(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    del view, base
    return call(graph, aten.alias.default, value)


OPAQUE = ("as_strided", "unfold")
RESHAPES = ("view", "reshape", "unsqueeze", "squeeze", "flatten", "ravel", "unflatten", "view_as",
            "reshape_as", "expand", "expand_as", "broadcast_to", "atleast_1d", "atleast_2d",
            "atleast_3d")  # fmt: skip
SELF_INVERSE = ("transpose", "t", "swapaxes", "swapdims", "mT", "mH", "numpy_T", "matrix_H",
                "adjoint")  # fmt: skip
Inverse = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node], fx.Node]
INVERSES: Mapping[str, Inverse] = {
    "slice": _slice,
    "select": _select,
    "narrow": _narrowed,
    "real": _real,
    "imag": _imag,
    "diagonal": lambda graph, view, base, value: call(
        graph, aten.diagonal_scatter.default, base, value, *view.args[1:]
    ),
    "permute": _permuted,
    **dict.fromkeys(
        ("movedim", "moveaxis"),
        lambda graph, view, _, value: call(graph, aten_op(view), value, *view.args[2:0:-1]),
    ),
    "view_as_real": lambda graph, _, base, value: call(graph, aten.view_as_complex.default, value),
    "view_as_complex": lambda graph, _, base, value: call(graph, aten.view_as_real.default, value),
    **dict.fromkeys(
        RESHAPES, lambda graph, _, base, value: call(graph, aten.reshape_as.default, value, base)
    ),
    **dict.fromkeys(
        SELF_INVERSE,
        lambda graph, view, _, value: call(graph, aten_op(view), value, *view.args[1:]),
    ),
    **dict.fromkeys(("alias", "detach", "to", "contiguous", "lift_fresh"), _same),
}


Sum = int | fx.Node  # a bound of a slice may be computed by the graph


def _piece_unbound(
    graph: fx.Graph, pieces: fx.Node, base: fx.Node, value: fx.Node, at: int
) -> fx.Node:
    where = (bound_args(pieces)["dim"], at)
    return _scattered(graph, aten.select_scatter.default, base, value, where)


def _piece_split(
    graph: fx.Graph, pieces: fx.Node, base: fx.Node, value: fx.Node, at: int
) -> fx.Node:
    a = bound_args(pieces)
    given: Any = a.get("split_sizes", a.get("split_size"))
    if given is None:  # chunk, tensor_split: the sizes of the example
        infos = cast("tuple[TensorInfo, ...]", info_of(pieces))
        given = [piece.shape[a["dim"]] for piece in infos]
    several = not isinstance(given, (int, fx.Node))
    sizes = cast("list[Sum]", list(given) if several else [given] * (at + 1))
    start: Sum = 0
    for size in sizes[:at]:
        start = _sum(graph, start, size)
    run = (a["dim"], start, _sum(graph, start, sizes[at]))
    return _scattered(graph, aten.slice_scatter.default, base, value, run)


def _sum(graph: fx.Graph, a: Sum, b: Sum) -> Sum:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    total = graph.call_function(operator.add, (a, b))
    known = [info_of(n) if isinstance(n, fx.Node) else n for n in (a, b)]
    set_info(total, sum(cast("list[int]", known)))
    return total


Piece = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node, int], fx.Node]
PIECES: Mapping[str, Piece] = {
    "unbind": _piece_unbound,
    "split": _piece_split,
    "split_with_sizes": _piece_split,
    "chunk": _piece_split,
    "tensor_split": _piece_split,
}
