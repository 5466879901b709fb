"""make_functional(): in-place ops become pure ones; later readers of an alias see the new value.

A write through a view is written back into what it is a view of, view by view, until the memory's
first value: `y.mT[:, 0] = 1` becomes a select_scatter into y.mT, turned back into y. Views that
were taken before and are read later are taken again.

torch's own functionalisation (`ExportedProgram.run_decompositions`) was tried first: on its way it
decides dropout and batch norm for evaluation mode, and leaves `aten.copy`, which has no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import fx

from matryoshkafy.errors import TraceError
from matryoshkafy.graph.nodes import (
    Argument,
    SchemaArgument,
    TensorInfo,
    bound_args,
    is_item,
    is_tensor,
    op_key,
    schema_of,
    set_info,
    source_of,
    tensor_info,
    writes,
)
from matryoshkafy.graph.writing_back import (
    INVERSES,
    OPAQUE,
    PIECES,
    Target,
    aten_op,
    call,
    keeping_gradient,
    written_back,
)

aten = torch.ops.aten


def make_functional(graph: fx.Graph) -> list[str]:
    """Replace every in-place op by its pure form; return remarks on writes that the doll does not
    keep.

    Raises `TraceError` for a write whose aliases are not understood.
    """
    remarks: list[str] = []
    for node in [n for n in graph.nodes if writes(n)]:
        if op_key(node) in RESIZING:
            raise TraceError(
                f"{op_key(node)} at {source_of(node)} gives a tensor another size in place, and "
                "what stands in it then is not known. Make a tensor of that size instead "
                "(torch.zeros_like(y), y.clone())."
            )
        target = _written(node)
        if op_key(node) in TURNING:  # the memory stays as it is, under another shape
            _turn(graph, node, target)
            continue
        owner = _owner(graph, node, target)
        if owner.op != "call_function" and not _is_constant(owner):
            whose = "the input" if owner.op == "placeholder" else "its own"
            remarks.append(
                f"the forward writes into {whose} {str(owner.target)!r} at {source_of(node)}: a "
                "doll computes with the new value, and does not keep it"
            )
        _replace(graph, node, target, owner)
    return remarks


def _is_constant(owner: fx.Node) -> bool:
    """Tell whether a value is a number that the user wrote down, which export holds as a tensor."""
    return owner.op == "get_attr" and "tensor" in str(owner.target).rpartition(".")[2]


def _written(node: fx.Node) -> fx.Node:
    """Return the one tensor that an op writes into."""
    arguments = schema_of(node).arguments
    names = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    values = [bound_args(node).get(name) for name in names]
    if len(values) == 1 and is_tensor(values[0]):
        return values[0]
    raise _refusal(node, "it writes into several tensors")


def _refusal(node: fx.Node, why: str) -> TraceError:
    return TraceError(
        f"{op_key(node)} at {source_of(node)} writes in place, and {why}, so what it changes is "
        "not known. Write that line without changing a tensor in place (y = y * 2; torch.where; "
        "torch.cat), or clone() the tensor before the view is taken."
    )


def _owner(graph: fx.Graph, node: fx.Node, target: fx.Node) -> fx.Node:
    """Return the first value of the memory that is written; every alias that was taken before the
    write and is read after it must be understood.
    """
    owner = target
    while (base := _viewed(owner)) is not None:
        owner = base
    if op_key(owner) in OPAQUE:
        raise _refusal(node, f"{op_key(owner)} gives memory whose parts may be the same")
    # An earlier write made a value of its own, which stands for the same memory.
    owner = owner.meta.get("written", owner)
    # One alias that is not understood and is read later would go on showing the old value.
    later = _nodes_after(node)
    for other in graph.nodes:
        shared = is_tensor(other) and other.meta.get("storage") == owner.meta.get("storage")
        known = other is owner or "written" in other.meta or _viewed(other) is not None
        stale = other not in later and _is_read(other, later)
        if shared and "storage" in other.meta and stale and not known and not writes(other):
            name = op_key(other) or str(other.target)
            raise _refusal(node, f"{name} shares that memory in a way that is not known")
    return owner


# --- the pure form ------------------------------------------------------------------------------


def _replace(graph: fx.Graph, node: fx.Node, target: fx.Node, owner: fx.Node) -> None:
    # Readers before the write keep the old value: a graph's order is the order of execution.
    later, value = _nodes_after(node), _beside(graph, node, target)
    node.replace_all_uses_with(target)
    graph.erase_node(node)
    # The new value takes the memory's place, so that a second write finds its way to the owner.
    value.meta |= {"storage": target.meta.get("storage"), "written": owner}
    set_info(value, tensor_info(target))
    if value.meta.pop("no_grad", False):
        value = keeping_gradient(graph, target, value)
    _publish(graph, target, value, later)


RESIZING = {"resize_", "resize_as_", "resize_as_sparse_"}
TURNING = {"detach_", "squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}


def _turn(graph: fx.Graph, node: fx.Node, target: fx.Node) -> None:
    """No value changes: who reads the tensor later reads it in its new shape, or detached."""
    later, value = _nodes_after(node), _beside(graph, node, target)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    _redirect(target, value, later)


def _beside(graph: fx.Graph, node: fx.Node, target: fx.Node) -> fx.Node:
    """Write the pure form of an op before it, with all that is known of the op."""
    with graph.inserting_before(node):
        value = _pure(graph, node, target)
    value.meta = dict(node.meta)
    return value


DRAWS = {
    "normal_": aten.normal_functional.default,
    "bernoulli_": aten.bernoulli.p,
    "uniform_": aten.uniform.default,
    "exponential_": aten.exponential.default,
}


def _pure(graph: fx.Graph, node: fx.Node, target: fx.Node) -> fx.Node:
    """Return the node that computes what an op writes."""
    key, args, kwargs = op_key(node), node.args, dict(node.kwargs)
    if key == "copy_":
        return _copy(graph, target, cast("fx.Node", args[1]))
    if key == "embedding_renorm_":
        return _renormed(graph, target, *args[1:])
    if key in DRAWS and getattr(node.target, "_overloadname", "") != "Tensor":
        # What was there before matters for its shape alone.
        shape = graph.call_function(aten.detach.default, (target,))
        set_info(shape, tensor_info(target))
        return graph.call_function(DRAWS[key], (shape, *args[1:]), kwargs)
    pure = _without_writing(node.target)
    if pure is None:
        raise _refusal(node, "torch has no op that computes the same without writing")
    if "out" in kwargs:
        kwargs.pop("out")
    return graph.call_function(pure, args, kwargs)


def _copy(graph: fx.Graph, target: fx.Node, source: fx.Node) -> fx.Node:
    """aten.copy has no derivative: the source in the target's type and shape."""
    have, want = tensor_info(source), tensor_info(target)
    if have.dtype != want.dtype:
        source = graph.call_function(aten.to.dtype, (source, want.dtype))
        set_info(source, type(want)(have.shape, want.dtype))
    if have.shape != want.shape:
        return graph.call_function(aten.expand_as.default, (source, target))
    return graph.call_function(aten.alias.default, (source,))


