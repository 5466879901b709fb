"""Fresh inputs of two shapes on which a slice and its native model are compared."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from matryoshkafy.dolls.example_inputs import example_inputs
from matryoshkafy.dolls.libraries import caches_off
from matryoshkafy.dolls.slice import parts_of
from matryoshkafy.graph.copies import forked, seed_torch
from matryoshkafy.graph.opened import is_open
from matryoshkafy.natives.recipe import NativeError

Call = tuple[tuple[Any, ...], dict[str, Any]]


def fresh_calls(small: nn.Module, given: Call | None = None) -> tuple[Call, ...]:
    """Return a call of the traced shape, and one with another batch and length where it may.

    given: inputs of the user's, for a model that random ones do not suit (boxes, places of
    pictures in a text): their floats are drawn anew, all else stays.

    Raises:
        NativeError: where random inputs do not run, and none were given.
    """
    random = (example_inputs(small, seed=seed) for seed in (1, 2))
    first, call = random if given is None else (_redrawn(given, seed) for seed in (1, 2))
    if not _runs(small, first):
        raise NativeError(
            "random inputs of the traced shapes do not run through the slice; expected inputs to "
            "compare on that do. Give native(..., inputs=(ARGS, KWARGS)), such as those that were "
            "traced."
        )
    larger = (_grown(call, dims) for dims in _free_dims(small))
    return (first, *itertools.islice((grown for grown in larger if _runs(small, grown)), 1))


def _redrawn(call: Call, seed: int) -> Call:
    """Floats of the same spread, drawn anew; ids, masks and numbers as they are."""
    draw = torch.Generator().manual_seed(seed)

    def again(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        drawn = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        spread = value.double().std() if value.numel() > 1 else 1.0
        return (value.double().mean() + spread * drawn).to(value.dtype)

    return pytree.tree_map_only(Tensor, again, call)


def _free_dims(small: nn.Module) -> tuple[tuple[int, ...], ...]:
    notes = " ".join(parts_of(small)[0].notes)
    if "other batch sizes need a new trace" in notes:
        return ()
    return ((0,),) if "only the batch size" in notes else ((0, 1), (0,))


def _grown(call: Call, dims: tuple[int, ...]) -> Call:
    """Every batch grows by one; a length by half, so that windows and masks see another one."""

    def grow(value: Tensor) -> Tensor:
        for dim in (dim for dim in dims if is_open(value, dim)):
            more = 1 if dim == 0 else max(1, value.shape[dim] // 2)
            value = torch.cat([value, value.narrow(dim, 0, more)], dim)
        return value

    return pytree.tree_map_only(Tensor, grow, call)


def _runs(small: nn.Module, call: Call) -> bool:
    try:
        outputs(small, call)
    except Exception:  # noqa: BLE001  a graph of another shape may raise anything
        return False
    return True


def outputs(model: nn.Module, call: tuple[Sequence[object], Mapping[str, object]]) -> Any:
    """Return what a model computes, the same random numbers drawn at each call, and no cache."""
    with torch.no_grad(), forked(devices=[]), caches_off(model):
        seed_torch(0)
        return model(*call[0], **call[1])
