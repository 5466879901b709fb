"""Orthogonal bases whose first units carry most, and the state turned into them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim
from matryoshkafy.kernels.untyped import eigh, vector_norm
from matryoshkafy.plan.plan import Plan


def principal(moment: Tensor) -> Tensor:
    """Return [n, n] the directions of a second moment as rows, the strongest first."""
    moment = moment.to(torch.float64)
    return eigh((moment + moment.t()) / 2)[1].flip(1).t()


def mean_kept(moment: Tensor, widths: Sequence[int]) -> Tensor:
    """Return [n, n] an orthogonal matrix that keeps the direction of ones, prefix by prefix.

    The strongest directions free of the mean go into the first block of units, through an isometry
    whose columns sum to zero there; so a prefix that ends at a block has the mean of the whole, and
    its own LayerNorm removes just that. The weakest go into the differences between the blocks.

    Args:
        moment: [n, n] second moment.
        widths: ascending widths of the ladder; the last is n.
    """
    n = len(moment)
    ones = torch.full((n,), n**-0.5, dtype=torch.float64)
    free = _contrasts(n)
    rows = principal(free.t() @ moment.to(torch.float64) @ free) @ free.t()
    columns = _blocks(widths)
    return columns @ rows + torch.outer(ones, ones)


def outliers_kept(moment: Tensor, widths: Sequence[int], outliers: Tensor, *, mean: bool) -> Tensor:
    """Return [n, n] an orthogonal matrix whose first units are the outliers, as they are.

    The rest is turned among itself: `mean_kept` or `principal` of its own moment.
    """
    n, count = len(moment), len(outliers)
    first = cast("list[int]", outliers.tolist())  # pyright: ignore[reportUnknownMemberType]
    rest = torch.tensor([i for i in range(n) if i not in set(first)])
    inner = moment[rest][:, rest]
    turned = mean_kept(inner, [w - count for w in widths]) if mean else principal(inner)
    basis = torch.zeros(n, n, dtype=torch.float64)
    basis[torch.arange(count), outliers] = 1.0
    basis[count:, rest] = turned
    return basis


def _blocks(widths: Sequence[int]) -> Tensor:
    """Return [n, n - 1] orthonormal columns free of the mean, block by block."""
    ends = [0, *dict.fromkeys(widths)]
    n = ends[-1]
    columns: list[Tensor] = []
    for start, end in zip(ends, ends[1:], strict=False):
        block = torch.zeros(n, end - start - 1, dtype=torch.float64)
        block[start:end] = _contrasts(end - start)
        columns.append(block)
    lengths = torch.tensor([b - a for a, b in zip(ends, ends[1:], strict=False)])
    between = torch.zeros(n, len(lengths), dtype=torch.float64)
    for i, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        between[start:end, i] = float(end - start) ** -0.5
    return torch.cat([*columns, between @ _free_of(lengths.to(torch.float64).sqrt())], 1)


def _contrasts(n: int) -> Tensor:
    """Return [n, n - 1] orthonormal columns that sum to zero."""
    return _free_of(torch.ones(n, dtype=torch.float64))


def _free_of(direction: Tensor) -> Tensor:
    """Return [n, n - 1] orthonormal columns orthogonal to a direction: a Householder reflection
    that sends the first axis there, without its first column.
    """
    n = len(direction)
    u = direction / vector_norm(direction, (0,))
    u[0] -= 1.0
    if float(vector_norm(u, (0,))) < 1e-12:
        return torch.eye(n, dtype=torch.float64)[:, 1:]
    u = u / vector_norm(u, (0,))
    return (torch.eye(n, dtype=torch.float64) - 2 * torch.outer(u, u))[:, 1:]


def turned(tensor: Tensor, shape: tuple[Dim, ...], bases: Mapping[int, Tensor]) -> Tensor:
    """Return the tensor with every axis of the groups in its new basis, through float64."""
    for i, dim in enumerate(shape):
        basis = next((bases[g] for g in dims.groups_of(dim) if g in bases), None)
        if basis is not None:
            q = basis.to(tensor.device)
            wide = tensor.movedim(i, -1).to(torch.float64) @ q.t()
            tensor = wide.movedim(-1, i).to(tensor.dtype)
    return tensor


def turn(
    state: Mapping[str, Tensor],
    plan: Plan,
    bases: Mapping[int, Tensor],
    scales: Collection[str] = (),
) -> None:
    """Turn every tensor that carries one of the groups, in place; each tied tensor once.

    `scales` names the gains of norms, which multiply unit by unit and are ones by now.
    """
    done: set[int] = {id(state[name]) for name in scales}
    for name, shape in plan.parameters.items():
        tensor = state.get(name)
        mine = any(g in bases for d in shape for g in dims.groups_of(d))
        if tensor is not None and mine and id(tensor) not in done:
            done.add(id(tensor))
            tensor.data.copy_(turned(tensor.data, shape, bases))