def _renormed(graph: fx.Graph, table: fx.Node, *given: Argument) -> fx.Node:
    """Return a table whose rows that are looked up are scaled down to the largest norm.

    In plain ops, which every size computes of its own columns; torch's own writes where the
    indices say without asking whether there is such a row.
    """
    ids, most, order = given
    info = tensor_info(table)
    shape = (info.shape[0], 1)

    def made(op: Target, *args: Argument, dtype: torch.dtype = info.dtype) -> fx.Node:
        node = call(graph, op, *args)
        set_info(node, TensorInfo(shape, dtype))
        return node

    norms = made(aten.linalg_vector_norm.default, table, order, [1], True)
    flat = call(graph, aten.reshape.default, ids, [-1])
    count = math.prod(tensor_info(cast("fx.Node", ids)).shape)
    set_info(flat, TensorInfo((count,), tensor_info(cast("fx.Node", ids)).dtype))
    none = made(aten.new_zeros.default, table, list(shape))
    seen = made(aten.index_fill.int_Scalar, none, 0, flat, 1.0)
    seen = made(aten.gt.Scalar, seen, 0.0, dtype=torch.bool)
    longer = made(aten.gt.Scalar, norms, most, dtype=torch.bool)
    chosen = made(aten.logical_and.default, seen, longer, dtype=torch.bool)
    shrunk = made(aten.reciprocal.default, made(aten.add.Tensor, norms, 1e-7))
    shrunk = made(aten.mul.Tensor, shrunk, most)
    scale = made(aten.where.self, chosen, shrunk, made(aten.ones_like.default, norms))
    return call(graph, aten.mul.Tensor, table, scale)


