"""Which values stand for weights: parameters, and what is picked or computed from parameters
alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from matryoshkafy.graph.nodes import bound_args, info_of, is_item, is_op, reached, tensor_info
from matryoshkafy.rules.table import op_of


def is_weight(node: fx.Node) -> bool:
    """Tell whether a value is a parameter, picked out of one (experts), or made of parameters
    alone.
    """
    return is_picked(node) or is_pure(node)


def is_picked(node: fx.Node) -> bool:
    """Tell whether a value is a parameter, or part of one, as it stands."""
    while (op_of(node).picks or is_item(node)) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr"


def is_pure(node: fx.Node) -> bool:
    """Tell whether the values depend on no input; how often they are repeated may."""
    return all(n.op != "placeholder" for n in made_of(node))


def made_of(node: fx.Node) -> set[fx.Node]:
    """Return the tensors that a value is computed from; sizes and devices are none of them."""
    return reached([node], lambda n: filter(_holds_values, n.all_input_nodes))


def _holds_values(node: fx.Node) -> bool:
    info = info_of(node)
    return isinstance(info, tuple) or hasattr(info, "shape")


@dataclass(frozen=True)
class Place:
    """Which dims of a weight are outputs of a contraction and which are summed over."""

    outs: tuple[int, ...]
    into: tuple[int, ...]


def weight_places(node: fx.Node) -> dict[fx.Node, Place]:
    """Return the weights that a contraction reads, with the place of each of their dims."""
    known = op_of(node).weights
    if not known or not is_op(node):
        return {}
    args = bound_args(node)
    slots = known(args) if callable(known) else {args[name]: w for name, w in known.items()}
    return {
        value: Place(*weight.dims(len(tensor_info(value).shape)))
        for value, weight in slots.items()
        if isinstance(value, fx.Node) and is_weight(value)
    }
