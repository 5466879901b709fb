"""One number per norm and size: what a norm over a prefix makes too large, made right.

A norm over the first m of n units divides by their own spread, where the full model divides by the
spread of all n. Behind it the units are too large by 1 / s, with s the spread that the first m
units of the full norm's output have: sqrt(n / m times the share of the energy in them). Times s the
gain is right, and a slice that holds it is still a plain model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import state_of
from matryoshkafy.plan.plan import Plan
from matryoshkafy.units.normed import stream
from matryoshkafy.units.permute import OrderError


@dataclass(frozen=True)
class NormScales:
    """Factors of the gains: {gain: one for each of `sizes`, the last 1.0}."""

    sizes: tuple[int, ...]
    factors: Mapping[str, tuple[float, ...]]

    def fold(self, small: nn.Module, size: int) -> nn.Module:
        """Multiply the gains of a slice of this size, in place; return it."""
        state = state_of(small)
        with torch.no_grad():
            for name, factor in self.at(size).items():
                state[name].mul_(factor)
        return small

    def at(self, size: int) -> dict[str, float]:
        """Return {gain: factor} of a size."""
        if size not in self.sizes:
            raise OrderError(
                f"size {size} was given; expected one of {', '.join(map(str, self.sizes))}"
            )
        level = self.sizes.index(size)
        return {name: each[level] for name, each in self.factors.items()}


def norm_scales(doll: Doll, batches: Iterable[object]) -> NormScales:
    """Measure one factor for each norm and size of a sliced doll, on calibration inputs.

    Order or rotate first: the factors belong to the units as they stand.

    Args:
        doll: a doll in sliced nesting; nothing of it is changed.
        batches: calibration inputs, as for `order`.

    Returns:
        The factors; `fold` puts them into a slice.

    Raises:
        OrderError: a masked doll, whose norms see the whole width; no batch.
    """
    if doll.plan.masked:
        raise OrderError(
            'a masked doll was given, whose full model changes; convert with nesting="sliced"'
        )
    spread = _Spread(doll.plan)
    if not stream(doll, batches, spread.add):
        raise OrderError("no batch was given; give a few hundred rows of inputs as the model's own")
    found: dict[str, tuple[float, ...]] = {}
    for name, (s, rows) in spread.sums.items():
        roots = cast("list[float]", (s / rows).sqrt().tolist())  # pyright: ignore[reportUnknownMemberType]
        found[name] = tuple(roots)
    return NormScales(doll.plan.sizes, found)


class _Spread:
    """Adds up, for each gain, the variance of the first units of what it multiplies."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, gain: str, dim: Dim, rows: Tensor, centred: bool) -> None:
        widths = [dims.size_at(dim, w) for w in self.plan.ladder]
        each = [rows[:, :w].square().mean(1) for w in widths]
        if centred:
            each = [e - rows[:, :w].mean(1).square() for e, w in zip(each, widths, strict=True)]
        total = torch.stack([one.double().sum() for one in each]).cpu()
        known, count = self.sums.get(gain, (torch.zeros(len(widths)).double(), 0))
        self.sums[gain] = known + total, count + len(rows)
