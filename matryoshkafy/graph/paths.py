"""A recorded path depends on values: what the forward read of them is checked at every call.

    path         a tensor that Python read (bool, item, tolist, numpy) holds what it held
    path_size    as many rows were found (nonzero, a mask as an index)

Both return nothing, and stay in every graph that is made of the recorded one.
"""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from matryoshkafy.errors import GuardError, TraceError
from matryoshkafy.graph.nodes import op_key, source_of
from matryoshkafy.graph.user_lines import user_frame

# How the remark on a recorded path ends where all that it read is checked.
CHECKED = "what it read is checked at every call"
READERS: frozenset[object] = frozenset(
    (
        *(
            getattr(torch.Tensor, name)
            for name in (
                "item",
                "tolist",
                "numpy",
                "__array__",
                "__bool__",
                "__int__",
                "__float__",
                "__index__",
                "__complex__",
                "__contains__",
                "equal",
                "allclose",
                "is_nonzero",
            )
        ),
        torch.equal,
        torch.allclose,
        torch.is_nonzero,
    )
)
# As far off as another device rounds; a number that was read is a constant of the graph.
ROUNDED = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-2,
}
LIBRARY_FOLDER = str(Path(__file__).parents[1])
MOST = 1 << 16  # values that a graph may hold of one read
library: Any = torch.library  # torch leaves its functions without types
LIBRARY = library.Library("matryoshkafy", "FRAGMENT")


def refusal(where: str) -> str:
    """Return what a call of another path is told; `where` may come out of a file."""
    at = "".join(c if c.isprintable() else "?" for c in where) or "an unknown line"
    return (
        f"the forward was recorded along the path of its example inputs, and what it read of "
        f"values at {at} is something else in this call. Convert with an example that takes the "
        "path you need, or rewrite that line with operations of one path (torch.where, masks)."
    )


def path(value: Tensor, expected: list[float], where: str) -> None:
    """Raise `GuardError` where a tensor does not hold what the recorded path read of it."""
    if value.numel() * (1 + value.is_complex()) != len(expected) or not bool(same(value, expected)):
        raise GuardError(refusal(where))


def same(value: Tensor, expected: list[float]) -> Tensor:
    """Return whether a tensor holds so many numbers, as one bool."""
    found, off = _numbers(value), ROUNDED.get(value.dtype, 0.0)
    wanted = torch.tensor(expected, dtype=torch.float64, device=found.device)
    return torch.isclose(found, wanted, off, off, equal_nan=True).all()


def _numbers(value: Tensor) -> Tensor:
    real = torch.view_as_real(value) if value.is_complex() else value
    return real.detach().reshape(-1).to(torch.float64)


def path_size(size: int, expected: int, where: str) -> None:
    """Raise `GuardError` where another number of rows was found than on the recorded path."""
    if size != expected:
        raise GuardError(refusal(where))


def _nothing(*args: object) -> None:
    del args


for schema, kernel in (
    ("path(Tensor value, float[] expected, str where) -> ()", path),
    ("path_size(SymInt size, SymInt expected, str where) -> ()", path_size),
):
    LIBRARY.define(schema)
    LIBRARY.impl(kernel.__name__, kernel, "CompositeExplicitAutograd")
    library.register_fake(f"matryoshkafy::{kernel.__name__}", _nothing, lib=LIBRARY)

PATH = torch.ops.matryoshkafy.path.default
PATH_SIZE = torch.ops.matryoshkafy.path_size.default
CHECKS: frozenset[object] = frozenset((PATH, PATH_SIZE))
for target in (PATH, PATH_SIZE):
    has_side_effect(cast("Callable[..., Any]", target))


