"""add_checks(): a recorded graph checks what it holds of values, and tells whether that is all."""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree

from matryoshkafy.graph.nodes import op_key, source_of
from matryoshkafy.graph.paths import PATH, PATH_SIZE, held_in

DEPENDS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)
# torch's shape of it takes the lengths for those of the example.
PACKS = "_pack_padded_sequence"


def add_checks(
    module: fx.GraphModule, values: list[Tensor], inputs: list[object], where: str
) -> bool:
    """Finish the checks of a recorded graph; tells whether they cover all that it read.

    What depends on no input of the graph is the same at every call.

    Args:
        module: the recorded graph, which is run once more; its reads in Python are noted already.
        values: the tensors of the model, which it may write to.
        inputs: the flat inputs of the example.
        where: the line that could not be exported, for checks that know none of their own.
    """
    graph = module.graph
    given = _of_inputs(graph)
    shapes = _shapes_of(module, values, inputs)
    _note_hidden(module, values, inputs)
    for node, dims in shapes.found.items():
        if node in given:
            _check_sizes(graph, node, dims, where)
    for node in graph.find_nodes(op="call_function", target=PATH):
        node.args = (*node.args[:2], node.args[2] or where)
        if node.args[0] not in given:
            graph.erase_node(node)
    return given.isdisjoint(_unnoted(graph) | shapes.unknown)


def _of_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are made of what comes into a graph."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _note_hidden(module: fx.GraphModule, values: list[Tensor], inputs: list[object]) -> None:
    """Note reads that no function of torch's Python shows: a tensor as the bound of a slice."""
    hidden = _unnoted(module.graph)
    if not hidden:
        return
    held: dict[fx.Node, list[float]] = {}

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found = super().run_node(n)
            if n in hidden:
                held[n] = held_in(found)
            return found

    # What cannot be run once more is not checked, and the doll warns of its path.
    with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError, IndexError):
        Reader(module).run(values, pytree.tree_map_only(Tensor, torch.clone, inputs))
    for node, numbers in held.items():
        with module.graph.inserting_after(node):
            module.graph.call_function(PATH, (node, numbers, source_of(node) or ""))


def _unnoted(graph: fx.Graph) -> set[fx.Node]:
    """Return the tensors that give Python a number, and are not noted."""
    noted = {_bare(n.args[0]) for n in graph.nodes if n.target is PATH}
    return {v for n in graph.nodes if _reads(n) for v in n.all_input_nodes if _bare(v) not in noted}


def _bare(node: object) -> object:
    """Return what is read of a value: bool(x) reads whether x != 0."""
    while isinstance(node, fx.Node) and op_key(node) in ("detach", "ne"):
        node = node.args[0]
    return node


def _reads(node: fx.Node) -> bool:
    """Tell whether a node gives Python a number that values hold."""
    return torch.Tag.data_dependent_output in getattr(node.target, "tags", ())


def _is_sparse(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout != torch.strided


class _Shapes(fx.Interpreter):
    """Runs a graph on shapes alone: `found` are the dims of values that depend on other values, by
    node; `unknown` the nodes of which torch knows no shape, and those that turn a tensor sparse.
    """

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode
        self.found: dict[fx.Node, tuple[int, ...]] = {}
        self.unknown: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """Return the fake value of a node, of the sizes that it had when it was recorded."""
        if n.op != "call_function":
            return super().run_node(n)
        try:
            value = None if op_key(n) == PACKS else super().run_node(n)
        except DEPENDS:
            value = None
        except Exception:  # noqa: BLE001  shape functions raise errors of every kind
            self.unknown.add(n)
            return self._as_recorded(n)
        if _is_sparse(value) and not any(_is_sparse(self.env[i]) for i in n.all_input_nodes):
            self.unknown.add(n)  # its places are values
        opened = dict(_opened(n, value))
        self.found |= opened
        return self._as_recorded(n) if opened or value is None else value

    def _as_recorded(self, n: fx.Node) -> Any:
        return pytree.tree_map_only(Tensor, self._like, n.meta.get("val"))

    def _like(self, held: Tensor) -> Tensor:
        if held.layout != torch.strided:
            return held
        size, stride = held.shape, held.stride()
        with self.mode:
            return torch.empty_strided(size, stride, dtype=held.dtype, device=held.device)


def _shapes_of(module: fx.GraphModule, values: list[Tensor], inputs: list[object]) -> _Shapes:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor, static_shapes=True)

    found = _Shapes(module, mode)
    try:
        with mode, torch.no_grad():
            found.run(*pytree.tree_map_only(Tensor, fake, (values, inputs)))
    except Exception:  # noqa: BLE001  an input of a kind that has no fake: nothing is known
        found.unknown.update(module.graph.nodes)
    return found


def _opened(node: fx.Node, value: Any) -> Iterator[tuple[fx.Node, tuple[int, ...]]]:
    """Yield the tensors that a node gives, and which of their sizes hang on values.

    Args:
        node: a node of the recorded graph.
        value: its fake value; None where torch knows no sizes: then all of them may.
    """
    several = isinstance(node.meta.get("val"), (tuple, list))
    users = {u.args[1]: u for u in node.users if op_key(u) == "getitem"} if several else {0: node}
    fakes: Any = value if several else {0: value}
    for place, user in users.items():
        held = user.meta.get("val")
        if isinstance(held, Tensor):
            sizes = range(held.dim())
            open_ = [i for i in sizes if value is None or type(fakes[place].shape[i]) is not int]
            found = open_[:1] if op_key(node) == PACKS else open_
            yield from [(user, tuple(found))] if found else []


def _check_sizes(graph: fx.Graph, node: fx.Node, dims: Collection[int], where: str) -> None:
    """Check how many rows a node found."""
    for dim in dims:
        number = int(cast("Tensor", node.meta["val"]).shape[dim])
        with graph.inserting_after(node):
            size = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
        size.meta["val"] = number
        with graph.inserting_after(size):
            graph.call_function(PATH_SIZE, (size, number, source_of(node) or where))
