"""What every stage asks of a graph's nodes: op, arguments by name, tensor info, source line."""

from __future__ import annotations

import functools
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node
from torch.fx.node import Argument as Argument

TORCH_FOLDER = str(Path(torch.__path__[0])) + os.sep
TRACING_FOLDER = str(Path(__file__).parent) + os.sep
FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)')


@dataclass(frozen=True)
class TensorInfo:
    """The shape (concrete integers, -1 where only the data decides) and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class SchemaArgument(Protocol):
    """One argument of an operator's schema, or what it returns."""

    name: str
    type: object
    alias_info: AliasInfo | None
    is_out: bool
    kwarg_only: bool
    default_value: Any

    def has_default_value(self) -> bool:
        """Tell whether a call may leave it out."""
        ...


class AliasInfo(Protocol):
    """Memory that an argument shares."""

    is_write: bool


class Schema(Protocol):
    """An operator's schema, which torch leaves without precise types."""

    name: str
    arguments: Sequence[SchemaArgument]
    returns: Sequence[SchemaArgument]
    is_mutable: bool


Info = TensorInfo | int | float | bool | None | tuple["Info", ...]


def source_of(node: Node) -> str | None:
    """Return where the user's code made a node, "file:line (function)"; None where unknown.

    This is the last frame outside torch of the stack trace: the innermost are torch's own.
    """
    if "source" in node.meta:
        return node.meta["source"]
    frames = FRAME.findall(node.meta.get("stack_trace") or "")
    users = [frame for frame in frames if not frame[0].startswith(TORCH_FOLDER)]
    return "{}:{} ({})".format(*users[-1]) if users else None


def info_of(value: object) -> Info:
    """Return shapes and dtypes of what a node gives (`meta["info"]`) or of a traced value.

    A tuple where there are several; sizes that are symbols are given by their hint.
    """
    if isinstance(value, fx.Node):
        return value.meta["info"] if "info" in value.meta else info_of(value.meta.get("val"))
    if isinstance(value, torch.Tensor):
        return TensorInfo(tuple(int(_hint(n)) for n in value.shape), value.dtype)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _hint(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(info_of, cast("tuple[object, ...]", value)))
    return value if isinstance(value, (bool, int, float)) else None


Symbol = torch.SymInt | torch.SymFloat | torch.SymBool


def _hint(value: float | Symbol) -> float:
    if isinstance(value, (bool, int, float)):
        return value
    node: Any = value.node
    return node.hint if node.has_hint() else -1


def op_key(op: object) -> str:
    """Return the one key of an op: "linear" for ATen's, "mylib::linear" for any other.

    Args:
        op: a node, an overload (`torch.ops.mylib.scan.default`), a packet (`torch.ops.mylib.scan`),
            a name, or a function of Python. A node that calls nothing has the key "".
    """
    if isinstance(op, fx.Node):
        if op.op != "call_function":
            return ""
        op = op.target
    if isinstance(op, OpOverload):
        return _overload_key(cast("OpOverload[..., object]", op))
    if isinstance(op, str):
        return op.removeprefix("aten::")
    if isinstance(op, OpOverloadPacket):
        return f"{op}".replace(".", "::", 1).removeprefix("aten::")
    module, name = getattr(op, "__module__", None) or "python", getattr(op, "__name__", str(op))
    return f"{str(module).removeprefix('_')}::{name}"


@functools.cache
def _overload_key(op: OpOverload[..., object]) -> str:
    return op.name().partition(".")[0].removeprefix("aten::")


def is_item(node: fx.Node) -> bool:
    """Tell whether a node picks one of several outputs."""
    return node.op == "call_function" and node.target is operator.getitem


def is_op(node: fx.Node) -> bool:
    """Tell whether a node calls an operator, which has a schema (and is no scalar arithmetic)."""
    return node.op == "call_function" and hasattr(node.target, "_schema")


def tensor_info(node: fx.Node) -> TensorInfo:
    """Return shape and dtype of the one tensor that a node gives."""
    found = info_of(node)
    assert isinstance(found, TensorInfo), f"{node} gives no single tensor: {found}"
    return found


def is_tensor(node: object) -> TypeGuard[fx.Node]:
    """Tell whether a value is a node that gives one tensor."""
    return isinstance(node, fx.Node) and isinstance(info_of(node), TensorInfo)


def gives_several(node: fx.Node) -> bool:
    """Tell whether a node gives a tuple or a list of values."""
    return isinstance(info_of(node), tuple)


def set_info(node: fx.Node, found: Info) -> None:
    """Say what a node gives."""
    node.meta["info"] = found


def output_node(graph: fx.Graph) -> fx.Node:
    """Return the node that returns the outputs: the last one."""
    return next(iter(reversed(graph.nodes)))


def outputs_of(graph: fx.Graph) -> list[Argument]:
    """Return the outputs of a graph as one flat list: nodes and constants."""
    return list(cast("Sequence[Argument]", output_node(graph).args[0]))


def schema_of(op: object) -> Schema:
    """Return the schema of an operator, or of the operator that a node calls."""
    found = getattr(op.target if isinstance(op, fx.Node) else op, "_schema", None)
    assert found is not None, f"{op} is no operator, so it has no schema"
    return found


def writes(node: fx.Node) -> bool:
    """Tell whether a node writes into one of its arguments."""
    return is_op(node) and schema_of(node).is_mutable


def bound_args(node: fx.Node) -> dict[str, Any]:
    """Return the node's arguments by the names of the op's schema, defaults filled in."""
    out: dict[str, Any] = {}
    for i, argument in enumerate(schema_of(node).arguments):
        if i < len(node.args):
            out[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            out[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            out[argument.name] = argument.default_value
    return out


def set_arg(node: fx.Node, name: str, value: Argument) -> None:
    """Set one argument of the node by its schema name."""
    at = [a.name for a in schema_of(node).arguments].index(name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


def reached(
    starts: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """Return the nodes that steps lead to, the starts among them.

    Args:
        starts: where to begin.
        step: a node's next ones: `sources_of` for what a value is made of, `readers_of` for what it
            makes.
    """
    seen = set(starts)
    queue = list(seen)
    while queue:
        fresh = [n for n in step(queue.pop()) if n not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return seen


def sources_of(node: fx.Node) -> Iterable[fx.Node]:
    """Return the nodes that a node reads."""
    return node.all_input_nodes


def readers_of(node: fx.Node) -> Iterable[fx.Node]:
    """Return the nodes that read a node."""
    return node.users
