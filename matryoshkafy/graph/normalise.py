"""clean(): one spelling for every op of a traced graph, so that each rule is written once.

x.relu_(), F.relu, nn.ReLU      -> aten.relu
x[:, 0] = y                     -> select_scatter, and later readers of x see the new value
uninitialised memory            -> zeros
dropout / batch norm flags      -> self.training
device=cpu                      -> the device of the inputs
a boolean mask of many layers   -> one of 0 and -inf
x.to(x.dtype), alias, x[:]      -> x
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import fx, nn

from matryoshkafy.graph.casts import CAST_KEYS, raised
from matryoshkafy.graph.dtypes import follow_dtype, keep_exact, model_values
from matryoshkafy.graph.mutations import make_functional
from matryoshkafy.graph.nodes import (
    TensorInfo,
    bound_args,
    info_of,
    is_op,
    is_tensor,
    op_key,
    schema_of,
    set_arg,
    set_info,
    tensor_info,
)
from matryoshkafy.graph.reductions import keep_reduced
from matryoshkafy.graph.vocabulary import basics_of

aten = torch.ops.aten


ASSERTIONS = {
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_functional_assert_async",
    "torch::_check",
    "item",
}
IDENTITIES = {"alias", "lift_fresh", "lift_fresh_copy", "positive", "lift", "alias_copy"}


def clean(graph: fx.Graph, root: nn.Module) -> list[str]:
    """Rewrite the graph in place into the vocabulary of the rules; return remarks."""
    _drop_assertions(graph)
    # First: once no op writes in place a value is one node, and may be replaced where it is read.
    remarks = make_functional(graph)
    _fill_empty(graph)
    _relax_views(graph)
    _drop_needless_detaches(graph, root)
    _slice_constants(graph, root)
    _drop_identities(graph, root)
    _follow_training(graph)
    _follow_device(graph)
    keep_reduced(graph)
    _share_masks(graph)
    # Types are followed last, on what is left of the graph.
    graph.eliminate_dead_code()
    remarks += keep_exact(graph)
    follow_dtype(graph, root)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta.pop("storage", None)
        node.meta.pop("written", None)
        node.meta.pop("exact", None)
    return remarks


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and op_key(node) in ASSERTIONS and not node.users:
            graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    name = op_key(node)
    if name in IDENTITIES:
        return True
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or info_of(source) != info_of(node):
        return False
    if name == "slice":
        a = bound_args(node)
        return a["step"] == 1 and a["start"] in (0, None) and isinstance(a["end"], int | None)
    return name in CAST_KEYS  # a cast to the type that it has already


def _drop_needless_detaches(graph: fx.Graph, root: nn.Module) -> None:
    """x.detach() of what no gradient reaches anyway is x; every other one is the model's."""
    ours = model_values(graph, root)
    for node in list(graph.nodes):
        if op_key(node) == "detach":
            source = node.all_input_nodes[0]
            if source not in ours or op_key(source) == "detach":
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def _slice_constants(graph: fx.Graph, root: nn.Module) -> None:
    """x[:, [-2]] -> x[:, n-2:n-1]: a constant run of indices is a slice, which follows the size."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_key(node) == "index":
            _slice_constant(graph, root, node)


def _slice_constant(graph: fx.Graph, root: nn.Module, node: fx.Node) -> None:
    source = node.all_input_nodes[0]
    indices = cast("Sequence[fx.Node | None]", node.args[1])
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1:
        return
    dim, index = given[0]
    size = tensor_info(source).shape[dim]
    run = _constant_run(root, index, size)
    if run is None:
        return
    with graph.inserting_before(node):
        new = graph.call_function(aten.slice.Tensor, (source, dim, *run))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _constant_run(root: nn.Module, index: fx.Node, size: int) -> tuple[int, int] | None:
    while op_key(index) in (*IDENTITIES, "to") and isinstance(index.args[0], fx.Node):
        index = index.args[0]
    if index.op != "get_attr" or len(tensor_info(index).shape) != 1:
        return None
    tensor = dict(root.named_buffers()).get(str(index.target))
    if tensor is None or tensor.is_meta or tensor.dtype not in (torch.int64, torch.int32):
        return None
    values = [int(v) % size for v in tensor]
    plain = bool(values) and values == list(range(values[0], values[0] + len(values)))
    return (values[0], values[0] + len(values)) if plain else None


def _relax_views(graph: fx.Graph) -> None:
    """x.view(...) -> x.reshape(...): nothing writes through a view any more, and strides may
    differ.
    """
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default


EMPTIES = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_permuted.default: aten.zeros.default,
    aten.empty_strided.default: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
    aten.new_empty_strided.default: aten.new_zeros.default,
}


def _fill_empty(graph: fx.Graph) -> None:
    """Memory that a forward fills piece by piece starts as zeros: no node's value is left to
    chance.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target in EMPTIES:
            target = EMPTIES[node.target]
            known = {a.name for a in schema_of(target).arguments}
            given = {k: v for k, v in bound_args(node).items() if k in known and v is not None}
            node.target, node.args, node.kwargs = target, (), given


