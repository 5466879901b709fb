"""Weights drawn for all inputs, scaled to the inputs that each row reads."""

from __future__ import annotations

import torch
from torch import Tensor

from matryoshkafy.axes import dims
from matryoshkafy.dolls.doll import Doll


def scale_rows(doll: Doll) -> dict[str, tuple[float, ...]]:
    """Scale each row of the masked weights by sqrt(inputs / inputs that it reads), in place.

    For a doll that is about to be trained from scratch with its user's own initialisation: a row of
    the smallest size reads 8 of 256 inputs but was drawn for all of them (He et al. 2015, eq. 10).
    A weight that several layers share is scaled once. Call it once.

    Args:
        doll: the doll, freshly converted.

    Returns:
        {weight: factor at each level}, ascending; empty for sliced nesting.
    """
    plan = doll.plan
    state, done = dict(doll.named_parameters(remove_duplicate=False)), set[int]()
    factors: dict[str, tuple[float, ...]] = {}
    for name, kept in plan.stored.items():
        if kept.mask is not None and name in state and id(state[name]) not in done:
            done.add(id(state[name]))
            out, into = kept.mask.out, kept.mask.into
            dim = kept.dims[into]
            factors[name] = tuple(
                (dims.size(dim) / dims.size_at(dim, widths)) ** 0.5 for widths in plan.ladder
            )
            spans = dims.spans(kept.dims[out], plan.ladder)
            _scale(state[name], out, [(a, b, factors[name][level]) for a, b, level in spans])
    return factors


@torch.no_grad()
def _scale(weight: Tensor, dim: int, stretches: list[tuple[int, int, float]]) -> None:
    for start, end, factor in stretches:
        weight.narrow(dim, start, end - start).mul_(factor)
