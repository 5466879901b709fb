"""pieces_of(): torch.tensor_split and its kin, written so that a trace takes no side on remainders.

torch asks of each piece whether it is one of the longer ones. To a trace each answer is a branch,
which would hold the size of an input to the remainder that the example's has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
# Which dim a function splits, given how many there are; None: its own argument says.
DIMS: Mapping[Function, Callable[[int], int] | None] = {
    **dict.fromkeys((torch.tensor_split, Tensor.tensor_split)),
    **dict.fromkeys((torch.hsplit, Tensor.hsplit), lambda rank: min(1, rank - 1)),
    **dict.fromkeys((torch.vsplit, Tensor.vsplit), lambda rank: 0),
    **dict.fromkeys((torch.dsplit, Tensor.dsplit), lambda rank: 2),
}


def pieces_of(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what one of `DIMS` gives, by ops that have a row of their own.

    What torch refuses is left to torch, which says what it expects.
    """
    call: dict[str, Any] = dict(zip(("x", "given", "dim"), args, strict=False))
    call |= {NAMES.get(key, key): value for key, value in kwargs.items()}
    x, given, own = call.get("x"), call.get("given"), DIMS[function]
    if not isinstance(x, Tensor) or isinstance(given, Tensor | None) or len(args) > 3:
        return function(*args, **kwargs)
    if own is not None and x.dim() <= own(3):
        return function(*args, **kwargs)
    dim = call.get("dim", 0) if own is None else own(x.dim())
    if not isinstance(given, int):
        return torch.tensor_split(x, given, dim)
    if given < 1 or (own is not None and x.shape[dim] % given):
        return function(*args, **kwargs)
    size = x.shape[dim]
    return torch.split(x, size // given if own else _lengths(size, given), dim)


INDICES = ("indices_or_sections", "indices", "sections", "tensor_indices_or_sections")
NAMES = {"input": "x", "self": "x", **dict.fromkeys(INDICES, "given")}


def _lengths(size: int, count: int) -> list[Any]:
    """The first pieces take one more each of what does not divide evenly."""
    each, more = size // count, size % count
    starts = [i * each + torch.sym_min(i, more) for i in range(count + 1)]
    return [end - start for start, end in itertools.pairwise(starts)]
