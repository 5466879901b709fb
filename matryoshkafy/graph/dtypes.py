"""follow_dtype(): which dtype each constant and value of a graph gets when the model is cast.

A trace in float32 runs in whatever type the user casts the model to.

Values that depend on parameters or floating inputs have the model's type; what is made of integers,
buffers and constants alone (rotary angles, position biases, masks) stays in float32, as models ask
for, and takes the model's type where it meets a model value. bfloat16 cannot hold float32's largest
number, so masks use bfloat16's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import fx, nn

from matryoshkafy.graph.nodes import Argument, info_of, op_key, set_info, tensor_info
from matryoshkafy.graph.vocabulary import basics_of

aten = torch.ops.aten
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LARGEST = {torch.finfo(torch.float32).max: torch.finfo(torch.bfloat16).max}


def follow_dtype(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite the graph in place; it must be free of mutations."""
    reference = _reference(graph, root)
    if reference is None:
        return
    dtype = tensor_info(reference).dtype
    ours = model_values(graph, root)
    with graph.inserting_after(reference):
        model_dtype = graph.call_function(getattr, (reference, "dtype"))
    set_info(model_dtype, None)
    for node in list(graph.nodes):
        if node.op != "call_function" or node is model_dtype:
            continue
        _soften(node)
        if node in ours:
            outside = (n for n in node.all_input_nodes if n not in ours)
            _cast(graph, node, (n for n in outside if n.op == "call_function"), model_dtype)
            _replace_dtype(node, (dtype, model_dtype), reference)
        elif basics_of(op_key(node)).one_type:
            # A product of buffers and positions is computed in the traced type.
            _cast(graph, node, node.all_input_nodes, dtype)


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


def model_values(graph: fx.Graph, root: nn.Module) -> set[fx.Node]:
    """Return what depends on parameters or on floating inputs."""
    parameters = {n for n, _ in root.named_parameters(remove_duplicate=False)}
    ours: set[fx.Node] = set()
    for node in graph.nodes:
        leaf = node.op == "placeholder" or (
            node.op == "get_attr" and str(node.target) in parameters
        )
        if (leaf and _is_float(node)) or any(n in ours for n in node.all_input_nodes):
            ours.add(node)
    return ours


def _replace_dtype(node: fx.Node, types: tuple[torch.dtype, fx.Node], reference: fx.Node) -> None:
    """A constant of the model's type is the model's type."""
    constant, runtime = types
    # What stands before the parameter whose type is asked cannot read it.
    if reference > node:
        return
    node.args = tuple(runtime if a is constant else a for a in node.args)
    node.kwargs = {k: runtime if v is constant else v for k, v in node.kwargs.items()}


def _cast(
    graph: fx.Graph, node: fx.Node, sources: Iterable[fx.Node], dtype: fx.Node | torch.dtype
) -> None:
    """Cast those of a node's inputs that are floating to a type."""
    for source in filter(_is_float, list(sources)):
        with graph.inserting_before(node):
            cast = graph.call_function(aten.to.dtype, (source, dtype))
        cast.meta = dict(source.meta)
        node.replace_input_with(source, cast)


def _soften(node: fx.Node) -> None:
    """The most negative float32 becomes the most negative bfloat16: as good a mask, in every
    type.
    """

    def soft(value: Argument) -> Argument:
        if isinstance(value, float) and abs(value) in LARGEST:
            return LARGEST[abs(value)] * (1 if value > 0 else -1)
        return value

    node.args = tuple(map(soft, node.args))
    node.kwargs = {k: soft(v) for k, v in node.kwargs.items()}
