"""follow_dtype(): which dtype each constant and value of a graph gets when the model is cast.

A trace in float32 runs in whatever type the user casts the model to.

Values that depend on parameters or floating inputs have the model's type; what is made of integers,
buffers and constants alone (rotary angles, position biases, masks) stays in float32, as models ask
for, and takes the model's type where it meets a model value. A cast to a type that the user's line
names stays one (in float64, float64), up to the next cast. The largest number of the traced type is
that of the type that it runs in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from matryoshkafy.graph.casts import FLOATS, is_named, raised
from matryoshkafy.graph.nodes import (
    Argument,
    Info,
    TensorInfo,
    info_of,
    is_op,
    is_tensor,
    op_key,
    set_info,
    tensor_info,
)
from matryoshkafy.graph.vocabulary import WRITES, basics_of

aten = torch.ops.aten


def follow_dtype(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite the graph in place; it must be free of mutations."""
    reference = _reference(graph, root)
    if reference is None:
        return
    ours = model_values(graph, root)
    named = raised(graph, ours)
    types = _Types.before(graph, reference)
    for node in list(graph.nodes):
        # What stands before the parameter whose type is asked cannot read it.
        if not is_op(node) or reference > node:
            continue
        types.follow_largest(node, (n for n in node.all_input_nodes if n in ours))
        if is_named(node):
            types.name(node)
        elif node in ours:
            # Back from a type that is named: to that of the value before, which autocast may have
            # lowered.
            before = next((named[n] for n in node.all_input_nodes if n in named), None)
            types.follow(node, before if node not in named else None)
            outside = (n for n in node.all_input_nodes if n not in ours)
            if node not in named:
                # What has another type in the trace has it for reasons of its own.
                made = [n for n in outside if is_op(n) and _is_of(n, types.traced)]
                _cast(graph, node, made, types.beside(node, ours) if made else types.model)
        elif basics_of(op_key(node)).one_type:
            # A product of buffers and positions is computed in the traced type.
            _cast(graph, node, node.all_input_nodes, types.traced)


def keep_exact(graph: fx.Graph) -> list[str]:
    """Keep products where the forward turns autocast off, as rotary angles do; say which cannot be.

    Each is one number times one there (angles are positions times frequencies): autocast lowers no
    multiplication.
    """
    places: dict[str, None] = {}
    for node in list(graph.nodes):
        if "exact" not in node.meta or not basics_of(op_key(node)).one_type:
            continue
        if op_key(node) in ("matmul", "bmm", "mm") and _is_outer(node):
            node.target, node.kwargs = aten.mul.Tensor, {}
        elif op_key(node) not in WRITES:
            places[str(node.meta.get("source") or node.name)] = None
    return [f"autocast is turned off at {place}, which the doll does not do" for place in places]


def _is_outer(node: fx.Node) -> bool:
    operands = [a for a in node.args[:2] if is_tensor(a)]
    left, *right = (tensor_info(n).shape for n in operands)
    return bool(right) and len(left) == len(right[0]) and left[-1:] == right[0][-2:-1] == (1,)


