"""Fresh inputs of two shapes on which a slice and its native model are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from matryoshkafy.dolls.example_inputs import example_inputs
from matryoshkafy.dolls.slice import parts_of
from matryoshkafy.graph.copies import forked, seed_torch

Call = tuple[tuple[Any, ...], dict[str, Any]]


def fresh_calls(small: nn.Module) -> Iterator[Call]:
    """Yield a call of the traced shape, then one with another batch and length where it may."""
    yield example_inputs(small, seed=1)
    call = example_inputs(small, seed=2)
    for dims in _free_dims(small):
        grown = _grown(call, dims)
        if _runs(small, grown):
            yield grown
            return


def _free_dims(small: nn.Module) -> tuple[tuple[int, ...], ...]:
    notes = " ".join(parts_of(small)[0].notes)
    if "other batch sizes need a new trace" in notes:
        return ()
    return ((0,),) if "only the batch size" in notes else ((0, 1), (0,))


def _grown(call: Call, dims: tuple[int, ...]) -> Call:
    """Every batch grows by one; a length by half, so that windows and masks see another one."""

    def grow(value: object) -> object:
        return _grow(value, dims) if isinstance(value, Tensor) else value

    return pytree.tree_map(grow, call)


def _grow(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in dims:
        if dim < value.dim() and (dim == 0 or _is_length(value)):
            more = 1 if dim == 0 else max(1, value.shape[dim] // 2)
            value = torch.cat([value, value.narrow(dim, 0, more)], dim)
    return value


def _is_length(value: Tensor) -> bool:
    """Dim 1 of token ids, masks and [batch, length, features] is a length; channels are not."""
    return value.dim() == 3 if value.is_floating_point() else value.dim() >= 2


def _runs(small: nn.Module, call: Call) -> bool:
    try:
        with torch.no_grad():
            small(*call[0], **call[1])
    except Exception:  # noqa: BLE001  a graph of another shape may raise anything
        return False
    return True


def outputs(model: nn.Module, call: tuple[Sequence[object], Mapping[str, object]]) -> Any:
    """Return what a model computes, the same random numbers drawn at each call."""
    with torch.no_grad(), forked(devices=[]):
        seed_torch(0)
        return model(*call[0], **call[1])
