"""Infinities beyond a prefix: a structural zero times infinity is NaN inside a dense product.

Small levels share a tile, whose zeros are multiplied. Where that gives something not finite, it is
computed again, level by level, over inputs from which the units beyond are taken out. Only the CPU
looks: elsewhere a look would wait for the device, and a loss that is not finite is stopped anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from matryoshkafy.kernels.levels import Runs, levels_of


def overflowed(y: Tensor, runs: Runs, *, dim: int = 1, start: int = 0) -> bool:
    """Whether a product on the CPU met something not finite beyond its lowest level, or there.

    A unit of the lowest level multiplies zeros with everything beyond it, so it alone is looked at.

    Args:
        y: a part of the result, the units from `start` on along `dim`.
        runs: the levels of the whole result.
        dim: which dim of y has levels.
        start: where the part begins.
    """
    if y.device.type != "cpu" or not y.shape[dim]:
        return False
    unit = y.detach().select(dim, lowest(runs, start, start + y.shape[dim]))
    return not bool(torch.isfinite(unit.sum()))


@lru_cache(maxsize=4096)
def lowest(runs: Runs, start: int, stop: int) -> int:
    """The first unit of the lowest level between two units, counted from the first of them."""
    levels = levels_of(runs)[start:stop]
    return levels.index(min(levels))


def by_level(
    compute: Callable[[Tensor], Tensor],
    x: Tensor,
    runs: tuple[Runs, Runs],
    *,
    dim: int,
    groups: int = 1,
) -> Tensor:
    """Return compute(x), each level from inputs that hold nothing beyond it.

    Args:
        compute: x -> y, with its structural zeros inside.
        x: its inputs, with the levels of runs[1] along `dim`.
        runs: the levels along `dim` of y and of x, of one group.
        dim: which dim of x and y has levels.
        groups: how often the runs follow each other along it.
    """
    out, into = (torch.tensor(levels_of(r) * groups, device=x.device) for r in runs)
    shape = [1] * x.ndim
    shape[dim] = -1
    y: Tensor | None = None
    for level in sorted(set(levels_of(runs[0]))):
        found = compute(x.masked_fill((into > level).view(shape), 0))
        y = found if y is None else torch.where((out == level).view(shape), found, y)
    return compute(x) if y is None else y
