"""What ordering did: which groups moved, which stay and why, and what each size gained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from matryoshkafy.dolls.doll import Doll
from matryoshkafy.plan.plan import Plan
from matryoshkafy.units.permute import Orders, in_tree, put_back


@dataclass(frozen=True)
class GroupOrder:
    """One group: its units, why it keeps its order ("" if it was ordered), and the share of the
    importance that stands in the first units at each size, before and after.
    """

    name: str
    units: int
    kept: str
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class OrderReport:
    """The result of `order`.

    `orders` gives for each group the old unit at each new place (None where it kept its order);
    `error` how far the full model moved (relative, on the first batch); `agreement` per size
    (before, after): linear CKA of its outputs with the full model's; `unread` the tensors that the
    traced path does not read and that therefore keep the old order.
    """

    by: str
    sizes: tuple[int, ...]
    groups: tuple[GroupOrder, ...]
    orders: tuple[tuple[int, ...] | None, ...]
    error: float
    agreement: tuple[tuple[float, float], ...]
    unread: tuple[str, ...] = ()

    def put_back(self, doll: Doll, output: object) -> Any:
        """Return a full-size output of the doll with the units of its axes in their old places."""
        return in_tree(partial(put_back, doll, self.permutations), output)

    def units(self, doll: Doll, size: int) -> tuple[int, ...]:
        """Return the old units of the main group that the sub-model of a size holds, in order."""
        plan = doll.plan
        width = plan.ladder[plan.level(size)][plan.main]
        order = self.orders[plan.main]
        return tuple(range(width)) if order is None else order[:width]

    @property
    def permutations(self) -> dict[int, Tensor]:
        """{group: order} of the groups that moved."""
        return {g: torch.tensor(one) for g, one in enumerate(self.orders) if one is not None}

    def __str__(self) -> str:
        moved = [g for g in self.groups if not g.kept]
        head = f"ordered by {self.by}: {len(moved)} of {len(self.groups)} groups; the full model "
        lines = [head + f"moved by {self.error:.1e}", "", self._table()]
        lines += [f"{g.name} keeps its order: {g.kept}" for g in self.groups if g.kept]
        if self.unread:
            lines.append(f"not read by the traced path, in the old order: {', '.join(self.unread)}")
        return "\n".join(lines)

    def _table(self) -> str:
        names = [f"{'size':>6}  {'agreement':>18}  {'importance kept':>18}"]
        moved = [g for g in self.groups if not g.kept]
        for i, size in enumerate(self.sizes):
            before, after = self.agreement[i]
            shares = [
                sum(getattr(g, side)[i] for g in moved) / max(1, len(moved))
                for side in ("before", "after")
            ]
            names.append(
                f"{size:>6}  {before:7.3f} -> {after:7.3f}  {shares[0]:7.3f} -> {shares[1]:7.3f}"
            )
        return "\n".join(names)


def group_orders(
    plan: Plan, scores: Sequence[Tensor], orders: Orders, kept: dict[int, str]
) -> tuple[GroupOrder, ...]:
    """Return the row of each group."""
    rows: list[GroupOrder] = []
    for g, group in enumerate(plan.groups):
        widths = [w[g] for w in plan.ladder]
        after = scores[g][orders[g]] if g in orders else scores[g]
        shares = _shares(scores[g], widths), _shares(after, widths)
        rows.append(GroupOrder(group.name, group.size, kept.get(g, ""), *shares))
    return tuple(rows)


def _shares(score: Tensor, widths: list[int]) -> tuple[float, ...]:
    total = float(score.sum())
    return tuple(float(score[:w].sum()) / total if total > 0 else 1.0 for w in widths)


def cka(a: Tensor, b: Tensor) -> float:
    """Return the linear CKA of two sets of rows [n, p], [n, q] (Kornblith et al. 2019, eq. 4)."""
    a, b = (x.to(torch.float64) - x.to(torch.float64).mean(0) for x in (a, b))
    own = (_squares(a, a) * _squares(b, b)).sqrt()
    return float(_squares(a, b) / own) if float(own) > 0 else 1.0


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of squares of a^T b, by the smaller of [p, q] and [n, n].

    Logits are far wider than there are rows: a vocabulary squared is 20 GB.
    """
    if len(a) ** 2 < a.shape[1] * b.shape[1]:
        return ((a @ a.t()) * (b @ b.t())).sum()
    return (a.t() @ b).square().sum()
