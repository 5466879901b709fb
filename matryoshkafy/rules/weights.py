"""Which values stand for weights: parameters, and what is picked or computed from parameters
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from matryoshkafy.graph.nodes import bound_args, is_item, op_key, tensor_info

PICKS = {
    "index",
    "index_select",
    "gather",
    "select",
    "slice",
    "narrow",
    "transpose",
    "t",
    "permute",
    "reshape",
    "view",
    "unsqueeze",
    "squeeze",
    "expand",
    "to",
    "_to_copy",
    "contiguous",
    "clone",
    "chunk",
    "split",
    "split_with_sizes",
    "unbind",
    "numpy_T",
    "mT",
    "flatten",
    "unflatten",
    "movedim",
}


def is_weight(node: fx.Node) -> bool:
    """Tell whether a value is a parameter, picked out of one (experts), or made of parameters
    alone.
    """
    return _is_picked(node) or is_pure(node)


def _is_picked(node: fx.Node) -> bool:
    while (op_key(node) in PICKS or is_item(node)) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr"


def is_pure(node: fx.Node) -> bool:
    """Tell whether a value depends on no input."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        at = queue.pop()
        if at.op == "placeholder":
            return False
        fresh = [n for n in at.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return True


@dataclass(frozen=True)
class Place:
    """Which dims of a weight are outputs of a contraction and which are summed over."""

    outs: tuple[int, ...]
    into: tuple[int, ...]


LINEAR, TRANSPOSED = Place((0,), (1,)), Place((1,), (0,))
LEFT, RIGHT = Place((-2,), (-1,)), Place((-1,), (-2,))
SLOTS = {
    "linear": {"weight": LINEAR},
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), {"weight": LINEAR}),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), {"weight": TRANSPOSED}),
    **dict.fromkeys(("matmul", "mm", "bmm", "_grouped_mm"), {0: LEFT, 1: RIGHT}),
    **dict.fromkeys(("addmm", "baddbmm"), {1: LEFT, 2: RIGHT}),
    **dict.fromkeys(
        (f"{kind}_cell" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
        {"w_ih": LINEAR, "w_hh": LINEAR},
    ),
}


def weight_places(node: fx.Node) -> dict[fx.Node, Place]:
    """Return the weights that a contraction reads, with the place of each of their dims."""
    name, args = op_key(node), bound_args(node)
    if name == "einsum":
        return _einsum_places(node, args)
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return {w: LINEAR for w in args["params"] if len(tensor_info(w).shape) == 2}
    values = list(args.values())
    found = {}
    for slot, place in SLOTS.get(name, {}).items():
        value = args[slot] if isinstance(slot, str) else values[slot]
        if isinstance(value, fx.Node) and is_weight(value):
            found[value] = _positive(place, len(tensor_info(value).shape))
    return found


def _positive(place: Place, rank: int) -> Place:
    """A vector has no output dim: it is summed over whole."""
    if rank == 1:
        return Place((), (0,))
    return Place(tuple(d % rank for d in place.outs), tuple(d % rank for d in place.into))


def _einsum_places(node: fx.Node, args: dict[str, Any]) -> dict[fx.Node, Place]:
    """A letter that leaves is an output, one that does not is summed over."""
    left, _, right = args["equation"].replace(" ", "").partition("->")
    del node
    found = {}
    for subscripts, tensor in zip(left.split(","), args["tensors"], strict=True):
        if "..." not in subscripts and is_weight(tensor):
            outs = tuple(i for i, c in enumerate(subscripts) if c in right)
            into = tuple(i for i, c in enumerate(subscripts) if c not in right)
            found[tensor] = Place(outs, into)
    return found