def rank_by_call(graph: fx.Graph) -> fx.Node | None:
    """Return the first squeeze that an op reads and that drops a dim only where a call has one row
    there: each call decides how many dims are left.
    """
    return next((n for n in graph.nodes if _is_loose(n)), None)


def _is_loose(node: fx.Node) -> bool:
    if op_key(node) != "squeeze" or all(user.op == "output" for user in node.users):
        return False
    shape, given = tensor_info(node.all_input_nodes[0]).shape, bound_args(node).get("dim")
    dims = [given] if isinstance(given, int) else given
    return any(shape[d] != 1 for d in (range(len(shape)) if dims is None else dims))


def _drop_identities(graph: fx.Graph, root: nn.Module) -> None:
    named = raised(graph, model_values(graph, root))
    for node in list(graph.nodes):
        kept = node in named or any(n in named for n in node.all_input_nodes[:1])
        if kept and op_key(node) in CAST_KEYS:
            continue
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def training_flag(graph: fx.Graph) -> fx.Node:
    """Return the node that reads `self.training`, first in the graph."""
    found = graph.find_nodes(op="get_attr", target="training")
    if found:
        return found[0]
    with graph.inserting_before(next(iter(graph.nodes))):
        flag = graph.get_attr("training")
    set_info(flag, False)
    return flag


def _follow_training(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        argument = basics_of(op_key(node)).training
        if argument and has_statistics(node) and not _drops_always(node, argument):
            set_arg(node, argument, training_flag(graph))


def _drops_always(node: fx.Node, flag: str) -> bool:
    """Tell whether dropout is on in evaluation mode: F.dropout(x, p) is, unless it is told."""
    return "dropout" in op_key(node) and bound_args(node).get(flag) is True


def has_statistics(node: fx.Node) -> bool:
    """Batch norm without running statistics uses the batch's own in both modes."""
    return op_key(node) != "batch_norm" or bound_args(node)["running_mean"] is not None


def _follow_device(graph: fx.Graph) -> None:
    users = [n for n in graph.nodes if n.op == "call_function" and _bound_device(n)]
    tensors = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    tensors = [n for n in tensors if is_tensor(n)]
    if not users or not tensors:
        return
    first = next((n for n in tensors if n.op == "get_attr"), tensors[0])
    with graph.inserting_after(first):
        device = graph.call_function(getattr, (first, "device"))
    for node in users:
        # What stands before the first tensor has none to follow yet.
        if node < device:
            continue
        set_arg(node, "device", device)


def _bound_device(node: fx.Node) -> bool:
    return is_op(node) and isinstance(bound_args(node).get("device"), torch.device)


def _share_masks(graph: fx.Graph) -> None:
    """Layers that share a boolean attention mask share its conversion, too.

    Fused attention turns a boolean mask into 0 and -inf of the queries' type, and keeps one of its
    own in every layer.
    """
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and op_key(node) == "scaled_dot_product_attention":
            mask = bound_args(node)["attn_mask"]
            if isinstance(mask, fx.Node) and tensor_info(mask).dtype == torch.bool:
                readers.setdefault(mask, []).append(node)
    for mask, nodes in readers.items():
        if len(nodes) > 1:
            _convert_mask(graph, mask, nodes)


def _convert_mask(graph: fx.Graph, mask: fx.Node, readers: list[fx.Node]) -> None:
    query = readers[0].all_input_nodes[0]
    dtype = tensor_info(query).dtype
    with graph.inserting_before(readers[0]):
        zero = graph.call_function(aten.new_zeros.default, (query, []))
        filled = graph.call_function(aten.where.ScalarOther, (mask, zero, -math.inf))
    set_info(zero, TensorInfo((), dtype))
    set_info(filled, TensorInfo(tensor_info(mask).shape, dtype))
    for new in (zero, filled):
        new.meta["source"] = readers[0].meta.get("source", "")
    for node in readers:
        set_arg(node, "attn_mask", filled)
