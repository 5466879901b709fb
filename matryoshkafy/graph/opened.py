"""open_sizes(), companions(): which sizes of the inputs a trace is asked to leave open."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from matryoshkafy.graph.guards import Size


@dataclass(frozen=True)
class Example:
    """Example inputs of a forward."""

    args: tuple[object, ...]
    kwargs: dict[str, object]

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors, in the order of the call."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


# Which sizes torch.export leaves open, in the structure of the inputs; None: none.
Shapes = tuple[Any, ...] | dict[str, Any] | None


def is_open(value: torch.Tensor, dim: int) -> bool:
    """Tell whether a dim is batch or length, which may differ.

    Dim 1 of token ids, masks and [batch, length, features] is a length; channels are not.
    """
    floating = value.is_floating_point() or value.is_complex()
    return value.dim() > 0 if dim == 0 else value.dim() == 3 if floating else value.dim() >= 2


def open_sizes(call: Example, dims: Collection[int]) -> tuple[Size, ...]:
    """Return the sizes of an example that are batches or lengths."""
    each = enumerate(call.tensors())
    return tuple(Size(i, d) for i, t in each for d in dims if is_open(t, d))


def companions(call: Example, asked: Collection[Size], held: Collection[Size]) -> tuple[Size, ...]:
    """Return the sizes that may be lengths by their number: those of the last two dims (a mask
    [.., length, length] of floats) that are the number of one that was asked for and is held.

    They are not asked for at once: a width of the same number would be one with the length.
    """
    tensors = call.tensors()
    numbers = {tensors[size.leaf].shape[size.dim] for size in held} - {1}
    return tuple(
        Size(i, d)
        for i, t in enumerate(tensors)
        for d in range(max(0, t.dim() - 2), t.dim())
        if t.shape[d] in numbers and Size(i, d) not in asked
    )


def dynamic_shapes(model: nn.Module, call: Example, opened: Collection[Size]) -> Shapes:
    """Return shapes by the names of the forward's parameters: *args is one of them, a tuple."""
    if not opened:
        return None
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    shapes = list(_shapes_of(leaves, opened))
    positional, named = pytree.tree_unflatten(shapes, spec)
    return dict(inspect.signature(model.forward).bind(*positional, **named).arguments)


def _shapes_of(
    leaves: Sequence[object], opened: Collection[Size]
) -> Iterator[dict[int, object] | None]:
    tensor = 0
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            yield None
            continue
        dims = range(leaf.dim())
        yield {d: torch.export.Dim.AUTO for d in dims if Size(tensor, d) in opened} or None
        tensor += 1
