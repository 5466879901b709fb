"""mark_storage(), aliases_of(): who shares memory, which torch.export does not always say."""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

import torch
from torch import fx, nn

from matryoshkafy.errors import TraceError
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


def refuse_shared(model: nn.Module) -> None:
    """Refuse two parameters, or a parameter and a buffer, that are parts of the same memory.

    A graph knows tensors by their names: a slice or a file would have two of what is one.

    Raises:
        TraceError: names both, and how to tie them.
    """
    parameters = {id(p) for p in model.parameters()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    placed: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors:
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided:
            placed.setdefault(tensor.untyped_storage()._cdata, []).append((name, tensor))
    for held in placed.values():
        for (name, one), (other, two) in combinations(held, 2):
            if id(one) in parameters and one is not two and overlap(one, two):
                raise TraceError(_shared(name, other, tied=id(two) in parameters))


def _shared(name: str, other: str, *, tied: bool) -> str:
    kind = "Parameter" if tied else "buffer"
    remedy = (
        "Tie the Parameter itself (b.weight = a.weight, not nn.Parameter(a.weight.data)), or give "
        "each memory of its own (.clone())."
        if tied
        else "Read the Parameter itself where the buffer is read, or register a clone() of it."
    )
    return (
        f"the {kind} {other!r} is in the memory of the Parameter {name!r}, and is another object: "
        "a slice and a file would hold two tensors that no longer follow each other. Expected "
        f"tensors that are one, or that share nothing. {remedy}"
    )


def overlap(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Tell whether two strided tensors of one storage have an element in common.

    Views of one buffer beside each other, such as the weights of a recurrent layer, have none.
    """
    (start, end), (begin, stop) = _extent(one), _extent(two)
    if end <= begin or stop <= start:
        return False
    if one.element_size() != two.element_size():
        return True
    # Columns of one table lie between each other: their elements decide.
    taken = torch.zeros(max(end, stop) // one.element_size(), dtype=torch.bool, device="cpu")
    _elements(taken, one).fill_(True)
    return bool(_elements(taken, two).any())


def _elements(memory: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the bytes of the storage from a tensor's first element to after its last."""
    start, size = int(tensor.storage_offset()), tensor.element_size()
    if not tensor.numel():
        return start * size, start * size
    last = sum(int(n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start * size, (start + last + 1) * size