def _without_writing(target: object) -> Target | None:
    """Return the overload that takes the same arguments and writes into none.

    Names mislead: pow_.Scalar has a scalar exponent, pow.Scalar a scalar base.
    """
    own = schema_of(target)
    namespace, _, name = own.name.partition("::")
    packet: Any = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if packet is None or not hasattr(packet, "overloads"):
        return None
    wanted = _plain(a for a in own.arguments if not a.is_out)
    for overload in packet.overloads():
        found = getattr(packet, overload)
        schema = schema_of(found)
        if not schema.is_mutable and _plain(schema.arguments) == wanted:
            return found
    return None


def _plain(arguments: Iterable[SchemaArgument]) -> list[tuple[str, str]]:
    """What is `self` of dropout_ is `input` of dropout: the first argument goes by its type."""
    found = [(argument.name, str(argument.type)) for argument in arguments]
    return [("", kind) for _, kind in found[:1]] + found[1:]


# --- aliases ------------------------------------------------------------------------------------


def _nodes_after(node: fx.Node) -> set[fx.Node]:
    out: set[fx.Node] = set()
    at = node.next
    while at.op != "root":
        out.add(at)
        at = at.next
    return out


def _publish(graph: fx.Graph, old: fx.Node, new: fx.Node, later: set[fx.Node]) -> None:
    """Write a new value back into what it is a view of, for all who read that memory later."""
    # Up the chain of views to the memory's first value, each time as a scatter into the one above;
    # then down again, to the views that somebody reads later.
    before, after = old, new
    while (base := _viewed(before)) is not None:
        with graph.inserting_before(after.next):
            updated = written_back(graph, before, base, after)
        updated.meta = base.meta | {"written": new.meta["written"]}
        before, after = base, updated
    _redirect(before, after, later)
    _refresh_views(graph, before, after, later)


def _redirect(old: fx.Node, new: fx.Node, later: set[fx.Node]) -> None:
    for user in list(old.users):
        if user in later and user is not new:
            user.replace_input_with(old, new)


def _refresh_views(graph: fx.Graph, base: fx.Node, new: fx.Node, later: set[fx.Node]) -> None:
    """Views taken before the mutation and read after it are taken again from the new value."""
    for view in list(_views_of(base)):
        if view not in later and _is_read(view, later):
            again = _taken_again(graph, view, new)
            _redirect(view, again, later)
            _refresh_views(graph, view, again, later)


def _taken_again(graph: fx.Graph, view: fx.Node, base: fx.Node) -> fx.Node:
    """Return a view's like of another value."""
    with graph.inserting_before(base.next):
        # Dropout in evaluation mode and the like returned its argument itself: no view to repeat.
        if not is_item(view) and op_key(view) not in INVERSES:
            again = call(graph, aten.alias.default, base)
            again.meta = dict(view.meta)
            return again
        if not is_item(view):
            return _again(graph, view, base)
        return _again(graph, view, _again(graph, view.all_input_nodes[0], base))


def _again(graph: fx.Graph, node: fx.Node, first: fx.Node) -> fx.Node:
    again = graph.call_function(aten_op(node), (first, *node.args[1:]), dict(node.kwargs))
    again.meta = dict(node.meta)
    return again


def _is_read(view: fx.Node, later: set[fx.Node]) -> bool:
    """Tell whether a view, or a view of it, is read later."""
    if any(user in later for user in view.users):
        return True
    return any(_is_read(inner, later) for inner in _views_of(view))


def _views_of(base: fx.Node) -> Iterator[fx.Node]:
    for user in base.users:
        if op_key(user) in PIECES:
            yield from (item for item in user.users if _viewed(item) is base)
        elif _viewed(user) is base:
            yield user


def _viewed(node: fx.Node) -> fx.Node | None:
    """Return the node that this one is a view of, if it shares memory with it."""
    first = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(first, fx.Node) or "written" in node.meta:
        return None
    source = first
    if is_item(node):
        if op_key(source) not in PIECES or not isinstance(source.args[0], fx.Node):
            return None
        source = source.args[0]
    elif op_key(node) not in INVERSES and not _is_same(node, source):
        return None
    shared = "storage" in node.meta and node.meta["storage"] == source.meta.get("storage")
    return source if shared else None


def _is_same(node: fx.Node, source: fx.Node) -> bool:
    """Tell whether an op that shares memory returned its argument: dropout that drops nothing."""
    same = is_tensor(node) and is_tensor(source) and tensor_info(node) == tensor_info(source)
    return same and op_key(node) not in OPAQUE and not writes(node)
