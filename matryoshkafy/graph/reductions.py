"""keep_reduced(): a statistic that is unsqueezed at once keeps its dim, and a pair is two of them.

x.mean(-1).unsqueeze(-1)            -> x.mean(-1, keepdim=True)
v, m = torch.var_mean(x, -1, ...)   -> x.var(-1, ...), x.mean(-1, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from matryoshkafy.graph.nodes import (
    TensorInfo,
    bound_args,
    info_of,
    is_item,
    is_op,
    is_tensor,
    op_key,
    set_arg,
    set_info,
    tensor_info,
)

aten = torch.ops.aten

PAIRS: Mapping[object, Callable[..., object]] = {
    aten.var_mean.correction: aten.var.correction,
    aten.std_mean.correction: aten.std.correction,
    aten.var_mean.dim: aten.var.dim,
    aten.std_mean.dim: aten.std.dim,
}


def keep_reduced(graph: fx.Graph) -> None:
    """Rewrite the graph in place so that a statistic is one op that keeps its dim where it can."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in PAIRS:
            _split_pair(graph, node)
    for node in list(graph.nodes):
        if node.users and is_op(node) and is_tensor(node):
            _keep(graph, node)


def _split_pair(graph: fx.Graph, node: fx.Node) -> None:
    given = bound_args(node)
    if not all(map(is_item, node.users)):
        return
    info = info_of(node)
    assert isinstance(info, tuple) and isinstance(info[0], TensorInfo)
    with graph.inserting_before(node):
        spread = graph.call_function(PAIRS[node.target], node.args, dict(node.kwargs))
        dims = list(given["dim"]) if given["dim"] else list(range(len(info[0].shape)))
        mean = graph.call_function(aten.mean.dim, (node.args[0], dims, given["keepdim"]))
    for new, described in zip((spread, mean), info, strict=True):
        set_info(new, described)
        new.meta["source"] = node.meta.get("source", "")
    for user in list(node.users):
        user.replace_all_uses_with(mean if user.args[1] == 1 else spread)
        graph.erase_node(user)
    graph.erase_node(node)


def _keep(graph: fx.Graph, node: fx.Node) -> None:
    given = bound_args(node)
    if given.get("keepdim") is not False:  # what has the argument is a statistic along `dim`
        return
    dim, source = given.get("dim"), node.args[0]
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    if len(dims) != 1 or not is_tensor(source):
        return
    rank, new = len(tensor_info(source).shape), tensor_info(node)
    at = dims[0] % rank
    for user in node.users:
        if op_key(user) != "unsqueeze" or bound_args(user)["dim"] % rank != at:
            return
    set_arg(node, "keepdim", True)
    set_info(node, TensorInfo((*new.shape[:at], 1, *new.shape[at:]), new.dtype))
    for user in list(node.users):
        user.replace_all_uses_with(node)
        graph.erase_node(user)
