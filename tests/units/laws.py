"""The law of ordering on one entry of the zoo: outputs and gradients are the full model's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.units.order import order
from matryoshkafy.units.permute import moved, put_back
from matryoshkafy.units.report import OrderReport
from tests.zoo.judge import widened
from tests.zoo.registry import Entry

RATIOS = [0.25, 0.5, 1.0]


@dataclass(frozen=True)
class Row:
    """What ordering came to on one architecture: errors are relative to the largest value."""

    name: str
    status: str
    message: str = ""
    output: float = 0.0
    gradient: float = 0.0
    groups: int = 0
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.name:28} {self.status:8} output {self.output:.0e} gradient {self.gradient:.0e} "
            f"groups {self.groups} kept {len(self.kept)} {self.message[:90]}"
        )


def measure(entry: Entry, by: str = "activation", *, double: bool = False) -> Row:
    """Return the row of one architecture, `double` in float64."""
    model, args, kwargs = entry.build()
    try:
        doll = mk.convert(model, args, kwargs, sizes=RATIOS, nesting="sliced")
    except mk.MatryoshkafyError as error:
        return Row(entry.name, "refused", str(error).splitlines()[0])
    if double:
        doll = doll.double()
        args, kwargs = pytree.tree_map_only(Tensor, widened, (tuple(args), dict(kwargs)))
    before = _run(doll, args, kwargs)
    report = order(doll, [(tuple(args), dict(kwargs))], by=by, unread="leave")
    after = _run(doll, args, kwargs, report)
    kept = tuple(f"{g.name}: {g.kept}" for g in report.groups if g.kept)
    return Row(
        entry.name, "ok", "", *_errors(doll, report, before, after), len(doll.plan.groups), kept
    )


def orders_of(report: OrderReport) -> dict[int, Tensor]:
    """Return {group: order} of the groups that moved."""
    return report.permutations


Run = tuple[list[Any], dict[str, Tensor]]


def _run(doll: Doll, args: Any, kwargs: Any, report: OrderReport | None = None) -> Run:
    """Return the flat outputs, put back, and the gradients of a fixed random sum of them."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        flat = pytree.tree_leaves(doll(*args, **kwargs))
        if report is not None:
            flat = put_back(doll, orders_of(report), flat)
        generator = torch.Generator().manual_seed(1)
        floats = [v for v in flat if isinstance(v, Tensor) and v.requires_grad]
        sums = [(v * torch.randn(v.shape, generator=generator)).sum() for v in floats]
        weights = {n: p for n, p in doll.named_parameters() if p.requires_grad}
        grads: Any = [None] * len(weights)
        if sums:
            total = torch.stack([s.abs() if s.is_complex() else s for s in sums]).sum()
            grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    found = {n: g for n, g in zip(weights, grads, strict=True) if g is not None}
    return [v.detach() if isinstance(v, Tensor) else v for v in flat], found


def _errors(doll: Doll, report: OrderReport, before: Run, after: Run) -> tuple[float, float]:
    orders, shapes = orders_of(report), doll.plan.parameters
    pairs = [
        (after[1][n], moved(g, shapes[n], orders)) for n, g in before[1].items() if n in shapes
    ]
    scale = max((float(g.abs().max()) for _, g in pairs if g.numel()), default=1.0)
    gradient = max((float((a - g).abs().max()) / scale for a, g in pairs if g.numel()), default=0.0)
    return relative_error(after[0], before[0]), gradient
