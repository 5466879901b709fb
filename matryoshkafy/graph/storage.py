"""mark_storage(), aliases_of(): who shares memory, which torch.export does not always say."""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx, nn

from matryoshkafy.graph.nodes import bound_args, is_item, is_op, is_tensor, op_key, schema_of
from matryoshkafy.graph.writing_back import PIECES


def mark_storage(graph: fx.Graph) -> None:
    """Say which nodes share memory: what a recorded value was a view of is not kept with it."""
    for node in graph.nodes:
        source = _viewed(node)
        node.meta["storage"] = id(node) if source is None else source.meta["storage"]


def _viewed(node: fx.Node) -> fx.Node | None:
    """Return the argument whose memory a node returns."""
    pieces = node.args[0] if is_item(node) else None
    if isinstance(pieces, fx.Node) and op_key(pieces) in PIECES:
        node = pieces
    elif not is_op(node) or not is_tensor(node):
        return None
    schema = schema_of(node)
    given = bound_args(node)
    for argument in schema.arguments:
        aliased = schema.returns[0].alias_info and argument.alias_info
        source = given.get(argument.name)
        if aliased and isinstance(source, fx.Node):
            copies = COPIES_IF.get(op_key(node))
            new = copies is not None and copies(source.meta["val"], node.meta["val"])
            return None if new else source
    return None


def _reshape_copies(old: torch.Tensor, new: torch.Tensor) -> bool:
    try:
        old.view(new.shape)
    except (RuntimeError, ValueError):
        return True
    return False


# Ops that return a view where they can, and when they cannot.
COPIES_IF: Mapping[str, Callable[[torch.Tensor, torch.Tensor], bool]] = {
    "contiguous": lambda old, new: old.stride() != new.stride(),
    "to": lambda old, new: (old.dtype, old.device) != (new.dtype, new.device),
    "reshape": _reshape_copies,
    "reshape_as": _reshape_copies,
    "flatten": _reshape_copies,
    "ravel": _reshape_copies,
}


def aliases_of(constants: Mapping[str, torch.Tensor], twin: nn.Module) -> dict[str, str]:
    """Return {constant: parameter} of those that are parameters by another way than their module.

    A function that closes over a parameter (functools.partial, a lambda) holds the tensor itself,
    which export takes for a constant. A plain attribute that shares a parameter's memory is one:
    it was detached.
    """
    held = [v for m in twin.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    detached = {_place(v) for v in held if not isinstance(v, nn.Parameter)}
    named = {_place(p): name for name, p in twin.named_parameters()}
    places = {name: _place(constant) for name, constant in constants.items()}
    return {n: named[place] for n, place in places.items() if place in named.keys() - detached}


def _place(tensor: torch.Tensor) -> object:
    """Return what two tensors share that are one; a tensor without strides is itself alone."""
    if tensor.layout != torch.strided:
        return id(tensor)
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