def checks_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the checks of a recorded path, whatever reads what they check."""
    return [node for node in graph.nodes if node.target in CHECKS]


def note_read(args: Collection[object], kwargs: Mapping[str, object]) -> None:
    """Put into the graph that is recorded what tensors hold whose values are about to be read.

    Raises:
        TraceError: they are more than a graph holds.
    """
    for value in (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)):
        if value.numel() > MOST:
            raise TraceError(
                f"the forward reads {value.numel()} values of a tensor in Python, which would be "
                f"constants of the graph; at most {MOST} are kept. Compute with torch operations, "
                "or give what is made of them as an input."
            )
        with disable_proxy_modes_tracing():
            held = _held(value)
        PATH(value.detach(), held, _line())


def _held(value: Any) -> list[float]:
    return cast("list[float]", _numbers(value).tolist())  # pyright: ignore[reportUnknownMemberType]


def _line() -> str:
    frame = user_frame()
    if frame is None or frame.f_code.co_filename.startswith(LIBRARY_FOLDER):
        return ""  # the user's code has no file
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"


def check_path(graph: fx.Graph, where: str) -> bool:
    """Finish the checks of a recorded graph; tells whether they cover all that it read.

    What depends on no input of the graph is the same at every call.

    Args:
        graph: the recorded one.
        where: the line that could not be exported, for checks that know none of their own.
    """
    given = _of_inputs(graph)
    for node in list(graph.nodes):
        if node.target is PATH and node.args[0] not in given:
            graph.erase_node(node)
        elif node.target is PATH:
            node.args = (*node.args[:2], node.args[2] or where)
        elif node in given and _finds_rows(node):
            _check_rows(graph, node, where)
    return not any(v in given for v in _unnoted(graph))


def note_hidden(module: fx.GraphModule, values: list[Tensor], inputs: list[object]) -> None:
    """Note reads that no function of torch's Python shows: a tensor as the bound of a slice.

    Args:
        module: the recorded graph, which is run once more.
        values: the tensors of the model, which it may write to.
        inputs: the flat inputs of the example.
    """
    hidden = _unnoted(module.graph)
    if not hidden:
        return
    held: dict[fx.Node, list[float]] = {}

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found = super().run_node(n)
            if n in hidden:
                held[n] = _held(found)
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


def _of_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are made of what comes into a graph."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _bare(node: object) -> object:
    """Return what is read of a value: bool(x) reads whether x != 0."""
    while isinstance(node, fx.Node) and op_key(node) in ("detach", "ne"):
        node = node.args[0]
    return node


def _tags(node: fx.Node) -> Collection[torch.Tag]:
    return getattr(node.target, "tags", ())


def _reads(node: fx.Node) -> bool:
    """Tell whether a node gives Python a number that values hold."""
    return torch.Tag.data_dependent_output in _tags(node)


def _finds_rows(node: fx.Node) -> bool:
    """Tell whether the values of a node's inputs choose how many rows it has."""
    if op_key(node) == "index":
        return any(_chooses(n) for n in node.all_input_nodes[1:])
    packs = op_key(node) == "_pack_padded_sequence"
    return packs or torch.Tag.dynamic_output_shape in _tags(node)


def _chooses(index: fx.Node) -> bool:
    value = index.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def _check_rows(graph: fx.Graph, node: fx.Node, where: str) -> None:
    for value in _values_of(node):
        shape = cast("Tensor", value.meta["val"]).shape
        dim = _row_dim(node)
        if len(shape) <= dim:
            continue
        with graph.inserting_after(value):
            size = graph.call_function(torch.ops.aten.sym_size.int, (value, dim))
        size.meta["val"] = int(shape[dim])
        with graph.inserting_after(size):
            graph.call_function(PATH_SIZE, (size, int(shape[dim]), source_of(node) or where))


def _values_of(node: fx.Node) -> Iterator[fx.Node]:
    if isinstance(node.meta.get("val"), Tensor):
        yield node
    else:
        first = (u for u in node.users if op_key(u) == "getitem" and u.args[1] == 0)
        yield from (u for u in first if isinstance(u.meta.get("val"), Tensor))


def _row_dim(node: fx.Node) -> int:
    if op_key(node) != "index":
        return 0
    indices = cast("list[object]", node.args[1])
    return next(i for i, index in enumerate(indices) if index is not None)
