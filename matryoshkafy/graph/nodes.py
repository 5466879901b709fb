"""What every stage asks of a graph's nodes: op, arguments by name, tensor info, source line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx import Node

TORCH_FOLDER = str(Path(torch.__path__[0])) + os.sep
FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)')


@dataclass(frozen=True)
class TensorInfo:
    """The shape (concrete integers, -1 where only the data decides) and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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
    """Return the shapes and dtypes of a traced value (`meta["val"]`), symbols by their hint."""
    if isinstance(value, torch.Tensor):
        return TensorInfo(tuple(_hint(n) for n in value.shape), value.dtype)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _hint(value)
    if isinstance(value, (tuple, list)):
        return tuple(info_of(item) for item in value)
    return value if isinstance(value, (bool, int, float)) else None


def _hint(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return value
    return value.node.hint if value.node.has_hint() else -1


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
