"""Which values stand for weights: parameters, and what is picked or computed from parameters
alone.
"""

from __future__ import annotations

from torch import fx

from matryoshkafy.cleaning import op_name

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
    "getitem",
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
    while (
        node.op == "call_function" and op_name(node) in PICKS and isinstance(node.args[0], fx.Node)
    ):
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
