"""What exact and approximate rotation share: moments, energies, outputs turned back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matryoshkafy.dolls.batches import flat_inputs
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.plan.plan import Plan
from matryoshkafy.units.bases import turned
from matryoshkafy.units.permute import changed
from matryoshkafy.units.sites import Measured, measure


@dataclass(frozen=True)
class GroupBasis:
    """One rotated group: its units, the norms whose gain was folded, whether the direction of ones
    was kept (LayerNorm), and the share of the energy in the first units at each size.
    """

    name: str
    units: int
    folded: tuple[str, ...]
    mean: bool
    kept: tuple[float, ...]


def moment_of(doll: Doll, batches: Sequence[object], group: int) -> Tensor:
    """Return [n, n] the second moment of what a group's readers read, each site alike."""
    flat = (flat_inputs(doll, batch) for batch in batches)
    measured = measure(doll, flat, moments=True, groups={group})
    return moment_from(measured.values(), doll.plan.groups[group].size)


def moment_from(measured: Iterable[Measured], size: int) -> Tensor:
    """Return [size, size] the sum of the second moments, each at trace one."""
    total = torch.zeros(size, size, dtype=torch.float64)
    for m in measured:
        if m.moment is not None and m.moment.shape == total.shape:
            own = m.moment.to(torch.float64)
            total += own / own.diagonal().sum().clamp_min(1e-30)
    return total


def energy_of(moment: Tensor, basis: Tensor, widths: Sequence[int]) -> tuple[float, ...]:
    """Return the share of the energy in the first units of a basis, for each width."""
    energy = (basis @ moment @ basis.t()).diagonal()
    return tuple(float(energy[:w].sum() / energy.sum().clamp_min(1e-30)) for w in widths)


def turned_back(
    doll: Doll, bases: Mapping[int, Tensor], outputs: list[Any], plan: Plan | None = None
) -> list[Any]:
    """Return flat full-size outputs in the old bases; `plan` knows their dims, else the doll's."""
    undo = {g: q.t() for g, q in bases.items()}
    return changed(doll, outputs, lambda value, shape: turned(value, shape, undo), plan)
