"""Permutations of groups: which index of a tensor moves where, and the state moved in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Factor, Nested, Sum
from matryoshkafy.dolls.doll import Doll, trace_of
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.graph.nodes import outputs_of
from matryoshkafy.plan.plan import Plan

# Group -> the old unit that stands at each new place.
Orders = Mapping[int, Tensor]


class OrderError(MatryoshkafyError):
    """A model whose units cannot be ordered, or a way to order them that is not known."""


def positions(dim: Dim, orders: Orders) -> Tensor:
    """Return [size] the old index that stands at each new index along a dim."""
    out = torch.zeros(1, dtype=torch.long)
    for factor in dim:
        own = _factor_positions(factor, orders)
        out = (out[:, None] * len(own) + own).flatten()
    return out


def _factor_positions(factor: Factor, orders: Orders) -> Tensor:
    if isinstance(factor, Sum):
        return _concatenated([positions(part, orders) for part in factor.segments])
    if isinstance(factor, Nested):
        return orders.get(factor.group, torch.arange(factor.size))
    return torch.arange(factor)


def _concatenated(parts: list[Tensor]) -> Tensor:
    out: list[Tensor] = []
    offset = 0
    for part in parts:
        out.append(part + offset)
        offset += len(part)
    return torch.cat(out)


def owners(dim: Dim, group: int) -> Tensor:
    """Return [size] the unit of a group that each index along a dim belongs to, -1 for none."""
    out = torch.full((1,), -1)
    for factor in dim:
        own = _factor_owners(factor, group)
        outer = out[:, None].expand(-1, len(own))
        out = torch.where(outer >= 0, outer, own).flatten()
    return out


def _factor_owners(factor: Factor, group: int) -> Tensor:
    if isinstance(factor, Sum):
        return torch.cat([owners(part, group) for part in factor.segments])
    if isinstance(factor, Nested) and factor.group == group:
        return torch.arange(factor.size)
    return torch.full((factor if isinstance(factor, int) else factor.size,), -1)


def moved(tensor: Tensor, shape: tuple[Dim, ...], orders: Orders) -> Tensor:
    """Return the tensor with the units of every group in the given orders."""
    for i, dim in enumerate(shape):
        if any(g in orders for g in dims.groups_of(dim)):
            tensor = tensor.index_select(i, positions(dim, orders).to(tensor.device))
    return tensor


def inverse(orders: Orders) -> dict[int, Tensor]:
    """Return the orders that undo the given ones."""
    return {group: torch.argsort(order) for group, order in orders.items()}


def permute(state: Mapping[str, Tensor], plan: Plan, orders: Orders) -> None:
    """Move the units of every tensor of the state, in place; each tied tensor once.

    Raises:
        OrderError: a sparse tensor carries one of the groups; nothing has been moved then.
    """
    for name, tensor in carriers(state, plan, orders).items():
        tensor.data.copy_(moved(tensor.data, plan.parameters[name], orders))


def carriers(state: Mapping[str, Tensor], plan: Plan, orders: Orders) -> dict[str, Tensor]:
    """Return the tensors that carry one of the groups, tied ones under their first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, shape in plan.parameters.items():
        tensor = state.get(name)
        if tensor is None or not any(g in orders for d in shape for g in dims.groups_of(d)):
            continue
        if tensor.layout != torch.strided:
            raise OrderError(
                f"{name!r} is stored as {tensor.layout}, and its units cannot be moved in place; "
                "make it dense before convert, or name its group in keep="
            )
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def noted(plan: Plan, orders: Orders, turned: Collection[int] = ()) -> Plan:
    """Return the plan that says where the user's units stand now: after what it said before.

    Groups that were `turned` into another basis hold no unit of the user's: they are left out.
    """
    known = {g.name: plan.order.get(g.name, tuple(range(g.size))) for g in plan.groups}
    found = dict(plan.order)
    for group, order in orders.items():
        name = plan.groups[group].name
        found[name] = tuple(known[name][int(unit)] for unit in order)
    out = {plan.groups[group].name for group in turned}
    return replace(plan, order={n: units for n, units in found.items() if n not in out})


def users_order(doll: Doll, output: object) -> Any:
    """Return a full-size output of an ordered doll, or a loaded one, in the user's own order."""
    index = {g.name: i for i, g in enumerate(doll.plan.groups)}
    orders = {index[name]: torch.tensor(units) for name, units in doll.plan.order.items()}
    return in_tree(partial(put_back, doll, orders), output)


def put_back(doll: Doll, orders: Orders, outputs: list[Any]) -> list[Any]:
    """Return flat full-size outputs with the units of nested output axes in their old places."""
    undo = inverse(orders)
    return changed(doll, outputs, lambda value, shape: moved(value, shape, undo))


def changed(
    doll: Doll,
    outputs: list[Any],
    change: Callable[[Tensor, tuple[Dim, ...]], Tensor],
    plan: Plan | None = None,
) -> list[Any]:
    """Return flat full-size outputs, each tensor whose dims are known changed by them.

    `plan` knows the dims, where the doll's own does not.
    """
    plan = plan or doll.plan
    out: list[Any] = []
    for source, value in zip(outputs_of(trace_of(doll).graph), outputs, strict=True):
        shape = plan.dims(getattr(source, "name", ""))
        known = isinstance(value, Tensor) and len(shape) == value.dim()
        out.append(change(value, shape) if known else value)
    return out


def in_tree(change: Callable[[list[Any]], list[Any]], output: object) -> Any:
    """Return an output whose flat values were changed."""
    flat, spec = pytree.tree_flatten(output)
    return pytree.tree_unflatten(change(flat), spec)