@dataclass(frozen=True)
class _Types:
    """The type of a trace, and nodes that give at run time the model's, and the wider of both."""

    traced: torch.dtype
    model: fx.Node
    wide: fx.Node

    @classmethod
    def before(cls, graph: fx.Graph, reference: fx.Node) -> _Types:
        traced = tensor_info(reference).dtype
        with graph.inserting_after(reference):
            model = _said(graph, getattr, (reference, "dtype"))
        with graph.inserting_after(model):
            return cls(traced, model, _said(graph, torch.promote_types, (model, traced)))

    def name(self, node: fx.Node) -> None:
        """A cast to a type that is named is one to no narrower type."""
        node.target = aten.to.dtype
        node.args, node.kwargs = (node.args[0], self.wide), {}

    def follow(self, node: fx.Node, like: fx.Node | None) -> None:
        """A constant of the traced type is the model's type, or that of a value."""
        if not any(a is self.traced for a in (*node.args, *node.kwargs.values())):
            return
        dtype = self._of(like, node) if like and like.op != "get_attr" else self.model
        node.args = tuple(dtype if a is self.traced else a for a in node.args)
        node.kwargs = {k: dtype if v is self.traced else v for k, v in node.kwargs.items()}

    def _limit(self, info: fx.Node, traced: float, *, bounded: bool) -> fx.Node:
        """Return the largest or the least number of a type."""
        end = _said(info.graph, getattr, (info, "max" if traced > 0 else "min"), traced)
        nearer = min if traced > 0 else max
        return _said(info.graph, nearer, (end, traced), traced) if bounded else end

    def _of(self, value: fx.Node, node: fx.Node) -> fx.Node:
        """Return the type of a value, asked before a node."""
        with node.graph.inserting_before(node):
            return _said(node.graph, getattr, (value, "dtype"))

    def beside(self, node: fx.Node, ours: Collection[fx.Node]) -> fx.Node:
        """Return the type that what a node reads beside the model's own values has to have."""
        value = next((n for n in node.all_input_nodes if n in ours and _is_float(n)), None)
        if value is None or not basics_of(op_key(node)).one_type:
            return self.model
        return self._of(value, node)  # which autocast may have lowered

    def follow_largest(self, node: fx.Node, values: Iterable[fx.Node]) -> None:
        """The most negative number of the traced type, which a mask holds, is that of the type of
        the value it masks (of the model, where it meets none; what has no value of the model yet is
        computed in the traced type, whose own it may not exceed).
        """
        largest = torch.finfo(self.traced).max
        given = (*node.args, *node.kwargs.values())
        if not any(isinstance(a, float) and abs(a) == largest for a in given):
            return
        masked = next((n for n in values if _is_float(n)), None)
        dtype = self._of(masked, node) if masked else self.model
        with node.graph.inserting_before(node):
            info = _said(node.graph, torch.finfo, (dtype,))
            ends = {
                sign * largest: self._limit(info, sign * largest, bounded=masked is None)
                for sign in (1, -1)
            }

        def followed(value: Argument) -> Argument:
            return ends.get(value, value) if isinstance(value, float) else value

        node.args = tuple(map(followed, node.args))
        node.kwargs = {k: followed(v) for k, v in node.kwargs.items()}


def _said(
    graph: fx.Graph, function: Callable[..., object], args: tuple[Argument, ...], info: Info = None
) -> fx.Node:
    """Return a new node that gives no tensor."""
    made = graph.call_function(function, args)
    set_info(made, info)
    return made


def _reference(graph: fx.Graph, root: nn.Module) -> fx.Node | None:
    """A parameter of the most common floating type."""
    parameters = {n for n, _ in root.named_parameters(remove_duplicate=False)}
    nodes = [n for n in graph.nodes if n.op == "get_attr" and str(n.target) in parameters]
    nodes = [n for n in nodes if tensor_info(n).dtype in FLOATS]
    if not nodes:
        return None
    common = Counter(tensor_info(n).dtype for n in nodes).most_common(1)[0][0]
    return next(n for n in nodes if tensor_info(n).dtype == common)


def _is_float(node: fx.Node) -> bool:
    return getattr(info_of(node), "dtype", None) in FLOATS


def _is_of(node: fx.Node, dtype: torch.dtype) -> bool:
    return getattr(info_of(node), "dtype", None) is dtype


def model_values(graph: fx.Graph, root: nn.Module) -> set[fx.Node]:
    """Return what depends on parameters or on floating inputs."""
    parameters = {n for n, _ in root.named_parameters(remove_duplicate=False)}
    ours: set[fx.Node] = set()
    for node in graph.nodes:
        leaf = node.op == "placeholder" or (
            node.op == "get_attr" and str(node.target) in parameters
        )
        # A size or a device that is read off a value is none of its numbers.
        is_value = isinstance(info_of(node), (TensorInfo, tuple))
        made = is_value and any(n in ours for n in node.all_input_nodes)
        if (leaf and _is_float(node)) or made:
            ours.add(node)
    return ours


def _cast(
    graph: fx.Graph, node: fx.Node, sources: Iterable[fx.Node], dtype: fx.Node | torch.dtype
) -> None:
    """Cast those of a node's inputs that are floating to a type."""
    for source in filter(_is_float, list(sources)):
        with graph.inserting_before(node):
            cast = graph.call_function(aten.to.dtype, (source, dtype))
        cast.meta = dict(source.meta)
        node.replace_input_with(source, cast)
