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
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from matryoshkafy.graph_json import TensorInfo
from matryoshkafy.precision import follow_dtype

aten = torch.ops.aten


def op_name(node: fx.Node) -> str:
    """Return the schema name of the node's op without namespace and overload, e.g. `linear`."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.name.partition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def bound_args(node: fx.Node) -> dict[str, Any]:
    """Return the node's arguments by the names of the op's schema, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    out: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args):
            out[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            out[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            out[argument.name] = argument.default_value
    return out


def set_arg(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument of the node by its schema name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index(name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


ASSERTIONS = {
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_functional_assert_async",
    "_check",
    "item",
}
IDENTITIES = {"alias", "detach", "lift_fresh", "lift_fresh_copy", "positive", "lift", "alias_copy"}


def clean(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite the graph in place into the vocabulary of the rules."""
    _drop_assertions(graph)
    _drop_detached(graph)
    _make_functional(graph)
    _fill_empty(graph)
    _relax_views(graph)
    _slice_constants(graph, root)
    _drop_identities(graph)
    _follow_training(graph)
    _follow_device(graph)
    _share_masks(graph)
    graph.eliminate_dead_code()
    follow_dtype(graph, root)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta.pop("storage", None)


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and op_name(node) in ASSERTIONS and not node.users:
            graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    name = op_name(node)
    if name in IDENTITIES:
        return True
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.meta.get("shape") != node.meta.get("shape"):
        return False
    if name == "slice":
        a = bound_args(node)
        return a["step"] == 1 and a["start"] in (0, None) and isinstance(a["end"], int | None)
    if name in ("expand", "repeat", "clone"):
        return False
    # A cast to the type it has already: what was an upcast of half precision follows the model.
    return name in ("to", "_to_copy", "type_as", "dropout_identity") and "copy" not in name


def _drop_detached(graph: fx.Graph) -> None:
    """x.detach_() writes nothing: the graph of a doll has gradients wherever the user trains it."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) == "detach_":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _slice_constants(graph: fx.Graph, root: nn.Module) -> None:
    """x[:, [-2]] -> x[:, n-2:n-1]: a constant run of indices is a slice, which follows the size."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) == "index":
            _slice_constant(graph, root, node)


def _slice_constant(graph: fx.Graph, root: nn.Module, node: fx.Node) -> None:
    source, indices = node.args[0], node.args[1]
    given = [(d, i) for d, i in enumerate(indices) if i is not None]  # type: ignore[arg-type]
    if len(given) != 1:
        return
    dim, index = given[0]
    size = source.meta["shape"].shape[dim]  # type: ignore[union-attr]
    run = _constant_run(root, index, size)
    if run is None:
        return
    with graph.inserting_before(node):
        new = graph.call_function(aten.slice.Tensor, (source, dim, *run))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _constant_run(root: nn.Module, index: fx.Node, size: int) -> tuple[int, int] | None:
    while op_name(index) in (*IDENTITIES, "to") and isinstance(index.args[0], fx.Node):
        index = index.args[0]
    if index.op != "get_attr" or len(index.meta["shape"].shape) != 1:
        return None
    tensor = dict(root.named_buffers()).get(str(index.target))
    if tensor is None or tensor.is_meta or tensor.dtype not in (torch.int64, torch.int32):
        return None
    values = [v % size for v in tensor.tolist()]
    plain = values and values == list(range(values[0], values[0] + len(values)))
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
            known = {a.name for a in target._schema.arguments}
            given = {k: v for k, v in bound_args(node).items() if k in known and v is not None}
            node.target, node.args, node.kwargs = target, (), given


def _drop_identities(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def training_flag(graph: fx.Graph) -> fx.Node:
    """Return the node that reads `self.training`, first in the graph."""
    found = graph.find_nodes(op="get_attr", target="training")
    if found:
        return found[0]
    with graph.inserting_before(next(iter(graph.nodes))):
        flag = graph.get_attr("training")
    flag.meta["shape"] = False
    return flag


def _follow_training(graph: fx.Graph) -> None:
    flags = {
        "dropout": "train",
        "feature_dropout": "train",
        "alpha_dropout": "train",
        "feature_alpha_dropout": "train",
        "batch_norm": "training",
        "rrelu": "training",
        "lstm": "train",
        "gru": "train",
        "rnn_tanh": "train",
        "rnn_relu": "train",
    }
    affected = [n for n in graph.nodes if n.op == "call_function" and op_name(n) in flags]
    affected = [n for n in affected if _has_statistics(n)]
    for node in affected:
        set_arg(node, flags[op_name(node)], training_flag(graph))


def _has_statistics(node: fx.Node) -> bool:
    """Batch norm without running statistics uses the batch's own in both modes."""
    return op_name(node) != "batch_norm" or bound_args(node)["running_mean"] is not None


def _follow_device(graph: fx.Graph) -> None:
    users = [n for n in graph.nodes if n.op == "call_function" and _bound_device(n)]
    tensors = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    tensors = [n for n in tensors if hasattr(n.meta.get("shape"), "shape")]
    if not users or not tensors:
        return
    first = next((n for n in tensors if n.op == "get_attr"), tensors[0])
    with graph.inserting_after(first):
        device = graph.call_function(getattr, (first, "device"))
    for node in users:
        if device.prev is not node and node < device:
            continue
        set_arg(node, "device", device)


def _bound_device(node: fx.Node) -> bool:
    if not hasattr(node.target, "_schema"):
        return False
    return isinstance(bound_args(node).get("device"), torch.device)


def _share_masks(graph: fx.Graph) -> None:
    """Layers that share a boolean attention mask share its conversion, too.

    Fused attention turns a boolean mask into 0 and -inf of the queries' type, and keeps one of its
    own in every layer.
    """
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) == "scaled_dot_product_attention":
            mask = bound_args(node)["attn_mask"]
            if isinstance(mask, fx.Node) and mask.meta["shape"].dtype == torch.bool:
                readers.setdefault(mask, []).append(node)
    for mask, nodes in readers.items():
        if len(nodes) > 1:
            _convert_mask(graph, mask, nodes)


def _convert_mask(graph: fx.Graph, mask: fx.Node, readers: list[fx.Node]) -> None:
    query: Any = readers[0].args[0]
    dtype = query.meta["shape"].dtype
    with graph.inserting_before(readers[0]):
        zero = graph.call_function(aten.new_zeros.default, (query, []))
        filled = graph.call_function(aten.where.ScalarOther, (mask, zero, -math.inf))
    zero.meta["shape"] = TensorInfo((), dtype)
    filled.meta["shape"] = TensorInfo(mask.meta["shape"].shape, dtype)
    for new in (zero, filled):
        new.meta["source"] = readers[0].meta.get("source", "")
    for node in readers:
        set_arg(node, "attn_mask", filled)


# --- in-place ops -----------------------------------------------------------------------------


def _make_functional(graph: fx.Graph) -> None:
    """Replace every in-place op by its pure form; later readers of any alias see the new value."""
    mutations = [n for n in graph.nodes if n.op == "call_function" and _mutates(n)]
    for node in mutations:
        _replace_mutation(graph, node)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not schema.arguments:
        return False
    info = schema.arguments[0].alias_info
    return info is not None and info.is_write


def _pure(target: Any) -> Callable[..., Any]:
    name, overload = target._schema.name.partition("::")[2], target._overloadname
    packet = getattr(aten, name.removesuffix("_"), None)
    pure = getattr(packet, overload, None) if packet is not None else None
    return pure if pure is not None else target


def _replace_mutation(graph: fx.Graph, node: fx.Node) -> None:
    target = node.args[0]
    later = _nodes_after(node)
    with graph.inserting_before(node):
        value = graph.call_function(_pure(node.target), node.args, dict(node.kwargs))
        value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    _publish(graph, target, value, later)


def _nodes_after(node: fx.Node) -> set[fx.Node]:
    out, at = set(), node.next
    while at.op != "root":
        out.add(at)
        at = at.next
    return out


def _publish(graph: fx.Graph, old: Any, new: fx.Node, later: set[fx.Node]) -> None:
    """Readers after the mutation see `new` for `old`, and what `old` was a view of, likewise."""
    _redirect(old, new, later)
    before, after = old, new
    while (base := _viewed(before)) is not None:
        with graph.inserting_after(after):
            updated = SCATTERS[op_name(before)](graph, before, base, after)
        updated.meta = dict(base.meta)
        _redirect(base, updated, later)
        before, after = base, updated
    _refresh_views(graph, before, after, later, {old})


def _redirect(old: fx.Node, new: fx.Node, later: set[fx.Node]) -> None:
    for user in list(old.users):
        if user in later:
            user.replace_input_with(old, new)


def _refresh_views(
    graph: fx.Graph, base: fx.Node, new: fx.Node, later: set[fx.Node], done: set[fx.Node]
) -> None:
    """Views taken before the mutation and read after it are taken again from the new value."""
    for view in list(base.users):
        if view is new or view in later or view in done or _viewed(view) is not base:
            continue
        if not any(u in later for u in _all_users(view)):
            continue
        with graph.inserting_after(new):
            target: Any = view.target
            again = graph.call_function(target, (new, *view.args[1:]), dict(view.kwargs))
        again.meta = dict(view.meta)
        _redirect(view, again, later)
        _refresh_views(graph, view, again, later, done)


def _all_users(node: fx.Node) -> set[fx.Node]:
    found, queue = set(), [node]
    while queue:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                if _viewed(user) is not None:
                    queue.append(user)
    return found


def _viewed(node: Any) -> fx.Node | None:
    """Return the node that this one is a view of, if it shares memory with it."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if "storage" not in node.meta or node.meta["storage"] != source.meta.get("storage"):
        return None
    return source if op_name(node) in SCATTERS else None


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


def _scatter_slice(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    a = bound_args(view)
    return _call(
        graph, aten.slice_scatter.default, base, value, a["dim"], a["start"], a["end"], a["step"]
    )


def _scatter_select(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    a = bound_args(view)
    return _call(graph, aten.select_scatter.default, base, value, a["dim"], a["index"])


def _scatter_shape(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    del view
    return _call(graph, aten.reshape.default, value, list(base.meta["shape"].shape))


def _scatter_transpose(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    del base
    return _call(graph, view.target, value, *view.args[1:])


def _scatter_permute(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    del base
    dims = [d % len(view.args[1]) for d in view.args[1]]  # type: ignore[arg-type]
    return _call(graph, aten.permute.default, value, [dims.index(i) for i in range(len(dims))])


def _scatter_same(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    del view, base
    return _call(graph, aten.alias.default, value)


SCATTERS: dict[str, Callable[..., fx.Node]] = {
    "slice": _scatter_slice,
    "select": _scatter_select,
    "view": _scatter_shape,
    "reshape": _scatter_shape,
    "unsqueeze": _scatter_shape,
    "squeeze": _scatter_shape,
    "flatten": _scatter_shape,
    "transpose": _scatter_transpose,
    "t": _scatter_transpose,
    "permute": _scatter_permute,
    "alias": _scatter_same,
    "detach": _scatter_same,
    "to": _scatter_same,
    "contiguous": _scatter_same,
    "narrow": _scatter_slice,
}
