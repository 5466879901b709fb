"""make_functional(): in-place ops become pure ones; later readers of an alias see the new value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from matryoshkafy.graph.nodes import bound_args, op_key, tensor_info

aten = torch.ops.aten


def make_functional(graph: fx.Graph) -> None:
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
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    pure = getattr(packet, target._overloadname, None) if packet is not None else None
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
            updated = SCATTERS[op_key(before)](graph, before, base, after)
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
    return source if op_key(node) in SCATTERS else None


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
    return _call(graph, aten.reshape.default, value, list(tensor_info(base).shape))


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
