"""Scores of importance: one number per unit of each group, and the order that they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from matryoshkafy.axes import dims
from matryoshkafy.dolls.batches import arguments_of, moved
from matryoshkafy.dolls.doll import Doll, trace_of
from matryoshkafy.plan.plan import Plan
from matryoshkafy.units.permute import carriers, owners
from matryoshkafy.units.sites import Measured, Site

Loss = Callable[[Any, Any], Tensor]


def _units(values: Tensor, site: Site, group: int, size: int) -> Tensor:
    """Return [units] the sum of the values over the indices of each unit of the group."""
    owner = owners(site.dim, group).to(values.device)
    mine = owner >= 0
    return values.new_zeros(size).index_add_(0, owner[mine], values[mine]).cpu()


def activation(plan: Plan, measured: Mapping[Site, Measured], group: int) -> Tensor:
    """Minitron (arXiv 2407.14679, section 3): over the samples the L2 norm of the mean over the
    positions of |x|, summed over the sites; units of several channels by the L2 norm of those.
    """
    size = plan.groups[group].size
    found = (
        _units(m.magnitude, site, group, size).sqrt()
        for site, m in measured.items()
        if group in site.groups
    )
    return sum(found, torch.zeros(size))


def outgoing(plan: Plan, measured: Mapping[Site, Measured], group: int) -> Tensor:
    """What a unit adds to its readers: the root of the sum of mean x**2 |w|**2 over the sites."""
    size = plan.groups[group].size
    found = (
        _units(m.square * _reach(m) / max(1, m.rows), site, group, size)
        for site, m in measured.items()
        if group in site.groups
    )
    return sum(found, torch.zeros(size)).sqrt()


def _reach(m: Measured) -> Tensor:
    return m.reach if bool(m.reach.any()) else torch.ones_like(m.reach)


def contribution(plan: Plan, measured: Mapping[Site, Measured], group: int) -> Tensor:
    """Iterative contribution (Puzzle, arXiv 2411.19146): how late a unit is removed, when each
    round removes the one after which the readers' outputs are off by least.

    The squared error after removing a set R is the sum over i, k in R of M[i, k], where M is the
    product, entry by entry, of the units' second moments and of W' W: it follows correlations.
    """
    size = plan.groups[group].size
    interaction = torch.zeros(size, size)
    for site, m in measured.items():
        if group in site.groups and m.moment is not None and m.weight is not None:
            weight = m.weight if bool(m.weight.any()) else torch.eye(len(m.weight))
            interaction += _unit_matrix(m.moment * weight / max(1, m.rows), site, group, size)
    return _removal(interaction)


def _unit_matrix(values: Tensor, site: Site, group: int, size: int) -> Tensor:
    rows = torch.stack([_units(row, site, group, size) for row in values])
    return torch.stack([_units(column, site, group, size) for column in rows.t()]).t()


def _removal(interaction: Tensor) -> Tensor:
    """Return [units] the round in which each unit is removed, the cheapest first."""
    cost = interaction.diagonal().clone()
    rounds = torch.zeros(len(cost))
    for turn in range(len(cost)):
        unit = int(cost.argmin())
        rounds[unit] = turn + 1
        cost += 2 * interaction[unit]
        cost[unit] = float("inf")
    return rounds


def taylor(doll: Doll, batches: Iterable[object], loss: Loss) -> dict[int, Tensor]:
    """First-order Taylor (DynaBERT, arXiv 2004.04037): per unit |w . g| of each tensor that holds
    it, summed over tensors and batches; {group: [units]}.
    """
    plan, state = doll.plan, trace_of(doll).state()
    everything = dict.fromkeys(range(len(plan.groups)), torch.empty(0))
    weights = {n: t for n, t in carriers(state, plan, everything).items() if t.requires_grad}
    scores = {g: torch.zeros(group.size) for g, group in enumerate(plan.groups)}
    for given in batches:
        batch = moved(given, doll)
        args, kwargs = arguments_of(batch)
        with torch.enable_grad():
            value = loss(doll(*args, **kwargs), batch)
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            grads = cast("tuple[Tensor | None, ...]", found)
        for (name, weight), grad in zip(weights.items(), grads, strict=True):
            if grad is not None:
                _add_products(scores, plan, name, (weight.detach() * grad).float())
    return scores


def _add_products(scores: dict[int, Tensor], plan: Plan, name: str, product: Tensor) -> None:
    for i, dim in enumerate(plan.parameters[name]):
        sums = product.movedim(i, 0).flatten(1).sum(1) if product.dim() > 1 else product
        for group in set(dims.groups_of(dim)):
            site = Site(name, i, dim)
            scores[group] += _units(sums, site, group, plan.groups[group].size).abs()


Score = Callable[[Plan, Mapping[Site, Measured], int], Tensor]
SCORES: dict[str, Score] = {
    "activation": activation,
    "outgoing": outgoing,
    "contribution": contribution,
}
